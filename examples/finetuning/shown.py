"""What both scripts do around `finetune`: files of rows, answers of a model, the record, the curve."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mistral_7b import LLM, FinetuneArgs, SamplingParams, machine

BLUE, ORANGE = "#1f4e8c", "#d9541e"
Messages = list[dict[str, str]]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write JSON lines; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answers(llm: LLM, prompts: Sequence[Messages], max_tokens: int, adapter: str | None = None) -> list[Any]:
    """Return the greedy answers to conversations: each has `text`, `token_ids` and `finish_reason`."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [
        output.outputs[0] for output in llm.chat(prompts, params, adapter=adapter, progress=sys.stderr.isatty())
    ]


def record(args: FinetuneArgs, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    """Return a result with where it comes from: hardware, commit, command, arguments, the log of the run."""
    log = [json.loads(text) for text in (Path(args.out) / "metrics.jsonl").read_text("utf-8").splitlines()]
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=Path(__file__).parent, text=True, capture_output=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "load_average": round(os.getloadavg()[0], 1),  # above `cores`: the times are those of a busy machine
        "torch": machine.version("torch"),
        "training_s": round(seconds),
        **found,
        "arguments": args.as_json(),
        "log": [{key: round(value, 5) for key, value in entry.items()} for entry in log],
    }


def write_record(path: Path | None, made: dict[str, Any]) -> None:
    """Print a record without its log, and write all of it to `path` if one is named."""
    print(json.dumps({key: value for key, value in made.items() if key not in ("arguments", "log")}, indent=1))
    if path is not None:
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def draw(
    path: Path, log: Sequence[dict[str, Any]], left: dict[str, str], right: dict[str, str], title: str
) -> None:
    """Draw columns of a log over its updates, `left` against one axis and `right` against the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    lines = []
    for side, columns, color in ((axes, left, BLUE), (axes.twinx(), right, ORANGE)):
        for style, (column, label) in zip(("-", "--"), columns.items(), strict=False):
            points = [(entry["step"], entry[column]) for entry in log if column in entry]
            lines += side.plot(*zip(*points, strict=True), style, color=color, label=label)
            if len(points) < len(log):
                lines[-1].set_marker("o")
        side.set_ylabel(", ".join(columns.values()), color=color)
        side.set_ylim(bottom=min(0, *(value for drawn in side.get_lines() for value in drawn.get_ydata())))
    axes.set_xlabel("update")
    axes.grid(alpha=0.3)
    axes.legend(lines, [str(drawn.get_label()) for drawn in lines], loc="center right", frameon=False)
    figure.savefig(path, dpi=90)
