"""LLM: offline inference. Many prompts are computed together, and the outputs returned when all are finished."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import EngineError, GenerationError
from ..kernels.backend import LINEAR, PACKED_LINEAR, PAGED_ATTENTION, Backend, uses
from ..lora.adapters import Source
from ..lora.trainable import TrainableLinear
from ..model import Mistral7B
from ..quantization import Scheme, quantize
from ..quantization.linear import Compressed, PackedLinear
from ..sampling.params import SamplingParams
from ..text.tokenizer import Tokenizer
from .completion import RequestOutput, TextPiece
from .config import EngineConfig
from .engine import Engine
from .inputs import InputProcessor, Messages, RequestOptions, ToolChoice, Tools
from .keywords import CALL_NAMES, LLM_NAMES, OPTIONS, read_fields, unknown_argument
from .memory import pool_for
from .parallel import divide
from .prompts import Prompt, as_prompts, load_tokenizer, params_for
from .request import Request, Sink

LOAD_OPTIONS = ("dtype", "device", "quantization")  # arguments of from_pretrained


class RequestsFailedError(EngineError):
    """Some requests failed. `outputs` has those of all requests, in order, with `error` set where one failed."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        failed = [o for o in outputs if o.error is not None]
        super().__init__(f"{len(failed)} of {len(outputs)} requests failed, the first with: {failed[0].error}")
        self.outputs = outputs


@dataclass
class EmbeddingOutput:
    """The embedding (D,) of a prompt, and the prompt's token ids."""

    embedding: list[float]
    prompt_token_ids: list[int]


def open_engine(
    model: str | os.PathLike[str] | Mistral7B,
    config: EngineConfig | None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None,
    adapters: Mapping[str, Source] | None,
    lengths: Sequence[int] | None = None,
    tensor_parallel: int = 1,
    **load_options: Any,
) -> InputProcessor:
    """Load the model unless it is one already, and return the input processor of a new engine.

    `lengths` of all sequences that the engine will get, if known, bound its memory. `load_options` are those of
    from_pretrained. EngineError for any other, which names the right one if it is vLLM's.
    """
    for name in load_options:
        if name not in LOAD_OPTIONS:
            known = (*LOAD_OPTIONS, "config", "tokenizer", "adapters", "tensor_parallel")
            raise unknown_argument(name, "LLM", known, LLM_NAMES)
    config = config or EngineConfig()
    if not isinstance(model, Mistral7B):
        model = Mistral7B.from_pretrained(model, **{k: v for k, v in load_options.items() if v is not None})
        model.requires_grad_(False)
    elif any(v is not None for v in load_options.values()):
        raise EngineError(
            "dtype, device and quantization apply when a model is loaded, and this one is loaded already",
            field="model",
        )
    divide(model, tensor_parallel, config, adapters)
    if config.deterministic:
        make_deterministic(model)
    tokenizer_error = ""
    if tokenizer is None:
        tokenizer, tokenizer_error = load_tokenizer(model)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_pretrained(tokenizer)
    engine = Engine(model, pool_for(model, config, lengths), config)
    for name, path in (adapters or {}).items():
        engine.adapters.load(name, path)
    return InputProcessor(engine, tokenizer, tokenizer_error)


def make_deterministic(model: Mistral7B) -> None:
    """Make rows independent of the other rows of a step, in place. With bfloat16, integer weights are so.

    EngineError for a device or type for which there are no such products, or on a CPU no such attention.
    """
    floats = any(isinstance(module, nn.Linear) for module in model.modules())
    integers = isinstance(model.output, Compressed) and not floats
    weight = model.norm.weight
    # PyTorch's attention, which other types use, depends on the number of rows.
    attends = weight.device.type != "cpu" or uses(Backend.CPU, PAGED_ATTENTION, weight.new_empty(0))
    fixed = integers or any(uses(Backend.ONEDNN, operation, weight) for operation in (LINEAR, PACKED_LINEAR))
    if not (attends and fixed):
        raise EngineError(
            "deterministic=True needs a float32 or bfloat16 model (its weights may be int8 or int4) on a CPU with "
            f"the compiled kernels, not {str(weight.dtype).removeprefix('torch.')} on {weight.device}",
            field="deterministic",
            hint='take dtype "bfloat16"; `mistral-7b doctor` says whether the kernels compile',
        )
    if integers:
        return
    adapted = [module for module in model.modules() if isinstance(module, TrainableLinear)]
    trained = [p for module in adapted for p in (module.a, module.b) if p.requires_grad]
    quantize(model, Scheme("bf16", deterministic=True))  # which freezes all
    for p in trained:
        p.requires_grad_()
    for module in model.modules():
        if isinstance(module, PackedLinear):  # also those that were packed before
            module.deterministic = True


class LLM:
    """A model and its engine for offline inference, with vLLM's names.

        llm = LLM("demo")
        for output in llm.generate(["def add(", "class "], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    model         a folder, file, hub id, "starter" or "demo", or a loaded Mistral7B
    config        EngineConfig: memory, batch size, queue
    tokenizer     a Tokenizer, or a file, folder or hub id with one; None loads the one in the model's folder.
                  Prompts of token ids need none.
    adapters      LoRA adapters by name, or their folders or files
    dtype, device, quantization    as in Mistral7B.from_pretrained, if the model is not loaded yet
    tensor_parallel   the number of processes that torchrun started, to divide the model among them. Every process
                  makes the same calls, and gets the same outputs: see docs/scale.md

    A prompt's output does not depend on the other prompts that are computed with it: see docs/engine.md.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Mistral7B = "demo",
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        adapters: Mapping[str, Source] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
        tensor_parallel: int = 1,
        **unknown: Any,
    ) -> None:
        self.inputs = open_engine(
            model, config, tokenizer, adapters, tensor_parallel=tensor_parallel,
            dtype=dtype, device=device, quantization=quantization, **unknown,
        )  # fmt: skip
        self.engine = self.inputs.engine

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine.model!r}, {self.engine.config!r})"

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.inputs.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. GenerationError, with the reason, if there is none."""
        if self.inputs.tokenizer is None:
            raise GenerationError(f"no tokenizer: {self.inputs.tokenizer_error}", field="tokenizer")
        return self.inputs.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that give none: SamplingParams() with the model's own defaults."""
        return self.inputs.default_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        asked: RequestOptions | Sequence[RequestOptions] | None = None,
        progress: bool = False,
        on_output: Sink | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Complete one or several prompts, texts or token ids; outputs are in the order of the prompts.

        params     for all prompts, or one for each; None takes get_default_sampling_params(), with 16 tokens
        asked      RequestOptions for all prompts, or one for each
        **fields   fields of SamplingParams by name, instead of `params`, such as max_tokens=3; and fields of
                   RequestOptions, instead of `asked`
        progress   show a progress bar
        on_output  called with a request and its new TextPieces after each step

        An invalid prompt raises its error before any is computed. RequestsFailedError, with all outputs, if
        requests fail later.
        """
        several = as_prompts(prompts)
        each, option_fields = read_fields("LLM.generate", params, fields, self.inputs.default_params)
        every = zip(several, params_for(several, each), _options(asked, option_fields, len(several)), strict=True)
        requests = [
            self.inputs.text(prompt, sampling, options, on_output, f"prompt {i}")
            for i, (prompt, sampling, options) in enumerate(every)
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
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answer one or several conversations, as `generate`. Messages, tools and tool_choice are OpenAI's."""
        several: list[Any] = list(conversations)
        if several and isinstance(several[0], Mapping):
            several = [several]
        each, option_fields = read_fields("LLM.chat", params, fields, self.inputs.default_params)
        every = zip(several, params_for(several, each), _options(asked, option_fields, len(several)), strict=True)
        requests = [
            self.inputs.chat(messages, sampling, options, on_output, tools, tool_choice, f"conversation {i}")
            for i, (messages, sampling, options) in enumerate(every)
        ]
        return self._outputs(requests, progress)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        progress: bool = False,
        **option_fields: Any,
    ) -> list[EmbeddingOutput]:
        """Embed prompts: the mean or the last of each one's final hidden states, of length 1 if `normalize`."""
        for name in option_fields:
            if name not in OPTIONS:
                raise unknown_argument(name, "LLM.embed", OPTIONS, CALL_NAMES)
        several = as_prompts(prompts)
        every = zip(several, _options(None, option_fields, len(several)), strict=True)
        requests = [
            self.inputs.embedding(prompt, pooling, options, name=f"text {i}")
            for i, (prompt, options) in enumerate(every)
        ]
        self._outputs(requests, progress)
        return [EmbeddingOutput(r.embedding(normalize), r.ids) for r in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any) -> Iterator[TextPiece]:
        """Complete one prompt and yield its text in pieces; else as `generate`. The call checks the prompt."""
        sampling, option_fields = read_fields("LLM.stream", params, fields, self.inputs.default_params)
        return follow(self.engine, self.inputs.text(prompt, sampling, RequestOptions(**option_fields)))

    def _outputs(self, requests: list[Request], progress: bool) -> list[RequestOutput]:
        """Compute requests and return their outputs. RequestsFailedError if some failed."""
        with _bar(len(requests), progress) as advance:
            run(self.engine, requests, advance)
        outputs = [request.output() for request in requests]
        if any(o.error is not None for o in outputs):
            raise RequestsFailedError(outputs)
        return outputs


def run(engine: Engine, requests: Sequence[Request], advance: Callable[[int], object] = lambda n: None) -> None:
    """Compute requests until all have ended; `advance` is called with the number that ended in each step.

    An exception, such as KeyboardInterrupt, aborts those that have not ended.
    """
    unqueued = deque(requests)
    try:
        for request in requests:  # only the first unfinished one is checked in each step
            while not request.finished:
                while unqueued and engine.can_queue():
                    engine.add(unqueued.popleft())
                before = engine.counts.ended
                engine.step()
                advance(engine.counts.ended - before)
    finally:
        for request in requests:
            engine.abort_request(request)


def follow(engine: Engine, request: Request) -> Iterator[TextPiece]:
    """Compute a request and yield its pieces. Raises the error of a request that fails.

    Closing the iterator aborts the request.
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


def _options(
    asked: RequestOptions | Sequence[RequestOptions] | None, option_fields: Mapping[str, Any], n: int
) -> list[RequestOptions]:
    """The options of each of n requests."""
    if asked is None:
        asked = RequestOptions(**option_fields)
    elif option_fields:
        raise EngineError("pass `asked`, or its fields by name, not both", field="asked")
    if isinstance(asked, RequestOptions):
        if asked.request_id is not None and n > 1:
            return [replace(asked, request_id=f"{asked.request_id}-{i}") for i in range(n)]
        return [asked] * n
    if len(asked) != n:
        raise EngineError(
            f"{n} prompts with {len(asked)} RequestOptions", field="asked", hint="pass one, or one for each prompt"
        )
    return list(asked)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """A progress bar, as a function that is called with the number of requests that ended."""
    if not shown:
        yield lambda n: None
        return
    from tqdm.auto import tqdm  # a widget in a notebook, else a line on stderr

    with tqdm(total=total, desc="requests") as bar:
        yield bar.update
