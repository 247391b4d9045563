"""Kill fine-tuning runs at random moments and resume them: the adapter must have the undisturbed run's bits.

    python tests/killed_runs.py --kills 50

A run that is killed is forked from this process, which computes in one thread, so that no other is lost. Prints
one JSON object, and ends with status 1 if the bits differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro
from finetune_data import base_model, examples, tokenizer

from mistral_7b.training.finetune_args import FinetuneArgs
from mistral_7b.training.finetuning import STATE, Examples, Run

ARGS = FinetuneArgs(
    seq_len=32, rows=4, accumulate=2, warmup=2, lr=1e-2, rank=4, dropout=0.1, dtype="float32", save_every=1,
    keep=2, samples=0, eval_every=2, patience=99, held_out="four of them",
)  # fmt: skip


def run(out: Path, steps: int) -> str:
    """Run to the end, from the saved state if there is one; return the hash of the adapter."""
    items = examples()
    given = Examples(items[4:], (), items[:4])
    Run(dataclasses.replace(ARGS, out=str(out), steps=steps), base_model(), tokenizer(), given).train(
        lambda _: None
    )
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


class Child:
    """A run in `out`, started or resumed in a process of its own."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.ended = out, False
        self.pid = os.fork()
        if self.pid == 0:
            try:
                run(out, steps)
            finally:
                os._exit(0)

    def running(self) -> bool:
        if not self.ended and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.ended = True
        return not self.ended

    def kill(self, states: int, seconds: float) -> None:
        """Kill it so many seconds after it has saved so many states, unless it ends before."""
        for _ in range(states):
            before = self.version()
            while self.version() == before and self.running():
                time.sleep(0.0005)
        time.sleep(seconds)
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def version(self) -> int:
        """A number that changes with each saved state; 0 if there is none."""
        try:
            return (self.out / STATE).stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def main(kills: int = 50, steps: int = 60, seed: int = 0) -> int:
    """Kill one run `kills` times, between states and while it saves them, and compare it with one left alone."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        wanted = run(Path(folder) / "whole", steps)
        out, resumed_at = Path(folder) / "cut", []
        for _ in range(kills):
            Child(out, steps).kill(draw.randrange(3), draw.uniform(0, 0.02))
            state = out / STATE
            resumed_at.append(torch.load(state, weights_only=True)["step"] if state.exists() else 0)
        equal = run(out, steps) == wanted
    print(json.dumps({"kills": kills, "steps": steps, "resumed_at": resumed_at, "equal": equal}))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
