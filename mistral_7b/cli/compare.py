"""`mistral-7b compare`: the distance of two models, whether it is noise, and the cause if not."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import tyro

from ..kernels import threads
from .inputs import UsageError, busy, read_flags, read_text

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.comparison.engine import Ran
    from ..evaluation.comparison.result import Result

First = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A")]
Second = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B")]


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare model B with model A, from which it was made: print the figures of llama.cpp's perplexity tool, and
    decide whether rounding explains the distance (noise) or not (fault); name the cause of a fault and prove it by
    undoing it.

    Both models are computed in float32, one layer at a time. Exit codes: 0 the distance is within --max-kl (by
    default: it is noise), 1 it is not, 2 invalid input.
    """

    a: First
    """A model: a folder (Hugging Face, Mistral, quantized), a GGUF file, a hub id, "demo" or "starter"; with an
    adapter, BASE+ADAPTER."""
    b: Second
    """The model that is compared with it, as A; or an engine that runs its files: transformers:MODEL,
    llama.cpp:MODEL."""
    text: str = ""
    """Text file to compare on, "-": standard input; default: the topics of Python's help."""
    tokens: int = 2048
    """Maximum number of tokens of the text."""
    row: int = 512
    """Tokens in a row; rows are independent. A sliding window has effect only in rows that are longer."""
    max_kl: float | None = None
    """Exit with 1 if the mean KLD exceeds this, whatever the verdict; None: exit with 1 for a fault."""
    plot: str | None = None
    """Plot the error's growth over the layers to this file (PNG, PDF or SVG)."""
    json: str | None = None
    """Write the result to this file, as JSON."""
    peer_python: str | None = None
    """The Python that has llama_cpp, for llama.cpp:MODEL; None: this one."""
    threads: int | None = None
    """CPU threads, at most 4 per CPU; None: PyTorch's default."""


def run(argv: list[str]) -> int:
    args = read_flags(Compare, "compare", argv)
    for flag, value in (("--tokens", args.tokens), ("--row", args.row)):
        if value < 2:
            raise UsageError(f"{flag} must be at least 2, not {value}", field=flag)
    if args.max_kl is not None and not args.max_kl >= 0:
        raise UsageError(f"--max-kl must be at least 0, not {args.max_kl}", field="--max-kl")
    threads.check(args.threads, "--threads")
    text = read_text(args.text) if args.text else None
    from ..files import check_place

    for path in filter(None, (args.json, args.plot)):
        check_place(path)
    if args.plot is not None:
        from ..evaluation.comparison.plot import check

        check(args.plot)
    with busy("opening the models") as show:
        result = compared(args, text, show)
    from ..evaluation.comparison.result import FAULT, lines

    print("\n".join(lines(result)))
    if args.json is not None:
        from ..files import atomic_write

        with atomic_write(args.json) as temporary:
            temporary.write_text(
                json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    if args.plot is not None:
        from ..evaluation.comparison.plot import draw

        draw(args.plot, result)
    exceeded = result.verdict == FAULT if args.max_kl is None else not result.kld <= args.max_kl
    return int(exceeded)


def compared(args: Compare, text: str | None, show: Callable[[str], None]) -> Result:
    """Compare the models of the flags; `show` is called with each step."""
    from ..checkpoint import hub
    from ..evaluation.comparison.engine import UNITS
    from ..evaluation.comparison.run import compare
    from ..evaluation.comparison.sides import parse

    threads.use(args.threads)
    if (engine := parse(args.a).engine) is not None:
        raise UsageError(f"{engine} can be B only", field="A")
    engine, model, _ = parse(args.b)
    name = pathlib.Path(args.text).name if args.text else ""
    if engine is None:
        return compare(args.a, args.b, text, text_name=name, tokens=args.tokens, row=args.row, tell=show)

    def run_b(tokens: Tensor) -> Ran:
        from ..bench.quality import engines

        python = args.peer_python or sys.executable
        return engines.ran(str(engine), hub.resolve(model), tokens, python)

    result = compare(
        args.a, model, text, text_name=name, tokens=args.tokens, row=args.row, run_b=run_b, unit=UNITS[engine],
        tell=show,
    )  # fmt: skip
    return dataclasses.replace(result, b=args.b)
