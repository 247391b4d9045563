"""Plot a sweep: throughput and three latencies over arrival rates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..jobs import OURS
from ..plot import MARKERS, matplotlib_classes, save
from .records import ServingRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "first_token": "seconds to the first token",
    "between_tokens": "seconds between tokens",
    "latency": "seconds per request",
}
LINES = {"p50": "-", "p95": "--", "p99": ":"}


def draw(path: str | os.PathLike[str], records: Sequence[ServingRecord]) -> None:
    """Plot the records as PNG, PDF or SVG (by file name suffix), written atomically.

    Raises BenchmarkError if matplotlib is missing or the suffix is unknown.
    """
    Figure, FigureCanvasAgg = matplotlib_classes()
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    r = records[0]
    figure.suptitle(f"{r.model} on {r.threads} threads of {r.cpu}, {r.date}", fontsize=11)
    (rate, first), (between, whole) = figure.subplots(2, 2)
    points = list(dict.fromkeys(r.name for r in sorted(records, key=order)))
    throughput(rate, records, points)
    for axes, name in ((first, "first_token"), (between, "between_tokens"), (whole, "latency")):
        times(axes, records, points, name)
    for axes in (rate, first, between, whole):
        axes.set_xticks(range(len(points)), [name.replace(" at ", "\nat ") for name in points])
        axes.set_xlim(-0.4, len(points) - 0.6)
        axes.set_xlabel("arrivals")
        axes.grid(True, axis="y", color="0.9", lw=0.8)
        axes.set_axisbelow(True)
    save(figure, path)


def throughput(axes: Axes, records: Sequence[ServingRecord], points: Sequence[str]) -> None:
    """Plot output tokens per second; a ring marks points where the queue grew."""
    named = set()
    for mine in lines(records):
        x, y = [points.index(r.name) for r in mine], [r.tokens_per_s for r in mine]
        name = f"{mine[0].engine} {mine[0].scheme}"
        axes.plot(x, y, "-", label=None if name in named else name, **style(mine[0]))
        named.add(name)
    grew = [r for r in records if r.kept_up is False]
    if grew:
        axes.scatter(
            [points.index(r.name) for r in grew], [r.tokens_per_s for r in grew], s=170, marker="o",
            facecolors="none", edgecolors="0.2", linewidths=1.2, label="the queue grew", zorder=2,
        )  # fmt: skip
    axes.set(ylabel="output tokens per second", ylim=(0, 1.12 * max(r.tokens_per_s for r in records)))
    axes.legend(loc="best", fontsize=9, frameon=False)


def times(axes: Axes, records: Sequence[ServingRecord], points: Sequence[str], name: str) -> None:
    """Plot percentiles of one latency, on a logarithmic scale."""
    from matplotlib.ticker import LogFormatter

    for mine in lines(records):
        x = [points.index(r.name) for r in mine]
        for percentile, line in LINES.items():
            look = style(mine[0]) | ({} if percentile == "p50" else {"marker": ""})
            axes.plot(x, [getattr(r, name)[percentile] for r in mine], line, **look)
    for percentile, line in LINES.items():
        axes.plot([], [], line, color="0.3", lw=1.3, label=percentile)
    axes.set(yscale="log", ylabel=PANELS[name])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())  # 0.6, not 6 x 10^-1; thinned out automatically
    axes.legend(loc="best", fontsize=9, frameon=False)


def lines(records: Sequence[ServingRecord]) -> list[list[ServingRecord]]:
    """Group records by engine and scheme, separating rates from all-at-once, in plot order."""
    found: dict[tuple[str, str, bool], list[ServingRecord]] = {}
    for r in sorted(records, key=order):
        found.setdefault((r.engine, r.scheme, r.rate is None), []).append(r)
    return list(found.values())


def order(r: ServingRecord) -> tuple[float, int]:
    """Return the sort key: from the lowest rate to all at once."""
    return float("inf") if r.rate is None else r.rate, r.requests


def style(r: ServingRecord) -> dict[str, Any]:
    marker, color = MARKERS[r.engine]
    fill = color if r.engine == OURS else "white"
    return {"marker": marker, "color": color, "markerfacecolor": fill, "markersize": 6, "lw": 1.5}
