"""`mistral-7b chat`: a conversation with a model, at a prompt."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

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

ADAPTER = "adapter"  # what the one that is given is called
DEMO = (
    "The bundled model is a small base model of Python code: it goes on with code and was never taught to\n"
    "answer. For a conversation take an instruct model: mistral-7b chat mistralai/Mistral-7B-Instruct-v0.3"
)


@dataclasses.dataclass(frozen=True)
class Chat(TextOptions):
    """Talk with an instruction-tuned model; /help at the prompt lists what can be done there."""

    model: ModelName = "demo"
    """A folder, a hub id or "demo"."""
    system: str = ""
    """Instructions that stand before the conversation."""
    system_file: str = ""
    """The same, from a file."""
    load: str = ""
    """Go on with a conversation that /save has written."""
    plain: bool = False
    """Show answers as they are; otherwise a terminal shows them as rendered markdown."""
    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(temperature=0.7, max_tokens=2048)
    )
    """How tokens are chosen."""


def run(argv: list[str]) -> int:
    args = read_flags(Chat, "chat", argv)
    if args.sampling.n != 1:
        raise UsageError("--n: a chat has one answer at a time", field="--n")
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
    if sys.stdin.isatty():
        notice("/help lists the commands, Ctrl-D leaves.")
    render: Render | None = None
    if sys.stdout.isatty() and not args.plain:
        from .render import as_markdown, as_python

        render = as_python if demo else as_markdown
    repl = Repl(answers(engine_of(model, tokenizer, args), params), conversation, render)
    if sys.stdin.isatty():
        with history():
            repl.loop()
    else:
        repl.loop()
    return 0


def is_demo(model: Mistral7B) -> bool:
    """Whether this is the model that comes with the package."""
    from ..checkpoint.hub import resolve

    return model.source is not None and model.source.resolve() == resolve("demo").resolve()


def engine_of(model: Mistral7B, tokenizer: Tokenizer, args: Chat) -> LLM:
    """An engine for one answer at a time, which keeps what it has computed of the conversation."""
    from ..engine.config import EngineConfig
    from ..engine.llm import LLM

    kv_dtype = None if args.kv == "model" else args.kv
    config = EngineConfig(max_sequences=1, max_batch_tokens=512, kv_dtype=kv_dtype)
    adapters = {ADAPTER: args.adapter} if args.adapter else None
    return LLM(model, config, tokenizer=tokenizer, adapters=adapters)


def answers(llm: LLM, params: SamplingParams) -> Answer:
    """How the model answers a conversation: pieces of text, within what is left of its context."""
    tokenizer, context = llm.tokenizer, llm.engine.model.args.max_seq_len
    assert tokenizer is not None  # the command opens it with the model
    adapter = next(iter(llm.engine.adapters.names), None)

    def answer(messages: list[Message]) -> Iterator[str]:
        ids = tokenizer.encode_chat(messages)
        room = context - len(ids)
        if room < 1:
            raise GenerationError(
                f"the conversation with this question is {len(ids)} tokens and the model holds {context}: "
                "the question is not kept, all else is",
                hint="/save FILE, then /reset",
            )
        limit = min(params.max_tokens or room, room)
        finish = None
        limited = dataclasses.replace(params, max_tokens=limit)
        for piece in llm.stream(ids, limited, adapter=adapter):
            finish = piece.finish_reason
            yield piece.text
        if finish == "length":
            way_on = (
                "the context is full: /save FILE, then /reset" if limit == room else "--max-tokens allows more"
            )
            raise GenerationError(f"(the answer was cut off after {limit} tokens; {way_on})")

    return answer
