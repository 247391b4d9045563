"""`mistral-7b chat`: chat with a model on the terminal."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import tyro

from ..errors import GenerationError
from ..sampling.params import SamplingParams
from .conversation import Conversation, Message
from .generate import Generation
from .inputs import ModelName, TextOptions, UsageError, read_flags, read_text, sampling_of

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..lora.files import Adapter
    from ..model import Mistral7B
    from ..text.tokenizer import Tokenizer
    from .render import Render

ADAPTER = "adapter"  # the name of --adapter in the engine
DEMO = (
    "The bundled model is a small base model of Python code: it continues code and is not instruction-tuned.\n"
    "For a conversation use an instruct model: mistral-7b chat mistralai/Mistral-7B-Instruct-v0.3"
)


class CutOffError(GenerationError):
    """An answer reached its token limit."""


@dataclasses.dataclass(frozen=True)
class Chat(TextOptions):
    """Chat with an instruction-tuned model, or answer one message; /help at the prompt lists the commands."""

    model: ModelName = "demo"
    """A folder, a hub id, "starter" or "demo"."""
    message: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[MESSAGE]")] = ""
    """Answer this message and exit."""
    system: str = ""
    """System prompt."""
    system_file: str = ""
    """File with the system prompt."""
    load: str = ""
    """Continue a conversation saved with /save."""
    plain: bool = False
    """Show the raw text of answers; by default a terminal shows them as rendered Markdown."""
    verbose: bool = False
    """Print the number of tokens of each answer, and tokens per second, to stderr."""
    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(temperature=0.7, max_tokens=2048)
    )
    """Sampling parameters. Without a flag, the model's own default (generation_config.json) precedes these."""


def run(argv: list[str], command: str = "chat") -> int:
    args = read_flags(Chat, command, argv)
    if args.sampling.n != 1:
        raise UsageError("--n must be 1: a chat has one answer per message", field="--n")
    params = args.constrained(args.sampling)
    conversation = Conversation.load(args.load) if args.load else Conversation()
    if args.system_file:
        conversation.system = read_text(args.system_file).strip()
    conversation.system = args.system or conversation.system
    model, tokenizer, adapter = args.open_adapted(args.model, args.adapter)
    sampling = sampling_of(args, command, argv, model)
    params = dataclasses.replace(sampling, structured_outputs=params.structured_outputs)

    from .repl import Repl, history, notice

    demo = is_demo(model)
    if demo:
        notice(DEMO)
    if sys.stdin.isatty() and not args.message:
        notice("/help lists the commands, Ctrl-D exits.")
    render: Render | None = None
    if sys.stdout.isatty() and not args.plain:
        from .render import as_markdown, as_python

        render = as_python if demo else as_markdown
    answers = Answers(engine_of(model, tokenizer, args, adapter), params)
    repl = Repl(answers, conversation, render, answers.statistics if args.verbose else None)
    if args.message:
        try:
            repl.ask(args.message)
        except CutOffError as e:
            notice(str(e))
    elif sys.stdin.isatty():
        with history():
            repl.loop()
    else:
        repl.loop()
    return 0


def is_demo(model: Mistral7B) -> bool:
    """Return whether this is the bundled model."""
    from ..checkpoint.hub import resolve

    return model.source is not None and model.source.resolve() == resolve("demo").resolve()


def engine_of(model: Mistral7B, tokenizer: Tokenizer, args: Chat, adapter: Adapter | None = None) -> LLM:
    """Return an engine for one sequence, whose prefix cache keeps the conversation."""
    from ..engine.config import EngineConfig
    from ..engine.llm import LLM

    kv_dtype = None if args.kv == "model" else args.kv
    config = EngineConfig(max_sequences=1, max_batch_tokens=512, kv_dtype=kv_dtype)
    adapters = {ADAPTER: adapter} if adapter else None
    return LLM(model, config, tokenizer=tokenizer, adapters=adapters)


class Answers:
    """Streams answers, each limited to the rest of the context, and keeps the statistics of the last."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self.llm, self.params, self.context = llm, params, llm.engine.model.args.max_seq_len
        self.adapter = next(iter(llm.engine.adapters.names), None)
        self.latest = Generation(1, 0, live=False)

    def __call__(self, messages: list[Message]) -> Iterator[str]:
        """Yield an answer in pieces.

        GenerationError if the conversation does not fit, or if the answer reaches its token limit.
        """
        ids = self.llm.get_tokenizer().encode_chat(messages)
        remaining = self.context - len(ids)
        if remaining < 1:
            raise GenerationError(
                f"the conversation with this message has {len(ids)} tokens, more than the context of "
                f"{self.context}: the message is not added",
                hint="/save FILE, then /reset",
            )
        limit = min(self.params.max_tokens or remaining, remaining)
        finish = None
        self.latest = Generation(1, len(ids), live=False)
        limited = dataclasses.replace(self.params, max_tokens=limit)
        for piece in self.llm.stream(ids, limited, adapter=self.adapter):
            finish = piece.finish_reason
            self.latest.count(len(piece.token_ids))
            yield piece.text
        if finish == "length":
            full = limit == remaining
            hint = "the context is full: /save FILE, then /reset" if full else "--max-tokens sets this limit"
            raise CutOffError(f"(the answer was cut off after {limit} tokens; {hint})")

    def statistics(self) -> str:
        """The tokens and times of the last answer, in words."""
        return self.latest.summary()
