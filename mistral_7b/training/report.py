"""The report of a fine-tuning run: one HTML file without anything from elsewhere, its curves as inline SVG."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import machine
from ..files import atomic_write
from .finetune_args import FinetuneArgs
from .progress import peak_memory

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 56, 28, 12
PANELS = (  # title, and the columns of the log that it shows
    ("Loss (supervised: nats per trained token)", ("loss", "eval_loss")),
    ("Accuracy, held out: trained tokens, or pairs in the right order", ("eval_accuracy",)),
    ("KL from the base on neutral text (nats per token)", ("kl_from_base",)),
    ("Reward", ("reward", "eval_reward")),
    ("Rewards of the answers of a pair", ("reward_chosen", "reward_rejected")),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("norm",)),
    ("Tokens per second", ("tokens_per_s",)),
)
NAMES = {
    "loss": "training", "eval_loss": "held out", "reward": "training", "eval_reward": "held out",
    "reward_chosen": "chosen", "reward_rejected": "rejected",
}  # fmt: skip
COLORS = ("#1f4e8c", "#d9541e")
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1360px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font-size: 11px; fill: currentColor; } .grid { stroke: var(--line); stroke-width: .5; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
.facts td:last-child { font-variant-numeric: tabular-nums; }
.samples { table-layout: fixed; width: 100%; } .samples td { border-top: 1px solid var(--line); padding: .5rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.45 ui-monospace, monospace; }
details pre { background: var(--soft); padding: .75rem; border-radius: 8px; }
"""


class Sample(NamedTuple):
    """A prompt with the answers before and after training."""

    prompt: str
    before: str
    after: str


def write_report(
    path: Path, args: FinetuneArgs, log: Sequence[dict[str, Any]], data: Sequence[str], samples: Sequence[Sample]
) -> None:
    """Write the report of a finished run. WriteError if it cannot be written."""
    title = html.escape(f"{args.method} of {args.model}")
    panels = "".join(_panel(title, log, names) for title, names in PANELS)
    changed = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    flags = html.escape("\n".join(f"{name} = {value!r}" for name, value in changed.items()))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<meta name=viewport content='width=device-width'><title>{title}</title><style>{STYLE}</style>",
        f"<h1>Fine-tuning: {title}</h1>{_facts(log, args.device)}<h2>Curves</h2><div class=panels>{panels}</div>",
        f"<h2>Data</h2><ul>{''.join(f'<li>{html.escape(line)}' for line in data)}</ul>",
        _samples(samples),
        f"<h2>Arguments</h2><details><summary>All {len(changed)}</summary><pre>{flags}</pre></details></html>\n",
    ]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(parts), encoding="utf-8")


def _facts(log: Sequence[dict[str, Any]], device: str) -> str:
    """A table of the results and what they took."""
    last, seconds = log[-1], sum(record.get("seconds", 0.0) for record in log)
    tokens = sum(record["tokens_per_s"] * record.get("seconds", 0.0) for record in log)
    rows = {"Updates": f"{last['step']:,}", "Loss, first and last": f"{log[0]['loss']:.4f} → {last['loss']:.4f}"}
    for name, what in (("eval_loss", "Held-out loss"), ("eval_accuracy", "Held-out accuracy")):
        if values := [record[name] for record in log if name in record]:
            rows[what] = f"{values[-1]:.4f}"
    if "kl_from_base" in last:
        rows["KL from the base on neutral text"] = f"{last['kl_from_base']:.4f} nats per token"
    rows |= {
        "Tokens": f"{tokens:,.0f} in {seconds:,.0f} s of updates ({tokens / max(seconds, 1e-9):,.0f} per second)",
        "Peak memory": f"{peak_memory(device) / 1e9:.2f} GB",
        "Machine": machine.cpu_name(),
    }
    cells = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(v)}" for k, v in rows.items())
    return f"<table class=facts>{cells}</table>"


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    head = "<tr><th>Prompt<th>Before<th>After"
    rows = "".join("<tr>" + "".join(f"<td><pre>{html.escape(text)}</pre>" for text in s) for s in samples)
    return f"<h2>Samples</h2><table class=samples>{head}{rows}</table>"


def _panel(title: str, log: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """A figure of columns of the log over the updates; nothing if the log has none of them."""
    curves = {n: [(r["step"], r[n]) for r in log if n in r and math.isfinite(r[n])] for n in names}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    values = [y for points in curves.values() for _, y in points]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1.0
    last = max(log[-1]["step"], 2)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - 1) / (last - 1) * (WIDTH - LEFT - 10)
        return f"{across:.1f},{TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    drawn = [_grid(low, high, last)]
    for color, points in zip(COLORS, curves.values(), strict=False):
        path = " ".join(place(*point) for point in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(points) < 60:
            drawn += [f'<circle cx="{x}" cy="{y}" r="2.2" fill="{color}"/>' for x, y in _pairs(path)]
    legend = ""
    if len(curves) > 1:
        legend = " · ".join(
            f'<span style="color:{color}">{NAMES.get(name, name)}</span>'
            for color, name in zip(COLORS, curves, strict=False)
        )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{legend}{svg}</figure>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _pairs(path: str) -> list[list[str]]:
    return [point.split(",") for point in path.split()]


def _grid(low: float, high: float, last: int) -> str:
    """Four horizontal lines with their values, and the first and last update."""
    lines = []
    for i in range(5):
        y = TOP + i / 4 * (HEIGHT - TOP - BOTTOM)
        value = high - i / 4 * (high - low)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    lines.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">1</text>')
    lines.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 8}" text-anchor="end">update {last}</text>')
    return "".join(lines)
