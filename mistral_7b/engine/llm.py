"""LLM: all prompts in, all texts out, computed together."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import EngineError
from ..kernels.backend import LINEAR, Backend, uses
from ..model import Mistral7B
from ..quantization import Scheme, quantize
from ..quantization.linear import Compressed
from ..sampling.params import SamplingParams
from ..text.tokenizer import Tokenizer
from .completion import RequestOutput, TextPiece
from .config import EngineConfig
from .engine import Engine
from .inputs import InputProcessor, Messages, RequestOptions, ToolChoice, Tools
from .memory import pool_for
from .prompts import Prompt, as_prompts, load_tokenizer, params_for
from .request import Request, Sink


class RequestsFailedError(EngineError):
    """Some requests did not come to their end. `outputs` has all, in order, with `error` where one failed."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        failed = [o for o in outputs if o.error is not None]
        super().__init__(f"{len(failed)} of {len(outputs)} requests failed, the first with: {failed[0].error}")
        self.outputs = outputs


@dataclass
class EmbeddingOutput:
    """A text's embedding, (D,), and the ids of which it was made."""

    embedding: list[float]
    prompt_token_ids: list[int]


def open_engine(
    model: str | os.PathLike[str] | Mistral7B,
    config: EngineConfig | None,
    tokenizer: Tokenizer | None,
    adapters: Mapping[str, str | os.PathLike[str]] | None,
    lengths: Sequence[int] | None = None,
    **how: Any,
) -> InputProcessor:
    """An engine for a model that is open or to be opened, and the input processor of its requests.

    `lengths` of all sequences that will ever come, where they are known: memory is then no more than these need.
    """
    config = config or EngineConfig()
    if not isinstance(model, Mistral7B):
        model = Mistral7B.from_pretrained(model, **{k: v for k, v in how.items() if v is not None})
        model.requires_grad_(False)
    elif any(v is not None for v in how.values()):
        raise EngineError(
            "dtype, device and quantization are for a model that is yet to be opened, not an open one",
            field="model",
        )
    if config.deterministic:
        _make_deterministic(model)
    why = ""
    if tokenizer is None:
        tokenizer, why = load_tokenizer(model)
    engine = Engine(model, pool_for(model, config, lengths), config)
    for name, path in (adapters or {}).items():
        engine.adapters.load(name, path)
    return InputProcessor(engine, tokenizer, why)


def _make_deterministic(model: Mistral7B) -> None:
    """Let no row depend on the number of others. Weights in whole numbers need nothing for it, on a CPU."""
    if isinstance(model.output, Compressed):
        return
    if not uses(Backend.ONEDNN, LINEAR, model.norm.weight):
        raise EngineError(
            "deterministic=True takes a model in bfloat16, int8 or int4 on a CPU, not one in "
            f"{str(model.norm.weight.dtype).removeprefix('torch.')} on {model.norm.weight.device}",
            field="deterministic",
        )
    quantize(model, Scheme("bf16", deterministic=True))


class LLM:
    """A model that continues many prompts together.

        llm = LLM("demo")
        for output in llm.generate(["def add(", "class "], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    model         a folder, file, hub id or "demo", or a Mistral7B (which is then taken as it is)
    config        EngineConfig: memory, batch and queue
    tokenizer     none takes the one beside the model's files; ids as prompts do without
    adapters      LoRA adapters by name, folders or files of PEFT's or mistral-finetune's making
    dtype, device, quantization    as in Mistral7B.from_pretrained, for a model that is yet to be opened

    What comes out for a prompt does not depend on what it is computed with: see docs/engine.md.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Mistral7B = "demo",
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
    ) -> None:
        self.inputs = open_engine(
            model, config, tokenizer, adapters, dtype=dtype, device=device, quantization=quantization
        )
        self.engine = self.inputs.engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.inputs.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        asked: RequestOptions | Sequence[RequestOptions] | None = None,
        progress: bool = False,
        on_output: Sink | None = None,
        **each: Any,
    ) -> list[RequestOutput]:
        """Continue one or many prompts, texts or token ids; outputs in the order of the prompts.

        params      for all prompts, or one for each; none is SamplingParams(), which is 16 tokens
        **each      request_id, priority, adapter, cache_salt, speculation: RequestOptions; or `asked`, a list
        progress    draw a bar
        on_output   called with a request and its new TextPieces after each step

        Raises what is wrong with a prompt before any is computed, and RequestsFailedError, which has all outputs,
        if some did not come to their end.
        """
        several = as_prompts(prompts)
        every = zip(several, params_for(several, params), _asked(asked, each, len(several)), strict=True)
        requests = [
            self.inputs.text(prompt, sp, a, on_output, f"prompt {i}") for i, (prompt, sp, a) in enumerate(every)
        ]
        return self._outputs(requests, progress)

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Tools = None,
        tool_choice: ToolChoice = "auto",
        asked: RequestOptions | Sequence[RequestOptions] | None = None,
        progress: bool = False,
        on_output: Sink | None = None,
        **each: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, else as `generate`. Messages, tools and tool_choice are OpenAI's."""
        several: list[Any] = list(conversations)
        if several and isinstance(several[0], Mapping):
            several = [several]
        every = zip(several, params_for(several, params), _asked(asked, each, len(several)), strict=True)
        requests = [
            self.inputs.chat(messages, sp, a, on_output, tools, tool_choice, f"conversation {i}")
            for i, (messages, sp, a) in enumerate(every)
        ]
        return self._outputs(requests, progress)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        progress: bool = False,
        **each: Any,
    ) -> list[EmbeddingOutput]:
        """The texts' "mean" or "last" final hidden state, of length 1 if `normalize`."""
        several = as_prompts(prompts)
        every = zip(several, _asked(None, each, len(several)), strict=True)
        requests = [self.inputs.embedding(p, pooling, a, name=f"text {i}") for i, (p, a) in enumerate(every)]
        self._outputs(requests, progress)
        return [EmbeddingOutput(r.embedding(normalize), r.ids) for r in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **each: Any) -> Iterator[TextPiece]:
        """Continue one prompt, giving out text as it comes; else as `generate`. Errors are raised by the call."""
        return follow(self.engine, self.inputs.text(prompt, params or SamplingParams(), RequestOptions(**each)))

    def _outputs(self, requests: list[Request], progress: bool) -> list[RequestOutput]:
        """Compute until all have ended. Whatever interrupts it, nothing of them stays behind."""
        with _bar(len(requests), progress) as advance:
            run(self.engine, requests, advance)
        outputs = [request.output() for request in requests]
        if any(o.error is not None for o in outputs):
            raise RequestsFailedError(outputs)
        return outputs


def run(engine: Engine, requests: Sequence[Request], advance: Callable[[int], object] = lambda n: None) -> None:
    """Compute requests until all have ended, well or not; `advance` is told how many more have.

    Whatever interrupts it, none of them stays behind.
    """
    to_come = deque(requests)
    try:
        for request in requests:  # those behind the first that has not ended are not looked at in every step
            while not request.finished:
                while to_come and engine.can_queue:
                    engine.add(to_come.popleft())
                before = engine.counts.ended
                engine.step()
                advance(engine.counts.ended - before)
    finally:
        for request in requests:
            engine.abort_request(request)


def follow(engine: Engine, request: Request) -> Iterator[TextPiece]:
    """Compute a request and give out its pieces as they come. Raises what it ends with, if not well.

    Leaving the loop, or closing the iterator, ends the request.
    """
    pieces: deque[TextPiece] = deque()
    request.sink = lambda _, new: pieces.extend(new)
    engine.add(request)
    try:
        while pieces or not request.finished:
            if not pieces:
                engine.step()
            while pieces:
                yield pieces.popleft()
        if request.error is not None:
            raise request.error
    finally:
        engine.abort_request(request)


def _asked(
    asked: RequestOptions | Sequence[RequestOptions] | None, each: Mapping[str, Any], n: int
) -> list[RequestOptions]:
    """What goes with each of n requests."""
    if asked is None:
        asked = RequestOptions(**each)
    elif each:
        raise EngineError("give `asked`, or its fields by name, not both", field="asked")
    if isinstance(asked, RequestOptions):
        if asked.request_id is not None and n > 1:
            return [replace(asked, request_id=f"{asked.request_id}-{i}") for i in range(n)]
        return [asked] * n
    if len(asked) != n:
        raise EngineError(
            f"{n} prompts with {len(asked)} of `asked`", field="asked", hint="give one, or one for each"
        )
    return list(asked)


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Any]:
    """A progress bar that is told how many more have ended."""
    if not wanted:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda n: bar.advance(task, n)
