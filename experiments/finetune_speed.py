"""LoRA on the CPU beside PEFT with transformers: tokens a second, peak memory, loss curves, and long contexts.

    python experiments/finetune_speed.py [--layers 4] [--rounds 4] [--json FILE]

speed      7B width, 4 layers of random bfloat16 weights, rank 16 on all Linears, rows of 1024 tokens. The peer is
           a plain loop with SDPA attention and fused AdamW, without or with gradient checkpointing, whichever is
           faster. Engines take turns in rounds, in processes that stay; the first update of each does not count.
           Bars: 1.2 times the peer's tokens a second, in 0.8 times its peak memory.
loop       the share of our loop outside forward, backward and optimizer, with log and a saved state each round.
           Bar: 3%.
curves     losses of 20 updates in float32 from the same base, adapter and data, with a window shorter than the
           rows. Bar: they differ by 1e-3 at most.
context    the time of a row of 8 times the length, with a window as long as the shorter row. Bar: 8.5 times.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from commits import commit_of
from finetune_engines import OURS, PEERS, Task

from mistral_7b import Mistral7B, ModelArgs, machine
from mistral_7b.bench.records import spread
from mistral_7b.lora.files import save_adapter
from mistral_7b.lora.trainable import LoraArgs, adapt, trained_adapter

SMALL = ModelArgs(
    dim=256, n_layers=4, head_dim=32, hidden_dim=704, n_heads=8, n_kv_heads=2, vocab_size=512, sliding_window=64
)
LONGER = 8


class Engine:
    """A process that trains, and all that it has reported."""

    def __init__(self, task: Task) -> None:
        self.reports: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("finetune_engines.py")),
             json.dumps(dataclasses.asdict(task))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, updates: int) -> None:
        """Do some updates. RuntimeError if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with exit status {self.process.wait()}")
        self.reports.append(json.loads(line))

    def all(self, name: str) -> list[float]:
        """What all updates but those of the first report, which is the warmup, give for `name`."""
        return [value for report in self.reports[1:] for value in report[name]]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def in_turns(tasks: dict[str, Task], rounds: int, updates: int) -> dict[str, Engine]:
    """Warm up all engines, then let them take turns; they have ended when this returns."""
    engines = {}
    try:
        for name, task in tasks.items():
            engines[name] = Engine(task)
            engines[name].run(1)
        for _ in range(rounds):
            for engine in engines.values():
                engine.run(updates)
    finally:
        for engine in engines.values():
            engine.close()
    return engines


def speed(layers: int, seq_len: int, rounds: int, updates: int, recompute: int, folder: str) -> dict[str, Any]:
    shape = dataclasses.asdict(dataclasses.replace(ModelArgs(), n_layers=layers))
    tasks = {
        name: Task(name, shape, seq_len, folder, recompute=recompute if name == OURS else 0)
        for name in (OURS, *PEERS)
    }
    results: dict[str, Any] = {}
    engines = in_turns(tasks, rounds, updates)
    for name, engine in engines.items():
        seconds = engine.all("seconds")
        middle = statistics.median(seconds)
        results[name] = {
            "tokens_per_s": seq_len / middle, "seconds": seconds, "spread": spread(seconds),
            "peak_gb": engine.reports[-1]["peak"] / 1e9,
        }  # fmt: skip
    peer = max(PEERS, key=lambda name: results[name]["tokens_per_s"])
    outside = statistics.median(report["outside"] for report in engines[OURS].reports[1:])
    return {
        "engines": results, "peer": peer,
        "speed_ratio": results[OURS]["tokens_per_s"] / results[peer]["tokens_per_s"],
        "memory_ratio": results[OURS]["peak_gb"] / results[peer]["peak_gb"],
        "outside_the_passes": outside,
    }  # fmt: skip


def curves(updates: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Mistral7B(SMALL, dtype=torch.float32)
    model.save_pretrained(f"{folder}/base")
    adapt(model, LoraArgs(), seed=0)
    save_adapter(trained_adapter(model), f"{folder}/adapter", SMALL, base_model=f"{folder}/base")
    common = {"shape": dataclasses.asdict(SMALL), "seq_len": 256, "dtype": "float32", "lr": 2e-3}
    tasks = {name: Task(name, folder=folder, inputs=folder, **common) for name in (OURS, PEERS[0])}
    losses = {name: engine.all("losses") for name, engine in in_turns(tasks, 1, updates).items()}
    pairs = zip(*losses.values(), strict=True)
    return {"losses": losses, "largest_difference": max(abs(ours - theirs) for ours, theirs in pairs)}


def context(window: int, layers: int, rounds: int, folder: str) -> dict[str, Any]:
    shape = dataclasses.asdict(dataclasses.replace(ModelArgs(), n_layers=layers, sliding_window=window))
    lengths = (window, LONGER * window)
    tasks = {str(n): Task(OURS, shape, n, folder, recompute=layers) for n in lengths}
    seconds = {name: engine.all("seconds") for name, engine in in_turns(tasks, rounds, 1).items()}
    short, long = (statistics.median(seconds[str(n)]) for n in lengths)
    return {"window": window, "layers": layers, "seconds": seconds, "ratio": long / short}


def main(
    layers: int = 4,
    seq_len: int = 1024,
    rounds: int = 4,
    updates: int = 2,
    recompute: int = 0,
    window: int = 1024,
    parts: tuple[str, ...] = ("speed", "curves", "context"),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure the parts.

    Args:
        layers: Blocks of the model.
        seq_len: Tokens of an update.
        rounds: How often the engines take turns.
        updates: Updates of an engine in a round.
        recompute: Blocks that our engine computes again in the backward pass.
        window: The window of the context's measurement, which has one block.
        parts: What is measured: speed, with the loop; curves; context.
        json_file: Write the record to this file.
    """
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(Path(__file__).parent),
        "command": "python " + " ".join(sys.argv), "cpu": machine.cpu_name(), "cores": machine.cores(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        work = {
            "speed": lambda: speed(layers, seq_len, rounds, updates, recompute, folder),
            "curves": lambda: curves(20, folder),
            "context": lambda: context(window, 1, rounds, folder),
        }
        for part in parts:
            record[part] = work[part]()
            print(part, json.dumps(record[part], indent=1), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
