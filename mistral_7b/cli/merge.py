"""`mistral-7b merge`: merge a LoRA adapter into a checkpoint, and measure its distance from the adapter."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..kernels import threads
from .inputs import UsageError, read_flags, read_text
from .quantize import ROW, own_source, rows

if TYPE_CHECKING:
    from ..lora.merging import Merge as Record

Base = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="BASE")]
AdapterName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADAPTER")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merge a LoRA adapter into its base model, layer by layer, and measure on a text what rounding changed.

    The output can be used wherever a MODEL is named. It is complete or absent.
    """

    base: Base
    """The adapter's base model: a folder, also one of `quantize`, a file, a hub id or "demo"."""
    adapter: AdapterName
    """The adapter: a folder or file of PEFT, mistral-finetune or llama.cpp, or a hub id."""
    out: Out
    """The output folder; for GGUF, the output file."""
    into: Literal["int8", "q6_k", "q4_k_m", "int4"] | None = None
    """Merge into the base as quantized by this scheme, for an adapter that was trained on it (QLoRA); None: the
    base as it is. The result is stored unquantized."""
    to: Literal["huggingface", "mistral", "gguf"] = "huggingface"
    """Format of the output, as of `convert`."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None
    """GGUF: type of the matrices; None: that of the base."""
    ollama: bool = False
    """GGUF: also write a Modelfile beside the output, for `ollama create NAME -f Modelfile`."""
    max_shard_size: str = "5GB"
    """Maximum file size in Hugging Face's format; Mistral's is one file."""
    text: str = ""
    """Text file to measure the distance on; default: this package's source."""
    tokens: int = 2048
    """Maximum number of tokens of that text."""
    tokenizer: str | None = None
    """A tokenizer file, or a folder or model with one; None: that of the adapter, else of the base."""
    threads: int | None = None
    """CPU threads, at most 4 per CPU; None: PyTorch's default."""


def run(argv: list[str]) -> int:
    args = read_flags(Merge, "merge", argv)
    if args.tokens < 2:
        raise UsageError(f"--tokens must be at least 2, not {args.tokens}", field="--tokens")
    if args.ollama and args.to != "gguf":
        raise UsageError("--ollama needs --to gguf", field="--ollama")
    if args.ollama and (existing := pathlib.Path(args.out).with_name("Modelfile")).exists():
        raise UsageError(f"{existing} exists already", field="--ollama")
    threads.check(args.threads, "--threads")
    name, text = (args.text, read_text(args.text)) if args.text else own_source()
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring the distance", total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        from ..checkpoint import hub, read_args
        from ..lora import merge, read_adapter
        from ..text.tokenizer import Tokenizer

        threads.use(args.threads)
        base = hub.resolve(args.base)
        model_args = read_args(base)[0]
        adapter = read_adapter(args.adapter, model_args)
        tokenizer = Tokenizer.from_pretrained(args.tokenizer or adapter.tokenizer or base)
        tokens = rows(tokenizer, text, args.tokens, min(ROW, model_args.max_seq_len))
        record = merge(
            args.base, adapter, args.out, tokens, name, args.to, into=args.into,
            type=args.type, max_shard_size=args.max_shard_size, progress=advance,
        )  # fmt: skip
    if args.ollama:
        _write_modelfile(pathlib.Path(args.out))
    print(f"{args.base} with {args.adapter} is written to {args.out}: {summary(record)}", file=sys.stderr)
    return 0


def _write_modelfile(gguf: pathlib.Path) -> None:
    """Write the Modelfile of a file that was just written, with the template and the ends of its tokenizer."""
    from ..files import atomic_write
    from ..text.modelfile import modelfile
    from ..text.tokenizer import Tokenizer

    with atomic_write(gguf.with_name("Modelfile")) as temporary:
        temporary.write_text(modelfile(gguf.name, Tokenizer.from_pretrained(gguf)), encoding="utf-8")


def summary(record: Record) -> str:
    """Return one line on a merge and its distance from the adapter at run time, over this base and the other."""
    quantized = (
        f"; {record.dequantized} quantized weights of the base were dequantized" if record.dequantized else ""
    )
    base = f"the base in {record.into}" if record.into else "this base"
    first = (
        f"{record.changed} of {record.weights} adapted weights changed, rounded to {record.dtype}{quantized}. "
        f"On {record.distance['tokens']:,} tokens of {record.distance['text']}, adapter at run time -> merged: "
        f"{_distance(record.distance)}, over {base}"
    )
    if record.unquantized_distance:
        return f"{first}; {_distance(record.unquantized_distance)}, over the unquantized base"
    other = "the unquantized one" if record.into else "a quantized one (QLoRA)"
    hint = "merge into that" if record.into else "name the scheme with --into"
    return f"{first}. If the adapter was trained on the other base, {other}, {hint}"


def _distance(d: dict[str, Any]) -> str:
    return (
        f"KL {d['kl']:.2e}, top-1 agreement {d['top1_agreement']:.1%}, perplexity "
        f"{d['perplexity_original']:.3f} -> {d['perplexity']:.3f}"
    )
