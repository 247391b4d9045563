"""`mistral-7b plan`: memory and traffic of a model over several GPUs, by arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Literal

from .bench import SHAPES
from .inputs import UsageError, read_flags

SHARE = 0.9  # of a GPU's memory, for what is counted


@dataclasses.dataclass(frozen=True)
class Plan:
    """Show what each way to use several GPUs or machines needs: memory, bytes sent, and which to choose."""

    shape: Literal["7b", "tiny"] = "7b"
    """Shape of the model."""
    gpus: int = 8
    """GPUs, or machines without one: one process each."""
    memory: float = 80
    """Memory of each, in GB."""
    seq_len: int = 2048
    """Training: tokens of a row; every process computes one row of an update."""
    context: int = 32768
    """Serving: tokens of all requests together, whose keys and values are kept."""
    rank: int = 16
    """Rank of an adapter."""


def run(argv: list[str]) -> int:
    args = read_flags(Plan, "plan", argv)
    for name in ("gpus", "memory", "seq_len", "context", "rank"):
        if not getattr(args, name) >= 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1", field=f"--{name.replace('_', '-')}")
    if args.memory == float("inf"):
        raise UsageError("--memory must be a number of GB", field="--memory")
    from ..model import ModelArgs
    from ..training.plan import advice, ways

    found = ways(ModelArgs(**SHAPES[args.shape]), args.gpus, args.seq_len, args.context, args.rank)
    room = int(SHARE * args.memory * 1e9)
    print(f"{'':<44}{'GB each':>9}  {'fits':<5}{'sent by each':>16}")
    for way in found:
        fits = "yes" if way.memory <= room else "no"
        per = f"{'an' if way.unit[0] in 'aeiou' else 'a'} {way.unit}"
        print(f"{f'{way.task}: {way.name}':<44}{way.memory / 1e9:9.2f}  {fits:<5}{_bytes(way.sent):>10} {per}")
    print("\nof what fits, that which sends the least:")
    print("\n".join(f"  {line}" for line in advice(found, room)))
    return 0


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
