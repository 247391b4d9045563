"""The heat map of retrieval as a picture (PNG, PDF, SVG) or as a page of its own (HTML)."""

from __future__ import annotations

import html
import json
import os
import pathlib
from collections.abc import Iterator
from itertools import pairwise

from ..errors import EvaluationError
from ..files import atomic_write
from .passkey import Cell, PasskeyMap

PICTURES = (".png", ".pdf", ".svg")


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise EvaluationError for a file that is neither a picture, a page nor JSON."""
    if pathlib.Path(path).suffix.lower() not in (*PICTURES, ".html", ".json"):
        names = ", ".join((*PICTURES, ".html", ".json"))
        raise EvaluationError(f"{path}: the map is written as one of {names}", field="output")


def write(found: PasskeyMap, path: str | os.PathLike[str], title: str) -> None:
    """Write a map in the format of the file's name, atomically. EvaluationError if matplotlib is missing."""
    check_suffix(path)
    target = pathlib.Path(path).expanduser()
    suffix = target.suffix.lower()
    with atomic_write(target) as temporary:
        if suffix in PICTURES:
            _draw(found, temporary, suffix[1:], title)
        else:
            text = _page(found, title) if suffix == ".html" else json.dumps(found.to_dict(), indent=2) + "\n"
            temporary.write_text(text, encoding="utf-8")


def borders(found: PasskeyMap) -> Iterator[tuple[str, list[float | None]]]:
    """Yield the window and its reach as depths, one for each length, below which a number is that near."""
    for name, tokens in (("W", found.window), ("W x layers", found.reach)):
        if tokens is not None:
            depths = [1 - tokens / length for length in found.lengths]
            yield f"{name} = {tokens:,} tokens", [depth if depth >= 0 else None for depth in depths]


def _draw(found: PasskeyMap, path: pathlib.Path, kind: str, title: str) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError(
            "a picture needs matplotlib", field="output", hint="`pip install 'mistral-7b[plot]'` installs it"
        ) from error
    lengths, depths = found.lengths, found.depths
    figure = Figure(figsize=(max(5.0, 2.5 + 0.8 * len(lengths)), 2.4 + 0.45 * len(depths)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [
        [found.cells[i * len(depths) + j].retrieved for i in range(len(lengths))] for j in range(len(depths))
    ]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for j, row in enumerate(values):
        for i, value in enumerate(row):
            axes.text(i, j, f"{value:.0%}", ha="center", va="center", color="black" if value > 0.6 else "white")
    for (name, line), style in zip(borders(found), ("-", "--"), strict=False):
        first = True
        for i, depth in enumerate(line):
            if depth is not None:
                at = _row(depths, depth)
                axes.plot([i - 0.5, i + 0.5], [at, at], style, color="red", lw=2, label=name if first else None)
                first = False
        if first:
            axes.plot([], [], style, color="red", lw=2, label=f"{name}: longer than every text")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axes.set(xlabel="tokens", ylabel="depth of the pass key", title=title)
    if found.window is not None:
        figure.legend(loc="outside lower center", ncols=1, frameon=False)
    figure.colorbar(image, label=f"retrieved, of {found.trials} trials")
    figure.savefig(path, format=kind, dpi=150)


def _row(depths: tuple[float, ...], depth: float) -> float:
    """Where a depth lies on an axis of evenly spaced rows."""
    for i, (low, high) in enumerate(pairwise(depths)):
        if low <= depth <= high and low < high:
            return i + (depth - low) / (high - low)
    return -0.5 if depth < depths[0] else len(depths) - 0.5


def _page(found: PasskeyMap, title: str) -> str:
    head = "".join(f"<th>{n:,}</th>" for n in found.lengths)
    rows = []
    for j, depth in enumerate(found.depths):
        cells = [found.cells[i * len(found.depths) + j] for i in range(len(found.lengths))]
        rows.append(f"<tr><th>{depth:.0%}</th>{''.join(_td(found, cell) for cell in cells)}</tr>")
    notes = "".join(f"<p>{html.escape(name)}</p>" for name, _ in borders(found))
    style = (
        "body{font-family:sans-serif}td{width:4em;text-align:center;padding:.5em}"
        "td.far{outline:2px dashed #c00;outline-offset:-2px}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><p>Retrieved, of {found.trials} trials, by tokens of "
        "the text and depth of the pass key. Dashed: farther from the end than the window.</p>"
        f"{notes}<table><tr><th></th>{head}</tr>{''.join(rows)}</table></html>\n"
    )


def _td(found: PasskeyMap, cell: Cell) -> str:
    far = found.window is not None and cell.distance > found.window
    green = round(120 * cell.retrieved)
    return (
        f'<td{" class=far" if far else ""} style="background:hsl({green} 60% 75%)" '
        f'title="probability {cell.probability:.2g}, {cell.distance} tokens from the end">'
        f"{cell.retrieved:.0%}</td>"
    )
