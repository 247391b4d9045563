"""Roofline plot (Williams et al., 2009, "Roofline") of a machine and its records.

Operations per second over operations per byte read. A point below the slope is limited by memory bandwidth, a
point below the flat roof by the matrix units. Engines differ in marker and fill, so that the plot is legible in
grayscale.
"""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

from ..errors import BenchmarkError
from ..files import atomic_write
from .jobs import LLAMA, OURS, TRANSFORMERS
from .records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = {OURS: ("o", "#1a5fb4"), LLAMA: ("s", "#c64600"), TRANSFORMERS: ("^", "#613583")}
LINES = ("-", "--", ":")  # line styles of the roofs, highest first
WORDS = {"decode": "decode", "prefill": "prefill", "batch16": "16 rows"}
INTEGERS = ("int4", "q4_k_m", "q6_k", "int8", "Q4_0", "Q4_K_M", "Q6_K", "Q8_0")
# Candidate offsets of a label from its point, in points; the first free one is used.
PLACES = [(7, 0), (-7, 0), (7, -9), (-7, 9), (7, 9), (-7, -9)] + [
    (side * 14, up) for step in range(2, 9) for up in (-11 * step, 11 * step) for side in (1, -1)
]


def draw(path: str | os.PathLike[str], records: list[Record]) -> None:
    """Plot the records as PNG, PDF or SVG (by file name suffix), written atomically.

    Raises BenchmarkError if matplotlib is missing, the suffix is unknown, or there is nothing to plot.
    """
    shown = [r for r in records if r.what in WORDS]
    if not shown:
        raise BenchmarkError("nothing to plot: a roofline needs decode, prefill or batch16", field="--what")
    Figure, FigureCanvasAgg = matplotlib_classes()
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas that can measure text
    axes = figure.add_subplot()
    roofs(axes, shown)
    points(axes, shown)
    save(figure, path)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically. BenchmarkError for an unknown file name suffix."""
    target = pathlib.Path(path).expanduser()
    with atomic_write(target) as temporary:
        try:
            figure.savefig(temporary, format=target.suffix[1:] or "png", dpi=150)
        except ValueError as error:
            raise BenchmarkError(f"--plot {target}: {error}", field="--plot") from error


def matplotlib_classes() -> tuple[Any, Any]:
    """Return Figure and its headless canvas. BenchmarkError if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchmarkError("a plot needs matplotlib", hint="pip install 'mistral-7b[plot]'") from error
    return Figure, FigureCanvasAgg


def roofs(axes: Axes, records: list[Record]) -> None:
    """Plot the bandwidth slope and a flat roof for each matrix product type."""
    bandwidth = max(r.read_bandwidth for r in records)
    peaks = {"int8" if r.scheme in INTEGERS else "bf16": r.matrix_peak for r in records}
    left = 0.6 * min(r.intensity for r in records)
    right = 40 * max(max(r.intensity for r in records), max(peaks.values()) / bandwidth)
    for line, (kind, peak) in zip(LINES, sorted(peaks.items(), key=lambda item: -item[1]), strict=False):
        corner = peak / bandwidth
        axes.plot([corner, right], [peak, peak], line, color="0.25", lw=1.6)
        axes.annotate(
            f"{kind} matrix product, {peak / 1e12:.2f} Top/s", (right, peak), (-4, 4),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color="0.25",
        )  # fmt: skip
    top = max(peaks.values())
    axes.plot([left, top / bandwidth], [left * bandwidth, top], "-", color="0.25", lw=1.6)
    lowest = 0.4 * min(min(r.operations_per_s for r in records), left * bandwidth)
    axes.set(
        xscale="log", yscale="log", xlim=(left, right), ylim=(lowest, 2.2 * top),
        xlabel="arithmetic intensity (operations per byte read)", ylabel="operations per second",
        title=f"{records[0].model} on {records[0].threads} threads of {records[0].cpu}, {records[0].date}",
    )  # fmt: skip
    axes.grid(True, which="major", color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    angle = _slope(axes)
    at = left * (top / bandwidth / left) ** 0.3
    axes.annotate(
        f"memory bandwidth, {bandwidth / 1e9:.1f} GB/s", (at, at * bandwidth), (-6, 6), textcoords="offset points",
        rotation=angle, rotation_mode="anchor", ha="left", va="bottom", fontsize=9, color="0.25",
    )  # fmt: skip


def points(axes: Axes, records: list[Record]) -> None:
    """Plot each record as a marker, labelled with its scheme and percentage of the ceiling."""
    for engine in dict.fromkeys(r.engine for r in records):
        marker, color = MARKERS[engine]
        mine = [r for r in records if r.engine == engine]
        axes.scatter(
            [r.intensity for r in mine], [r.operations_per_s for r in mine], s=46, marker=marker, zorder=3,
            facecolors=color if engine == OURS else "white", edgecolors=color, linewidths=1.5, label=engine,
        )  # fmt: skip
    axes.legend(loc="lower right", frameon=False)
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    spots = axes.transData.transform([(r.intensity, r.operations_per_s) for r in records])
    taken = [_box(x, y, 6) for x, y in spots]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    for line in axes.lines:  # roofs as rows of small boxes, which labels must not overlap
        (x0, y0), (x1, y1) = axes.transData.transform(line.get_xydata())[[0, -1]]
        taken += [_box(x0 + (x1 - x0) * n / 200, y0 + (y1 - y0) * n / 200, 2) for n in range(201)]
    for r in sorted(records, key=lambda r: -r.operations_per_s):
        taken.append(_label(axes, renderer, r, taken))


def _label(axes: Axes, renderer: Any, r: Record, taken: list[Any]) -> Any:
    """Place a point's label where it overlaps nothing; return its box."""
    from matplotlib.text import Text

    text = f"{WORDS[r.what]} {r.scheme}  {r.ceiling_fraction:.0%}"
    frame: Any = axes.get_window_extent(renderer)
    for place in PLACES:
        far = max(map(abs, place)) > 12
        note = axes.annotate(
            text, (r.intensity, r.operations_per_s), place, textcoords="offset points", fontsize=8, zorder=4,
            ha="left" if place[0] > 0 else "right", va="center", color=MARKERS[r.engine][1],
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkB": 4} if far else None,
        )  # fmt: skip
        note.update_positions(renderer)
        box: Any = Text.get_window_extent(note, renderer)  # an annotation's own extent includes its arrow
        inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
        if inside and not box.count_overlaps(taken):
            return box
        note.remove()
    return axes.annotate(text, (r.intensity, r.operations_per_s), fontsize=8).get_window_extent(renderer)


def _box(x: float, y: float, half: float) -> Any:
    """Return a square of pixels around (x, y)."""
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _slope(axes: Axes) -> float:
    """Return the angle in degrees of a line of slope 1 on the figure."""
    import math

    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    (x0, y0), (x1, y1) = axes.transData.transform([(1, 1), (10, 10)])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))
