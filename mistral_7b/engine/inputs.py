"""What users ask, made requests: whatever can be refused is refused here, before anything waits for it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import (
    EngineError,
    GenerationError,
    GrammarError,
    Mistral7BError,
    PromptTooLongError,
    SamplingError,
    TokenizerError,
)
from ..model import Mistral7B, ModelArgs
from ..sampling.params import SamplingParams
from ..sampling.sampler import draw_seed
from ..text.messages import tool_call_id
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import ToolCallStream
from .completion import Completion
from .engine import Engine
from .grammar.client import KEPT, MOST, Grammars
from .grammar.spec import FREE, GrammarSpec
from .pages import first_key
from .request import Request, Sink
from .speculation import Speculation

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
ToolChoice = str | Mapping[str, Any]
POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that can be continued, and its n completions, which have no tokens yet."""

    prompt: str | None
    ids: list[int]
    params: SamplingParams
    completions: list[Completion]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text or one list of ids is one prompt."""
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def params_for(
    prompts: Sequence[object], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """The parameters of each prompt."""
    each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
    if len(each) != len(prompts):
        raise GenerationError(
            f"{len(prompts)} prompts with {len(each)} SamplingParams",
            field="params",
            hint="give one, or one for each",
        )
    return each


def read_prompt(
    args: ModelArgs, name: str, prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None, why: str = "",
    space: int | None = None, field: str = "prompt",
) -> ReadPrompt:  # fmt: skip
    """One prompt; errors call it `name`, and the request's field that it came in `field`.

    `why`: why there is no tokenizer, if there is none.

    `space`: tokens for which there is memory, the prompt's included, where that is less than a context.
    """
    if tokenizer is None and (isinstance(prompt, str) or params.stops):
        raise GenerationError(
            f"{name}: text prompts and stop strings need a tokenizer, and {why}",
            field=field if isinstance(prompt, str) else "stop",
            hint="pass tokenizer=...",
        )
    if isinstance(prompt, str):
        assert tokenizer is not None  # as was just seen
        try:
            ids = tokenizer.encode(prompt)
        except TokenizerError as e:
            raise TokenizerError.of(e, message=f"{name}: {e.message}", field=field) from e
    else:
        ids = list(prompt)
    if not ids:
        raise GenerationError(f"{name} is empty; it needs one token at least, such as BOS", field=field)
    for at, token in enumerate(ids):
        if not isinstance(token, int) or not 0 <= token < args.vocab_size:
            raise GenerationError(
                f"{name}: {token!r} at index {at} is no token of a vocabulary of {args.vocab_size}",
                field=field,
            )
    named = [*(params.logit_bias or ()), *(params.stop_token_ids or ())]
    if named and max(named) >= args.vocab_size:
        raise SamplingError(
            f"token {max(named)} in logit_bias or stop_token_ids: the vocabulary has {args.vocab_size}",
            field="logit_bias" if max(named) in (params.logit_bias or ()) else "stop_token_ids",
        )
    room = _room(args, name, field, len(ids), params, space)
    seed = draw_seed() if params.seed is None else params.seed
    completions = [Completion(ids, params, room, seed, k, tokenizer) for k in range(params.n)]
    return ReadPrompt(prompt if isinstance(prompt, str) else None, ids, params, completions)


def _room(args: ModelArgs, name: str, field: str, length: int, params: SamplingParams, space: int | None) -> int:
    """How many tokens may be generated. With a window the context has no end, so `max_tokens` alone rules."""
    context, left = args.max_seq_len, args.max_seq_len - length
    if params.max_tokens is None and left < 1:
        raise PromptTooLongError(
            f"{name} has {length} tokens and fills the context of {context}", field=field, hint="shorten it"
        )
    if params.max_tokens is None and space is not None:
        left = min(left, space - length)
        if left < 1:
            raise PromptTooLongError(
                f"{name} has {length} tokens and fills the memory for {space}",
                field=field,
                hint="shorten it, or raise kv_cache_bytes",
            )
    if params.max_tokens is not None and params.max_tokens > left and args.sliding_window is None:
        raise PromptTooLongError(
            f"{name} has {length} tokens, and max_tokens={params.max_tokens} more do not fit the context of "
            f"{context}",
            field=field,
            hint="shorten it, or lower max_tokens (None takes what is left)",
        )
    return left if params.max_tokens is None else params.max_tokens


@functools.lru_cache(maxsize=4)
def _tokenizer_at(source: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_pretrained(source)


def tokenizer_beside(model: Mistral7B) -> tuple[Tokenizer | None, str]:
    """The tokenizer in the model's folder, or why there is none: ids as prompts can do without."""
    if model.source is None:
        return None, "this model was not opened from a folder that could hold one"
    try:
        return _tokenizer_at(model.source), ""
    except Mistral7BError as e:
        return None, str(e)


@dataclass(frozen=True)
class RequestOptions:
    """What goes with any request.

    Attributes:
        request_id: its name, unique among those that run; none: one is made
        priority: lower comes first
        adapter: the LoRA adapter to use, by name; none: the model as it is
        cache_salt: only requests of one salt share what was computed for their prompts (one a tenant)
        speculation: guess tokens ahead; none: as the engine's configuration says
        gone: set when the client has disconnected: reading the request then ends with AbandonedError
    """

    request_id: str | None = None
    priority: int = 0
    adapter: str | None = None
    cache_salt: str | None = None
    speculation: Speculation | None = None
    gone: threading.Event | None = None


class InputProcessor:
    """Makes requests for one engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, why: str = "") -> None:
        self.engine, self.tokenizer, self.why = engine, tokenizer, why
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()
        pool, scheduler = engine.pool, engine.scheduler
        whole = scheduler.most_pages(engine.model.args.max_seq_len) <= pool.n_pages
        self.space = None if whole else pool.n_pages * pool.page  # tokens, where a context has no room
        if engine.config.speculation is not None:
            engine.config.speculation.check(engine.model.args.vocab_size)

    def text(
        self,
        prompt: Prompt,
        params: SamplingParams,
        asked: RequestOptions,
        sink: Sink | None = None,
        name: str = "the prompt",
    ) -> Request:
        """A request to continue a prompt, which errors call `name`. Raises what says why it cannot be served."""
        return self.request(self._read(prompt, params, name, "prompt"), asked, sink, name)

    def _read(self, prompt: Prompt, params: SamplingParams, name: str, field: str) -> ReadPrompt:
        args = self.engine.model.args
        return read_prompt(args, name, prompt, params, self.tokenizer, self.why, self.space, field)

    def request(
        self,
        read: ReadPrompt,
        asked: RequestOptions,
        sink: Sink | None = None,
        name: str = "the prompt",
        begun: int = 0,
        grammar: GrammarSpec | None = None,
        field: str = "prompt",
    ) -> Request:
        """A request to continue a prompt that was read with this tokenizer.

        It must obey `grammar`, or else its structured_outputs; the last `begun` tokens of the prompt are the
        beginning of what must. Errors call the prompt `name`, and its field in the request `field`.
        """
        speculation = asked.speculation or self.engine.config.speculation
        if speculation is not None:
            speculation.check(self.engine.model.args.vocab_size)
        request = Request(
            asked.request_id or _fresh_id(), read.prompt, read.ids, read.params, read.completions,
            self._key(asked), asked.priority, asked.adapter, speculation, sink=sink, salt=asked.cache_salt,
        )  # fmt: skip
        self._bind(request, name, begun, grammar or GrammarSpec.of(read.params.structured_outputs), asked.gone)
        return self._checked(request, name, field)

    def chat(
        self, messages: Messages, params: SamplingParams, asked: RequestOptions, sink: Sink | None = None,
        tools: Tools = None, tool_choice: ToolChoice = "auto", name: str = "the conversation",
        parallel: bool = True, labels: Sequence[str] | None = None,
    ) -> Request:  # fmt: skip
        """A request to answer a conversation; messages, tools and tool_choice are OpenAI's.

        "required", or a named tool, makes the model call (lark.tool_spec), once where not `parallel`; with
        "none" it is shown no tools. With "auto" structured_outputs apply to the text alone. `labels`: what errors
        call each message, as in Tokenizer.encode_chat.
        """
        if self.tokenizer is None:
            raise GenerationError(
                f"{name}: a conversation needs a tokenizer, and {self.why}",
                field="messages",
                hint="pass tokenizer=...",
            )
        wanted = params.structured_outputs
        if wanted is not None and tool_choice not in FREE:
            raise GenerationError(
                f"{name}: structured_outputs and tool_choice={tool_choice!r} exclude each other",
                field="structured_outputs",
            )
        grammar = GrammarSpec.of(wanted, tools or (), tool_choice, parallel)
        offered = None if tool_choice == "none" else tools
        ids, begun = self.tokenizer.encode_chat_with_prefix(messages, offered, labels)
        begun = begun if wanted is not None else 0
        read = self._read(ids, params, name, "messages")
        request = self.request(read, asked, sink, name, begun, grammar, "messages")
        for c in request.completions if offered else ():
            c.calls = ToolCallStream(self.tokenizer.tool_calls_id, partial(_call_id, c.seed, c.index))
        return request

    def embedding(
        self, prompt: Prompt, pooling: str, asked: RequestOptions, sink: Sink | None = None, name: str = "the text"
    ) -> Request:
        """A request for a prompt's hidden state, "mean" or "last"."""
        if pooling not in POOLINGS:
            raise GenerationError(
                f"pooling is {' or '.join(map(repr, POOLINGS))}, not {pooling!r}", field="pooling"
            )
        params = SamplingParams(max_tokens=1, temperature=0)
        read = self._read(prompt, params, name, "input")
        request = Request(
            asked.request_id or _fresh_id(), read.prompt, read.ids, params, read.completions, self._key(asked),
            asked.priority, asked.adapter, pooling=pooling, sink=sink, salt=asked.cache_salt,
        )  # fmt: skip
        return self._checked(request, name, "input")

    def _key(self, asked: RequestOptions) -> bytes:
        """What tells prefixes apart. AdapterError for an adapter that is not loaded."""
        return first_key(asked.cache_salt, str(self.engine.adapters.loading(asked.adapter)))

    @property
    def grammars(self) -> Grammars:
        """Those of the tokenizer; made when they are first asked for, as they need llguidance and a process."""
        assert self.tokenizer is not None  # as _bind has seen
        with self._lock:
            if self._grammars is None:
                args, config = self.engine.model.args, self.engine.config
                most = max(MOST, KEPT + config.max_sequences)
                self._grammars = Grammars(self.tokenizer, args.vocab_size, config.grammar_limits, most=most)
            return self._grammars

    def warm_up(self) -> None:
        """Start what the first request with a grammar would wait for, in a thread; nothing without llguidance."""

        def start() -> None:
            with contextlib.suppress(GrammarError):  # each request with a grammar will say what is missing
                self.grammars  # noqa: B018

        if self.tokenizer is not None:
            threading.Thread(target=start, name="grammars", daemon=True).start()

    def _bind(
        self, request: Request, name: str, begun: int, grammar: GrammarSpec | None, gone: threading.Event | None
    ) -> None:
        """A grammar state for each completion, if one must be obeyed; it has taken the last `begun` tokens.

        These are a text of their own, whatever precedes them: the space that SentencePiece writes before a text's
        first word is no part of it.
        """
        if grammar is None:
            return
        if self.tokenizer is None:
            raise GenerationError(
                f"{name}: structured_outputs need a tokenizer, and {self.why}", field="structured_outputs"
            )
        at = len(request.ids) - begun
        for s in request.sequences:
            after = () if begun else request.ids
            s.grammar = self.grammars.start(grammar, after, request.ids[at:], request.id, gone)

    def _checked(self, request: Request, name: str, field: str) -> Request:
        try:
            self.engine.scheduler.check(request)
        except EngineError as e:
            raise EngineError.of(e, message=f"{name}: {e.message}", field=e.field or field) from None
        return request


_numbers = itertools.count()


def _call_id(seed: int, completion: int, call: int) -> str:
    return tool_call_id(f"{seed}, {completion}, {call}")


def _fresh_id() -> str:
    return f"{next(_numbers)}-{uuid.uuid4().hex[:12]}"
