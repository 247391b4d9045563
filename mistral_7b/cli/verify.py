"""`mistral-7b verify`: check the files of a model."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from .inputs import ModelName, busy, read_flags

if TYPE_CHECKING:
    from ..evaluation.verify import Report

MARKS = {"ok": ("✓", "green"), "bad": ("✗", "red"), "note": ("!", "yellow")}


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check a model's files: configuration, weights, tokenizer, chat template, hashes; and a LoRA adapter's."""

    model: ModelName = "demo"
    """A folder, a file, a hub id, "starter" or "demo"; of any format, quantized ones too."""
    adapter: str | None = None
    """A LoRA adapter to check too, and whether it fits the model: a folder or file of PEFT, mistral-finetune or
    llama.cpp, or a hub id."""
    json: bool = False
    """Print one JSON object."""


def run(argv: list[str]) -> int:
    args = read_flags(Verify, "verify", argv)
    from ..checkpoint import hub

    hub.find(args.model)  # before PyTorch is imported
    with busy(f"reading {args.model}") as show:
        from ..evaluation import verify_model

        report = verify_model(args.model, show, args.adapter)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show_page(report)
    return 0 if report.ok else 1


def show_page(report: Report) -> None:
    """Print a line for each check, and the verdict."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(report.path), show_header=False, title_justify="left", box=None)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        sign, color = MARKS[finding.mark]
        table.add_row(Text(sign, style=color), Text(finding.check), Text(finding.text))
    console = Console(file=sys.stdout)
    console.print(table)
    bad = sum(finding.mark == "bad" for finding in report.findings)
    console.print("no check failed" if report.ok else f"{bad} of {len(report.findings)} checks failed")
