"""The progress line of a training run."""

from __future__ import annotations

import datetime
import sys
from typing import Any, TextIO

from .. import machine
from .args import RunArgs

SHOWN = {  # what an evaluation measured -> how it is shown
    "held_out_bits_per_byte": "held out {:.4f} bits/byte",
    "eval_loss": "held out {:.4f}",
    "eval_accuracy": "accuracy {:.1%}",
    "reward": "reward {:.3f}",
    "eval_reward": "held out reward {:.3f}",
    "kl_from_base": "KL from the base {:.4f}",
}


class ProgressLine:
    """Shows log records: one updated line on a terminal, else every `log_every`-th record."""

    def __init__(self, args: RunArgs, file: TextIO | None = None) -> None:
        self.args, self.file = args, file or sys.stderr
        self.mean = self.speed = self.seconds = 0.0
        self.shown = 0

    def __call__(self, record: dict[str, Any]) -> None:
        self.shown += 1
        share = max(1 / self.shown, 0.05)  # the plain mean at first: the first loss must not stay in sight
        self.mean += share * (record["loss"] - self.mean)
        self.speed += share * (record["tokens_per_s"] - self.speed)
        self.seconds += share * (record["seconds"] - self.seconds)
        step, steps = record["step"], self.args.total_steps
        left = datetime.timedelta(seconds=round((steps - step) * self.seconds))
        line = (
            f"update {step}/{steps}  loss {self.mean:.3f}  {self.speed:,.0f} tokens/s  "
            f"{peak_memory(self.args.device) / 1e9:.1f} GB  {left} left"
        )
        measured = [text.format(record[name]) for name, text in SHOWN.items() if name in record]
        line = "  ".join([line, *measured])
        if self.file.isatty():
            print(f"\r\x1b[K{line}", end="\n" if step == steps else "", file=self.file, flush=True)
        elif step == steps or step % self.args.log_every == 0 or measured:
            print(line, file=self.file, flush=True)


def peak_memory(device: str) -> int:
    """Return the peak memory of this process in bytes: that of tensors on a GPU, else resident memory."""
    if not device.startswith("cuda"):
        return machine.peak_memory()
    import torch

    return torch.cuda.max_memory_allocated(device)
