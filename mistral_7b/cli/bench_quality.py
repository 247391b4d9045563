"""`mistral-7b bench --quality`: the distance of quantized models from float32, beside llama.cpp's formats."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from .flags import changed
from .inputs import UsageError, read_text

if TYPE_CHECKING:
    from ..bench.quality.run import QualityPlan
    from .bench import Bench


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """Options of --quality."""

    quality: bool = False
    """Measure the KL divergence, perplexity and top-1 agreement of quantized models against their float32.
    Uses the flags below and --threads, --peers, --peer-python, --json, and --scheme: names of integer schemes
    (default: all), and paths of folders or GGUF files of the same model, which are measured as they are."""
    text: str = ""
    """Text file to measure on; default: the topics of Python's help."""
    rows: int = 4
    """Rows of 512 tokens from the beginning of the text; each is computed on its own."""


ELSEWHERE = (
    "--shape", "--layers", "--adapter", "--what", "--context", "--prompt", "--keep", "--rounds", "--quick",
    "--plot",
)  # fmt: skip


def check(args: Bench) -> None:
    """Raise UsageError for conflicting flags and invalid numbers."""
    options = args.fidelity
    if not options.quality:
        if foreign := changed(options, QualityOptions()):
            raise UsageError(f"{', '.join(foreign)}: only with --quality", field=foreign[0])
        return
    if args.traffic.serving:
        raise UsageError("--quality and --serving exclude each other", field="--quality")
    if foreign := [flag for flag in changed(args, type(args)()) if flag in ELSEWHERE]:
        raise UsageError(f"{', '.join(foreign)}: not with --quality", field=foreign[0])
    if options.rows < 1:
        raise UsageError(f"--rows must be at least 1, not {options.rows}", field="--rows")


def run(args: Bench, argv: Sequence[str]) -> int:
    """Run all measurements and print the results."""
    from .bench import show

    plan = plan_of(args, argv)
    from ..bench.quality import report
    from ..bench.quality.run import run as measure_all

    show(args, partial(measure_all, plan), report, draw=None)
    return 0


def plan_of(args: Bench, argv: Sequence[str]) -> QualityPlan:
    """Return the plan of the flags. Raises UsageError, naming the flag, if it is invalid."""
    from ..checkpoint import hub
    from ..text.default_text import default_text
    from .bench import check
    from .bench_serving import command

    check(args)
    options, model = args.fidelity, args.model or "starter"
    if options.text:
        text_name, text = pathlib.Path(options.text).name, read_text(options.text)
    else:
        text_name, text = default_text()
    source = str(hub.resolve(model))
    name = pathlib.Path(model).name if pathlib.Path(model).is_absolute() else model
    from ..bench.quality.run import QualityPlan

    return QualityPlan(
        name, source, schemes(args), text, text_name, options.rows, threads=args.threads, peers=args.peers,
        peer_python=args.peer_python or sys.executable, command=command(argv),
    )  # fmt: skip


def schemes(args: Bench) -> tuple[str | pathlib.Path, ...]:
    """Return the requested schemes and paths, or all integer schemes. UsageError for one that is neither."""
    from ..bench.quality.run import integer_schemes

    names = integer_schemes()
    out: list[str | pathlib.Path] = []
    for scheme in dict.fromkeys(args.scheme or names):
        path = pathlib.Path(scheme).expanduser()
        if scheme not in names and not path.exists():
            raise UsageError(
                f"--scheme {scheme}: with --quality it is an integer scheme ({', '.join(names)}), or the path of "
                "a quantized folder or a GGUF file",
                field="--scheme",
            )
        out.append(scheme if scheme in names else path)
    return tuple(out)
