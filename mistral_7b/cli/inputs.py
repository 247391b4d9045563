"""Shared by the commands: flags from dataclasses, loading a model, reading text files."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import tyro

from ..distributed import ranks
from ..errors import ConfigError, TokenizerError, first_line
from ..kernels import threads
from ..sampling.params import SamplingParams, StructuredOutputs
from .flags import UsageError as UsageError
from .flags import read_flags as read_flags

if TYPE_CHECKING:
    import torch

    from ..lora.files import Adapter
    from ..model import Mistral7B
    from ..text.tokenizer import Tokenizer

ModelName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[MODEL]")]
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
DType = Literal["bfloat16", "float16", "float32"]


class Samples(Protocol):
    """The options of a command that samples."""

    @property
    def sampling(self) -> SamplingParams: ...


def sampling_of(args: Samples, command: str, argv: list[str], model: Mistral7B) -> SamplingParams:
    """The sampling parameters of the flags, with the model's own defaults for those that were not given.

    The flags are read again, because the model is known only from them.
    """
    from ..engine.prompts import defaults_of

    if not (defaults := defaults_of(model)):
        return args.sampling
    usual: Any = type(args)()
    sampling = dataclasses.replace(usual.sampling, **defaults)
    return read_flags(type(args), command, argv, dataclasses.replace(usual, sampling=sampling)).sampling


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded and where it runs."""

    dtype: DType = "bfloat16"
    """Type of weights and computation."""
    quantization: Literal["int8", "q6_k", "q4_k_m", "int4", "bf16", "fp8"] | None = None
    """Quantize the weights during loading; bf16: unquantized, packed for the CPU's matrix unit;
    fp8: GPUs from Ada on. None: as stored."""
    mmap: bool = True
    """Memory-map quantized weights; --no-mmap copies them: slower to load, then faster to read."""
    kv: Literal["model", "int8"] = "model"
    """KV cache type: the model's own, or int8 (about half the memory of bfloat16)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps...; auto: the first accelerator, else cpu."""
    threads: int | None = None
    """CPU threads, at most 4 per CPU; None: PyTorch's default, within the CPU quota."""
    tokenizer: str | None = None
    """A tokenizer file, or a folder or model with one; None: that of the model."""
    chat_template: Annotated[str | None, tyro.conf.arg(metavar="FILE|NAME")] = None
    """How conversations become text: a Jinja file, or a name like chatml or mistral-v3; None: the model's own."""
    stop_tokens: Annotated[Repeated, tyro.conf.arg(name="stop-token", metavar="TEXT|ID")] = ()
    """A token that ends generation, by spelling or id, besides those that the model's files name."""

    def __post_init__(self) -> None:
        threads.check(self.threads, "--threads")

    @property
    def kv_dtype(self) -> torch.dtype | None:
        """The `kv_dtype` of `generate` and `stream`; None: the model's type."""
        import torch

        return torch.int8 if self.kv == "int8" else None

    def open(self, source: str) -> tuple[Mistral7B, Tokenizer]:
        """Load the model `source` and its tokenizer."""
        return self.open_adapted(source, None)[:2]

    def open_adapted(self, source: str, adapter: str | None) -> tuple[Mistral7B, Tokenizer, Adapter | None]:
        """Load the model `source` with an adapter, and the tokenizer: the adapter's if it has one.

        What the adapter has beyond plain LoRA is applied to the model; the rest is returned, for the engine.
        """
        self.check_paths(source)
        with busy(f"opening {source}"):
            import torch

            from ..checkpoint import hub
            from ..engine.parallel import check_alone
            from ..kernels.cpu import compiler
            from ..lora import apply, read_adapter

            torch.seed()  # random by default; --seed makes a run reproducible
            threads.use(self.threads)
            path = hub.resolve_adapter(adapter) if adapter else None
            model, rest, words = self._load(source), None, None
            if model.norm.weight.device.type == "cpu":
                compiler.library()  # here, where it takes none of the time of the tokens
            if path:
                check_alone("adapters")
                found = read_adapter(path, model.args)
                words = found.tokenizer
                model, rest = apply(model, found)
            tokenizer = self.open_tokenizer(model, source, words)
        return model, tokenizer, rest

    def open_tokenizer(self, model: Mistral7B, source: str, words: str | pathlib.Path | None = None) -> Tokenizer:
        """Open the tokenizer of the model `source`; `words`: that of an adapter."""
        from ..text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_pretrained(
            self.tokenizer or words or model.source or source, self.chat_template
        )
        if tokenizer.vocab_size > model.args.vocab_size:
            raise TokenizerError(
                f"{tokenizer.vocab_size} tokens, but the vocabulary of the model {source} has "
                f"{model.args.vocab_size}: the tokenizer belongs to another model",
                place=tokenizer.path,
            )
        if self.stop_tokens:
            tokenizer = tokenizer.stopping_at(self._stops(model))
        return tokenizer

    def _stops(self, model: Mistral7B) -> list[int | str]:
        """Return --stop-token: digits are an id. UsageError for an id that the model does not have."""
        stops = [int(token) if token.isdecimal() else token for token in self.stop_tokens]
        size = model.args.vocab_size
        for token in stops:
            if isinstance(token, int) and token >= size:
                raise UsageError(f"--stop-token {token}: the vocabulary has {size} tokens", field="--stop-token")
        return stops

    def check_paths(self, source: str) -> None:
        """CheckpointError for a model or tokenizer that is nowhere, before PyTorch is imported."""
        from ..checkpoint import hub

        for name in filter(None, (source, self.tokenizer)):
            hub.find(name)

    def open_model(self, source: str) -> Mistral7B:
        """Load another model with the same type and device."""
        with busy(f"opening {source}"):
            return self._load(source)

    def _load(self, source: str) -> Mistral7B:
        import torch

        from ..model import Mistral7B

        device = pick_device(self.device)
        dtype = getattr(torch, self.dtype)
        model = Mistral7B.from_pretrained(
            source, dtype=dtype, device=device, quantization=self.quantization, mmap=self.mmap
        )
        if ranks.size() > 1:
            from ..distributed.tensor_parallel import parallelize

            parallelize(model, "--tensor-parallel" if ranks.leads() else "--nproc-per-node")
        return model


@dataclasses.dataclass(frozen=True)
class TextOptions(ModelOptions):
    """How the model runs, and constraints on its text."""

    adapter: str | None = None
    """A LoRA adapter of the model: a folder or file of PEFT, mistral-finetune or llama.cpp, or a hub id."""
    schema: str = ""
    """File with a JSON schema that the text must match. Only one of --schema, --regex, --choice and --grammar
    may be used."""
    regex: str = ""
    """Regular expression that the whole text must match."""
    choice: tuple[str, ...] = ()
    """The text must be one of these."""
    grammar: str = ""
    """File with a context-free grammar that the text must match, in the syntax of Lark or of llama.cpp's GBNF."""

    def check_paths(self, source: str) -> None:
        super().check_paths(source)
        if self.adapter:
            from ..checkpoint import hub

            hub.find_adapter(self.adapter)

    def constrained(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters with the constraint of the flags. SamplingError for several or an invalid one."""
        constraints = {
            "json": read_text(self.schema) if self.schema else None, "regex": self.regex or None,
            "choice": self.choice or None, "grammar": read_text(self.grammar) if self.grammar else None,
        }  # fmt: skip
        if not any(constraints.values()):
            return params
        structured = StructuredOutputs(**constraints)  # type: ignore[arg-type]
        return dataclasses.replace(params, structured_outputs=structured)


def pick_device(name: str) -> torch.device:
    """Return the torch device of this name. ConfigError if it is not available."""
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {first_line(error)}", field="--device") from error
    return device


@contextlib.contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on a terminal's stderr; yield a function that changes its text."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda what: status.update(what)


def read_text(path: str) -> str:
    """Read a UTF-8 file, or standard input for "-"."""
    try:
        if path == "-":
            return sys.stdin.read()
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start})") from error
