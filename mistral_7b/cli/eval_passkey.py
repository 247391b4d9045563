"""`mistral-7b eval passkey`: a heat map of retrieval by context length and depth."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import tyro

from .inputs import ModelName, ModelOptions, UsageError, read_flags


@dataclasses.dataclass(frozen=True)
class Passkey(ModelOptions):
    """Hide a number in texts of several lengths, at several depths, and measure whether the model retrieves it."""

    model: ModelName = "demo"
    """A folder, a file, a hub id, "starter" or "demo"."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Lengths of the texts, in tokens."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Places of the number: 0 at the beginning of a text, 1 at its end."""
    trials: int = 3
    """Numbers that are tried at each length and depth."""
    seed: int = 0
    """Seed of the numbers."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write the map to this file: .png, .pdf, .svg, .html or .json."""
    json: bool = False
    """Print one JSON object."""


def run(argv: list[str]) -> int:
    args = read_flags(Passkey, "eval passkey", argv)
    for name in ("lengths", "depths"):
        if not getattr(args, name):
            raise UsageError(f"--{name} needs a value", field=f"--{name}")
    if args.trials < 1:
        raise UsageError(f"--trials must be at least 1, not {args.trials}", field="--trials")
    from ..evaluation.passkey_plot import check_suffix, write
    from ..files import check_place

    if args.output:
        check_suffix(args.output)
        check_place(args.output)
    model, tokenizer = args.open(args.model)
    from tqdm.auto import tqdm

    from ..evaluation import retrieve

    total = len(args.lengths) * len(args.depths) * args.trials
    with tqdm(total=total, desc="trials", disable=None, leave=False) as bar:
        found = retrieve(
            model, tokenizer, args.lengths, args.depths, trials=args.trials, seed=args.seed, advance=bar.update
        )
    if args.output:
        write(found, args.output, f"{args.model}: retrieval of a pass key")
    if args.json:
        print(json.dumps({"model": args.model, **found.to_dict()}, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("depth", *(f"{n:,}" for n in args.lengths))
    for j, depth in enumerate(args.depths):
        values = [found.cells[i * len(args.depths) + j].retrieved for i in range(len(args.lengths))]
        table.add_row(f"{depth:.0%}", *(f"{value:.0%}" for value in values))
    Console().print(table)
    if found.window is not None:
        print(f"window {found.window:,} tokens, theoretical reach {found.reach:,}")
    return 0
