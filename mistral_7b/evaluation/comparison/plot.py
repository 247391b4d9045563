"""Plot the growth of B's error over the layers, against A's hidden states."""

from __future__ import annotations

import importlib.util
import os
import pathlib

from ...errors import EvaluationError
from ...files import atomic_write
from .result import FAULT, Result

SMALLEST = 1e-8  # below float32's precision: drawn as this
KINDS = ("", ".png", ".pdf", ".svg")  # suffixes; none: PNG


def check(path: str | os.PathLike[str]) -> None:
    """Raise EvaluationError if matplotlib is missing, or a file's suffix is none of KINDS."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationError("a plot needs matplotlib", hint="pip install 'mistral-7b[plot]'")
    if pathlib.Path(path).suffix.lower() not in KINDS:
        raise EvaluationError(f"{path}: a plot is written as one of {', '.join(KINDS[1:])}", field="--plot")


def draw(path: str | os.PathLike[str], result: Result) -> None:
    """Write the plot as PNG, PDF or SVG, by the suffix. EvaluationError without matplotlib or for others."""
    check(path)
    from matplotlib.figure import Figure

    target = pathlib.Path(path).expanduser()
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    color = "#c64600" if result.verdict == FAULT else "#1a5fb4"
    errors = [max(place.error, SMALLEST) for place in result.growth]
    # The embedding is 0; a layer's attention ends at its middle, its feed-forward at its end.
    axes.plot([n / 2 for n in range(len(errors))], errors, "-o", color=color, ms=3.5, lw=1.2)
    axes.set_yscale("log")
    axes.set_ylim(SMALLEST / 2, max(4.0, 2 * max(errors)))
    axes.set_xlim(-0.2, len(errors) / 2 + 0.1)
    axes.set_xlabel("layers")
    axes.set_ylabel("error of the hidden states, relative to A's")
    where = f", from {result.parts_at} on" if result.parts_at else ""
    causes = f": {', '.join(c.cause for c in result.causes)}" if result.causes else ""
    names = [pathlib.Path(name).name for name in (result.a, result.b)]
    axes.set_title(f"{names[1]} against {names[0]}\n{result.verdict}{where}{causes}, mean KLD {result.kld:.3g}")
    axes.grid(True, which="major", color="0.9")
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:] or "png", dpi=150)
