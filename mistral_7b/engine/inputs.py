"""From prompts, conversations and parameters to requests. Invalid input is refused here, before it is queued."""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import EngineError, GenerationError, GrammarError, InterpretError, PromptTooLongError
from ..sampling.params import SamplingParams
from ..text.messages import tool_call_id
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import ToolCallStream
from .completion import Completion
from .engine import Engine
from .grammar.client import MAX_IDLE, MAX_PROCESSES, Grammars
from .grammar.spec import OPTIONAL_CHOICES, GrammarSpec
from .pages import first_key
from .parallel import check_same
from .prompts import Prompt, TokenizedPrompt, check_ids, defaults_of, ends_of, tokenize_prompt
from .request import Request, Salt, Sink
from .speculation import Speculation
from .watching import Name, Steering, Watching, watching_of

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
ToolChoice = str | Mapping[str, Any]
POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class RequestOptions:
    """Options of a request besides its prompt and sampling parameters.

    Attributes:
        request_id: its id, unique among unfinished requests; None makes one
        priority: lower is served first
        adapter: name of the LoRA adapter to use; None for the model alone
        cache_salt: only requests with equal salts share cached prefixes (one for each tenant)
        speculation: settings of speculative decoding; None takes those of the engine's configuration
        client: name of the client, such as an API key's; clients share the engine equally
        record: activations to record, by point (activations/points.py) or (point, layer): RequestOutput.recorded
        steer: vectors to add to its residual stream
        disconnected: set when the client has disconnected; compiling its grammar then raises AbandonedError
    """

    request_id: str | None = None
    priority: int = 0
    adapter: str | None = None
    cache_salt: str | None = None
    speculation: Speculation | None = None
    client: str = ""
    record: Name | Sequence[Name] | None = None
    steer: Steering | Sequence[Steering] | None = None
    disconnected: threading.Event | None = None


class InputProcessor:
    """Makes and checks the requests of one engine. `tokenizer_error` says why there is no tokenizer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, tokenizer_error: str = "") -> None:
        self.engine, self.tokenizer, self.tokenizer_error = engine, tokenizer, tokenizer_error
        self.ends = ends_of(engine.model, tokenizer)
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()
        pool, scheduler = engine.pool, engine.scheduler
        fits = scheduler.most_pages(engine.model.args.max_seq_len) <= pool.n_pages
        self.kv_capacity = None if fits else pool.n_pages * pool.page  # tokens, if less than a context
        self.model_defaults = defaults_of(engine.model)  # fields of SamplingParams
        self.default_params = SamplingParams(**self.model_defaults)
        if engine.config.speculation is not None:
            engine.config.speculation.check(engine.model.args.vocab_size)

    def text(
        self,
        prompt: Prompt,
        params: SamplingParams,
        options: RequestOptions,
        sink: Sink | None = None,
        name: str = "the prompt",
    ) -> Request:
        """A request to complete a prompt, which errors call `name`. Mistral7BError if it cannot be served."""
        return self.request(self._tokenize(prompt, params, name, "prompt"), options, sink, name)

    def _tokenize(self, prompt: Prompt, params: SamplingParams, name: str, field: str) -> TokenizedPrompt:
        args = self.engine.model.args
        return tokenize_prompt(
            args, name, prompt, params, self.tokenizer, self.tokenizer_error, self.kv_capacity, field, self.ends
        )

    def request(
        self,
        prompt: TokenizedPrompt,
        options: RequestOptions,
        sink: Sink | None = None,
        name: str = "the prompt",
        prefix: int = 0,
        grammar: GrammarSpec | None = None,
        field: str = "prompt",
    ) -> Request:
        """A request to complete a prompt that was tokenized with this tokenizer.

        `grammar`, or else the parameters' structured_outputs, constrains the text. The constrained text includes
        the last `prefix` tokens of the prompt, the start of the answer. `name` and `field`: see tokenize_prompt.
        """
        speculation = options.speculation or self.engine.config.speculation
        if speculation is not None:
            check_same("speculation")
            speculation.check(self.engine.model.args.vocab_size)
        watching = watching_of(options.record, options.steer, self.engine.model.args, len(prompt.completions))
        salt = salt_of(options.cache_salt, watching)
        request = Request(
            options.request_id or _new_id(), prompt.prompt, prompt.ids, prompt.params, prompt.completions,
            self._key(salt, options.adapter), options.priority, options.adapter, options.client, speculation,
            watching, sink=sink, salt=salt, prefix=prefix,
            grammar=grammar or GrammarSpec.of(prompt.params.structured_outputs),
        )  # fmt: skip
        if request.grammar is not None:
            check_same("structured_outputs")
        self._start_grammars(request, name, options.disconnected)
        return self._checked(request, name, field)

    def chat(
        self, messages: Messages, params: SamplingParams, options: RequestOptions, sink: Sink | None = None,
        tools: Tools = None, tool_choice: ToolChoice = "auto", name: str = "the conversation",
        parallel: bool = True, labels: Sequence[str] | None = None,
    ) -> Request:  # fmt: skip
        """A request to answer a conversation; messages, tools and tool_choice are OpenAI's.

        With tool_choice "required" or a named tool, a grammar forces calls (lark.tool_spec): one unless
        `parallel`. With "none" the prompt contains no tools; with "auto" structured_outputs constrain only text.
        `labels` are the names of the messages in errors, as in Tokenizer.encode_chat.
        """
        if self.tokenizer is None:
            raise GenerationError(
                f"{name}: a conversation needs a tokenizer, and {self.tokenizer_error}",
                field="messages",
                hint="pass tokenizer=...",
            )
        structured = params.structured_outputs
        if structured is not None and tool_choice not in OPTIONAL_CHOICES:
            raise GenerationError(
                f"{name}: structured_outputs and tool_choice={tool_choice!r} exclude each other",
                field="structured_outputs",
            )
        grammar = GrammarSpec.of(structured, tools or (), tool_choice, parallel, self.tokenizer.tool_syntax)
        offered = None if tool_choice == "none" else tools
        ids, prefix = self.tokenizer.encode_chat_with_prefix(messages, offered, labels)
        if structured is None:
            prefix = 0
        elif prefix is None:
            raise GenerationError(
                f"{name}: structured_outputs cannot constrain this answer, which begins within a token",
                field="structured_outputs",
            )
        prompt = self._tokenize(ids, params, name, "messages")
        request = self.request(prompt, options, sink, name, prefix, grammar, "messages")
        if offered:
            self.parse_calls(request)
        return request

    def parse_calls(self, request: Request) -> None:
        """Separate the tool calls of a new request's completions from their text."""
        assert self.tokenizer is not None, "tools are offered by a tokenizer"
        for c in request.completions:
            c.calls = ToolCallStream(self.tokenizer.tool_syntax, partial(_call_id, c.seed, c.index))

    def embedding(
        self,
        prompt: Prompt,
        pooling: str,
        options: RequestOptions,
        sink: Sink | None = None,
        name: str = "the text",
    ) -> Request:
        """A request for a prompt's embedding; `pooling` is "mean" or "last"."""
        if pooling not in POOLINGS:
            raise GenerationError(
                f"pooling must be {' or '.join(map(repr, POOLINGS))}, not {pooling!r}", field="pooling"
            )
        if options.record:
            raise InterpretError("an embedding's request does not record", field="record", hint="use generate")
        params = SamplingParams(max_tokens=1, temperature=0)
        tokenized = self._tokenize(prompt, params, name, "input")
        watching = watching_of(None, options.steer, self.engine.model.args, 1)
        salt = salt_of(options.cache_salt, watching)
        request = Request(
            options.request_id or _new_id(), tokenized.prompt, tokenized.ids, params, tokenized.completions,
            self._key(salt, options.adapter), options.priority, options.adapter, options.client,
            watching=watching, pooling=pooling, sink=sink, salt=salt,
        )  # fmt: skip
        return self._checked(request, name, "input")

    def scoring(
        self, ids: Sequence[int], start: int, options: RequestOptions, name: str = "the prompt",
        alternatives: Sequence[int] = (),
    ) -> Request:  # fmt: skip
        """A request for the scores of ids[start:], each given all before it; nothing is sampled.

        Those of `alternatives`, ids in the place of the last one, come after them.
        The last id is not computed, so `ids` may have one token more than a context. GenerationError if `start`
        leaves nothing before the first scored token, or nothing to score.
        """
        if not 0 < start < len(ids):
            raise GenerationError(
                f"{name}: of {len(ids)} tokens, those from index {start} on cannot be scored",
                field="start",
            )
        args, fed = self.engine.model.args, list(ids[:-1])
        check_ids(args, name, [*ids, *alternatives], "ids")
        if len(fed) > args.max_seq_len and args.sliding_window is None:
            raise PromptTooLongError(
                f"{name} has {len(fed)} tokens before its last one, and the context is {args.max_seq_len}",
                field="ids",
                hint="shorten it",
            ).counted(args.max_seq_len, len(fed))
        params = SamplingParams(max_tokens=1, temperature=0)
        request = Request(
            options.request_id or _new_id(), None, fed, params,
            [Completion(fed, params, 1, seed=0, ends=self.ends)], self._key(options.cache_salt, options.adapter),
            options.priority, options.adapter, options.client, pooling="score", targets=list(ids[start:]),
            alternatives=alternatives, salt=options.cache_salt,
        )  # fmt: skip
        return self._checked(request, name, "ids")

    def _key(self, salt: Salt, adapter: str | None) -> bytes:
        """The root of a request's prefix-cache keys. AdapterError for an adapter that is not loaded."""
        return first_key(salt, str(self.engine.adapters.loading(adapter)))

    @property
    def grammars(self) -> Grammars:
        """The grammars of the tokenizer, created on first use because they need llguidance and a process."""
        assert self.tokenizer is not None  # checked by _start_grammars
        with self._lock:
            if self._grammars is None:
                args, config = self.engine.model.args, self.engine.config
                most = max(MAX_PROCESSES, MAX_IDLE + config.max_sequences)
                self._grammars = Grammars(
                    self.tokenizer, args.vocab_size, config.grammar_limits, max_processes=most, ends=self.ends
                )
            return self._grammars

    def warm_up(self) -> None:
        """Create the grammars in a thread, so that the first request need not wait; nothing without llguidance."""

        def start() -> None:
            with contextlib.suppress(GrammarError):  # raised again by each request with a grammar
                self.grammars  # noqa: B018

        if self.tokenizer is not None:
            threading.Thread(target=start, name="grammars", daemon=True).start()

    def _start_grammars(self, request: Request, name: str, disconnected: threading.Event | None) -> None:
        """Give each completion a grammar state that has accepted the last `prefix` prompt tokens, if constrained.

        These tokens count as a text of their own, without the space that SentencePiece adds before its first word.
        """
        grammar, prefix = request.grammar, request.prefix
        if grammar is None:
            return
        if self.tokenizer is None:
            raise GenerationError(
                f"{name}: structured_outputs need a tokenizer, and {self.tokenizer_error}",
                field="structured_outputs",
            )
        start = len(request.ids) - prefix
        for s in request.sequences:
            before = () if prefix else request.ids
            s.grammar = self.grammars.start(grammar, before, request.ids[start:], request.id, disconnected)

    def _checked(self, request: Request, name: str, field: str) -> Request:
        """Return the request. EngineError, naming the prompt, if it could never be scheduled."""
        try:
            self.engine.scheduler.check(request)
        except EngineError as e:
            raise EngineError.of(e, message=f"{name}: {e.message}", field=e.field or field) from None
        return request


def salt_of(cache_salt: str | None, watching: Watching | None) -> Salt:
    """What separates its cached prefixes from others: a steered request shares with equally steered ones only."""
    return cache_salt if watching is None or watching.key is None else (cache_salt, watching.key)


_request_numbers = itertools.count()


def _call_id(seed: int, completion: int, call: int) -> str:
    return tool_call_id(f"{seed}, {completion}, {call}")


def _new_id() -> str:
    return f"{next(_request_numbers)}-{uuid.uuid4().hex[:12]}"
