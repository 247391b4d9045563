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
from .inputs import ModelName, TextOptions, UsageError, read_flags, read_text

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..model import Mistral7B
    from ..text.tokenizer import Tokenizer
    from .render import Render
    from .repl import Answer

ADAPTER = "adapter"  # the name of --adapter in the engine
DEMO = (
    "The bundled model is a small base model of Python code: it continues code and is not instruction-tuned.\n"
    "For a conversation use an instruct model: mistral-7b chat mistralai/Mistral-7B-Instruct-v0.3"
)


@dataclasses.dataclass(frozen=True)
class Chat(TextOptions):
    """Chat with an instruction-tuned model, or answer one message; /help at the prompt lists the commands."""

    model: ModelName = "demo"
    """A folder, a file, a hub id or "demo"."""
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
    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(temperature=0.7, max_tokens=2048)
    )
    """Sampling parameters."""


def run(argv: list[str], command: str = "chat") -> int:
    args = read_flags(Chat, command, argv)
    if args.sampling.n != 1:
        raise UsageError("--n must be 1: a chat has one answer per message", field="--n")
    params = args.constrained(args.sampling)
    conversation = Conversation.load(args.load) if args.load else Conversation()
    if args.system_file:
        conversation.system = read_text(args.system_file).strip()
    conversation.system = args.system or conversation.system
    model, tokenizer = args.open(args.model)

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
    repl = Repl(answers(engine_of(model, tokenizer, args), params), conversation, render)
    if args.message:
        repl.ask(args.message)
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


def engine_of(model: Mistral7B, tokenizer: Tokenizer, args: Chat) -> LLM:
    """Return an engine for one sequence, whose prefix cache keeps the conversation."""
    from ..engine.config import EngineConfig
    from ..engine.llm import LLM

    kv_dtype = None if args.kv == "model" else args.kv
    config = EngineConfig(max_sequences=1, max_batch_tokens=512, kv_dtype=kv_dtype)
    adapters = {ADAPTER: args.adapter} if args.adapter else None
    return LLM(model, config, tokenizer=tokenizer, adapters=adapters)


def answers(llm: LLM, params: SamplingParams) -> Answer:
    """Return a function that streams the model's answer, limited to the rest of the context.

    GenerationError if the conversation does not fit, or if the answer reaches its token limit.
    """
    tokenizer, context = llm.tokenizer, llm.engine.model.args.max_seq_len
    assert tokenizer is not None  # the command opens it with the model
    adapter = next(iter(llm.engine.adapters.names), None)

    def answer(messages: list[Message]) -> Iterator[str]:
        ids = tokenizer.encode_chat(messages)
        remaining = context - len(ids)
        if remaining < 1:
            raise GenerationError(
                f"the conversation with this message has {len(ids)} tokens, more than the context of {context}: "
                "the message is not added",
                hint="/save FILE, then /reset",
            )
        limit = min(params.max_tokens or remaining, remaining)
        finish = None
        limited = dataclasses.replace(params, max_tokens=limit)
        for piece in llm.stream(ids, limited, adapter=adapter):
            finish = piece.finish_reason
            yield piece.text
        if finish == "length":
            full = limit == remaining
            hint = "the context is full: /save FILE, then /reset" if full else "--max-tokens sets this limit"
            raise GenerationError(f"(the answer was cut off after {limit} tokens; {hint})")

    return answer
