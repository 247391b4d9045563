"""`mistral-7b bench`: speed, memory and quality, compared with hardware limits and other engines."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..kernels import threads
from .bench_quality import QualityOptions
from .bench_quality import check as check_quality
from .bench_serving import ServingOptions
from .bench_serving import check as check_serving
from .inputs import ModelName, UsageError, read_flags

if TYPE_CHECKING:
    from ..bench.run import Plan

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {},
    "tiny": {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2,
             "vocab_size": 256},
}  # fmt: skip
SCHEMES = ("int4", "q4_k_m", "q6_k", "int8", "bf16", "none")  # of measurements of speed
Schemes = Annotated[tuple[str, ...], tyro.conf.arg(metavar="SCHEME ...")]
What = Literal["decode", "prefill", "batch16", "load"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed and memory, or with --quality the loss by quantization, compared with other engines."""

    model: ModelName = ""
    """A folder, a file, a hub id, "starter" (the default of --quality) or "demo" (otherwise); not with --shape."""
    shape: Literal["7b", "tiny"] | None = None
    """Use random weights of this shape, created in memory: speed does not depend on their values."""
    layers: int | None = None
    """With --shape: number of layers, to save memory."""
    adapter: str | None = None
    """Measure this package with a LoRA adapter (a folder, a file or a hub id) in every row; not with --peers or
    --serving."""
    scheme: Schemes = ()
    """Quantization of the weights: int4, q4_k_m, q6_k, int8, bf16; none: unquantized, with PyTorch's operators.
    Default: int4, int8 and bf16, or the scheme of a quantized folder."""
    what: tuple[What, ...] = ("decode", "prefill", "batch16", "load")
    """decode: one row, one token per step; prefill: a prompt; batch16: 16 rows decoding together;
    load: from the start of the process to the first token (not with --shape)."""
    context: int = 512
    """Context length in tokens when decoding starts."""
    prompt: int = 512
    """Prompt length in tokens for prefill."""
    threads: int | None = None
    """CPU threads of every engine, at most 4 per CPU; None: PyTorch's default."""
    peers: bool = False
    """Also measure llama.cpp and transformers, on random weights of the same shape; with --quality llama.cpp,
    on this model's weights."""
    peer_python: str | None = None
    """The Python with llama_cpp and gguf; None: this one. A llama.cpp built for this CPU is much faster than a
    wheel."""
    keep: str | None = None
    """A folder in which to keep the peers' weight files; None: a temporary one."""
    rounds: int = 1
    """Number of rounds over all measurements; results are medians."""
    quick: bool = False
    """Few repetitions: checks that everything runs; do not quote the results."""
    json: str | None = None
    """Write the records to this file."""
    plot: str | None = None
    """Plot the roofline, or with --serving throughput and latency, to this file (.png, .pdf, .svg)."""
    fidelity: QualityOptions = dataclasses.field(default_factory=QualityOptions)
    traffic: ServingOptions = dataclasses.field(default_factory=ServingOptions)


def run(argv: list[str]) -> int:
    args = read_flags(Bench, "bench", argv)
    if args.fidelity.quality:
        from . import bench_quality

        return bench_quality.run(args, argv)
    if args.traffic.serving:
        from . import bench_serving

        return bench_serving.run(args, argv)
    plan = plan_of(args)
    from ..bench import plot, report
    from ..bench.run import run as measure_all

    show(args, partial(measure_all, plan), report, plot.draw)
    return 0


def show(
    args: Bench, measure: Callable[[Callable[[str], None]], list[Any]], report: Any,
    draw: Callable[[str, list[Any]], None] | None,
) -> None:  # fmt: skip
    """Measure, write the records, print them with the module `report`, and draw the plot if there is one."""
    from ..bench.records import write_json

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if args.plot:
        from ..bench.plot import matplotlib_classes

        matplotlib_classes()  # fail now, not after an hour of measurements
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # exits cleanly, which removes temporary files
    records = measure(tell)
    try:
        if args.json:
            write_json(args.json, records)
    finally:  # print the results even if writing the file fails
        print_tables(records, report)
    if doubt := report.doubt(records):
        tell(doubt)
    if args.plot and draw is not None:
        draw(args.plot, records)


def print_tables(records: list[Any], report: Any) -> None:
    """Print records with the module `report`."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.heading(records), highlight=False)
    for table in report.tables(records):
        console.print(table)
    for note in report.notes(records):
        console.print(note, highlight=False, soft_wrap=True)


def check(args: Bench) -> None:
    """Raise UsageError, naming the flag, for invalid flags of any measurement."""
    check_quality(args)
    check_serving(args)
    threads.check(args.threads, "--threads")
    for name in ("context", "prompt", "rounds", "layers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}", field=f"--{name}")
    for name in ("json", "plot"):
        value = getattr(args, name)
        if value and not pathlib.Path(value).expanduser().absolute().parent.is_dir():
            raise UsageError(f"--{name} {value}: there is no folder {os.path.dirname(value)}", field=f"--{name}")
    unknown = [scheme for scheme in args.scheme if scheme not in SCHEMES]
    if unknown and not args.fidelity.quality:
        raise UsageError(f"--scheme must be {', '.join(SCHEMES)}, not {unknown[0]!r}", field="--scheme")
    if args.shape and args.model:
        raise UsageError(f"--shape {args.shape} and the model {args.model} exclude each other", field="--shape")
    if args.adapter and args.peers:
        raise UsageError("--adapter and --peers exclude each other: the peers run without it", field="--adapter")
    if args.layers and not args.shape:
        raise UsageError("--layers needs --shape: the layers of a model are fixed", field="--layers")


def plan_of(args: Bench) -> Plan:
    """Return the plan of the flags. Raises UsageError, naming the flag, if it is invalid."""
    check(args)
    whats = tuple(dict.fromkeys(args.what))
    if args.shape:
        if whats == ("load",):
            raise UsageError("--what load reads files", field="--what", hint="name a model instead of --shape")
        whats = tuple(w for w in whats if w != "load")

    from ..bench.run import Plan

    name, source, model_args = subject(args, max(args.context, args.prompt), "--context and --prompt")
    if args.adapter:
        from ..lora import read_adapter
        from ..model import ModelArgs

        read_adapter(args.adapter, ModelArgs(**model_args))  # its errors now, not in a process of a measurement
        name = f"{name} with {pathlib.Path(args.adapter).absolute().name}"
    return Plan(
        name, model_args, source, schemes(args, source), whats,
        context=args.context, prompt=args.prompt, threads=args.threads,
        quick=args.quick, rounds=args.rounds, peers=args.peers, peer_python=args.peer_python or sys.executable,
        files=args.keep, adapter=args.adapter,
    )  # fmt: skip


def schemes(args: Bench, source: str | None) -> tuple[str, ...]:
    """Return the requested schemes, or that of a quantized folder. UsageError if they conflict."""
    from ..checkpoint import read_record

    requested = tuple(dict.fromkeys(args.scheme))
    if source is None or (record := read_record(source)) is None:
        return requested or ("int4", "int8", "bf16")
    own = record.scheme.name
    if requested not in ((), (own,)):
        raise UsageError(
            f"--scheme {' '.join(requested)}: {args.model} is quantized already, as {own}",
            field="--scheme",
            hint="omit --scheme",
        )
    return (own,)


def subject(args: Bench, longest: int, flags: str) -> tuple[str, str | None, dict[str, Any]]:
    """Return name, path (None for a shape) and ModelArgs as a dict of the model to measure.

    Raises UsageError, naming `flags`, if its context is shorter than `longest`.
    """
    from ..model import ModelArgs

    if args.shape:
        fields = dict(SHAPES[args.shape])
        if args.layers:
            fields["n_layers"] = args.layers
        name = f"random {args.shape}" + (f", {args.layers} layers" if args.layers else "")
        source, model_args = None, ModelArgs(**fields)
    else:
        from ..checkpoint import hub, read_args

        path = hub.resolve(args.model or "demo")
        name, source, model_args = args.model or "demo", str(path), read_args(path)[0]
    if longest > model_args.max_seq_len and model_args.sliding_window is None:
        raise UsageError(f"{flags}: the context of {name} is {model_args.max_seq_len} tokens, not {longest}")
    return name, source, dataclasses.asdict(model_args)
