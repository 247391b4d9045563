"""`mistral-7b convert`: convert a checkpoint to another format, one tensor at a time."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Literal

import tyro

from .inputs import read_flags

Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IN")]


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint to another format, bit for bit. The output is complete or absent."""

    source: Source
    """A folder, a file, a hub id, "starter" or "demo"."""
    out: Folder
    """The output folder; for GGUF, the output file."""
    to: Literal["huggingface", "mistral", "gguf"]
    """huggingface: config.json and model*.safetensors; mistral: params.json and consolidated.safetensors;
    gguf: one file for llama.cpp, including the tokenizer."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q6_k", "q4_k_m"] | None = None
    """GGUF: type of the matrices; None: unchanged. q8_0 and q4_0 quantize in blocks of 32 values, q6_k and q4_k_m
    (q4_k, with q6_k where it matters most, as llama.cpp does) in blocks of 256."""
    max_shard_size: str = "5GB"
    """Maximum file size in Hugging Face's format; Mistral's is one file."""


def run(argv: list[str]) -> int:
    args = read_flags(Convert, "convert", argv)
    from ..checkpoint import hub

    hub.find(args.source)  # before PyTorch is imported
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ..checkpoint import convert
    from ..kernels import threads

    threads.use()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("opening", total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        convert(
            args.source, args.out, to=args.to, max_shard_size=args.max_shard_size, progress=advance, type=args.type
        )
    print(f"{args.source} is written to {args.out} in {args.to} format", file=sys.stderr)
    return 0
