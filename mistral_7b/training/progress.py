"""The progress line of a training run."""

from __future__ import annotations

import datetime
import sys
from typing import Any, TextIO

from .args import TrainArgs


class ProgressLine:
    """Shows log records: one updated line on a terminal, else every `log_every`-th record."""

    def __init__(self, args: TrainArgs, file: TextIO | None = None) -> None:
        self.args, self.file = args, file or sys.stderr
        self.mean: float | None = None
        self.speed: float | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        smooth = 0.95
        self.mean = record["loss"] if self.mean is None else smooth * self.mean + (1 - smooth) * record["loss"]
        speed = record["tokens_per_s"]
        self.speed = speed if self.speed is None else smooth * self.speed + (1 - smooth) * speed
        step, steps = record["step"], self.args.steps
        left = (steps - step) * self.args.rows * self.args.seq_len / max(self.speed, 1e-9)
        line = (
            f"update {step}/{steps}  loss {self.mean:.3f}  {self.speed:,.0f} tokens/s  "
            f"{datetime.timedelta(seconds=round(left))} left"
        )
        if "held_out_bits_per_byte" in record:
            line += f"  held out {record['held_out_bits_per_byte']:.4f} bits/byte"
        if self.file.isatty():
            print(f"\r\x1b[K{line}", end="\n" if step == steps else "", file=self.file, flush=True)
        elif step == steps or step % self.args.log_every == 0 or "held_out_bits_per_byte" in record:
            print(line, file=self.file, flush=True)
