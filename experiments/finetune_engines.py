"""Engines of finetune_speed.py, each in a process of its own: this package, and PEFT with transformers.

    python experiments/finetune_engines.py TASK-AS-JSON

For each number N on stdin the process does N updates and prints a line of JSON: seconds and loss of each update,
the peak of resident memory so far, and the share of the time outside forward, backward and optimizer (ours only).
Every update is one document of random tokens, the same in all engines.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mistral_7b import FinetuneArgs, Mistral7B, ModelArgs, machine
from mistral_7b.kernels import threads
from mistral_7b.training.encoding import Encoded
from mistral_7b.training.finetuning import open_trained
from mistral_7b.training.loop import Loop
from mistral_7b.training.metrics import MetricsFile
from mistral_7b.training.packing import PackedRows
from mistral_7b.training.recomputing import recompute
from mistral_7b.training.supervised import Supervised, pack

DOCUMENTS, STEPS = 32, 1000  # no run comes to the end of its schedule
OURS, PEERS = "ours", ("peft", "peft-checkpointing")


@dataclasses.dataclass(frozen=True)
class Task:
    """What an engine trains."""

    engine: str
    shape: dict[str, Any]  # of ModelArgs
    seq_len: int
    folder: str  # of the run's files
    dtype: str = "bfloat16"
    rank: int = 16
    lr: float = 1e-4
    recompute: int = 0  # blocks, by our engine
    inputs: str = ""  # a folder with `base` and `adapter` to start from; "": random weights

    @property
    def args(self) -> FinetuneArgs:
        return FinetuneArgs(
            steps=STEPS, seq_len=self.seq_len, rows=1, accumulate=1, rank=self.rank, alpha=2.0 * self.rank,
            lr=self.lr, warmup=2, dtype=self.dtype, recompute=self.recompute, save_every=STEPS,
            start=f"{self.inputs}/adapter" if self.inputs else None,
        )  # fmt: skip


def documents(task: Task) -> list[Encoded]:
    """Documents in which every token but the first is trained; a token often follows from the one before."""
    rng, vocabulary = np.random.default_rng(0), task.shape["vocab_size"]
    ids = rng.integers(3, vocabulary, (DOCUMENTS, task.seq_len + 1)).astype(np.int32)
    follows = rng.random(ids.shape) < 0.8
    for t in range(1, task.seq_len + 1):
        ids[:, t] = np.where(follows[:, t], (5 * ids[:, t - 1] + 1) % vocabulary, ids[:, t])
    return [Encoded(row, np.ones(len(row), bool)) for row in ids]


def rows(task: Task) -> PackedRows:
    return PackedRows([task.seq_len] * DOCUMENTS, task.seq_len, seed=0)


class Done(NamedTuple):
    """Some updates."""

    seconds: Sequence[float]
    losses: Sequence[float]
    outside: float | None = None


class Clock:
    """An object some of whose methods are timed."""

    def __init__(self, timed: Any, *names: str) -> None:
        self._timed, self._names, self.seconds = timed, names, 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._timed, name)
        if name not in self._names:
            return value

        def run(*given: Any) -> Any:
            began = time.perf_counter()
            out = value(*given)
            self.seconds += time.perf_counter() - began
            return out

        return run


class Ours:
    """The loop of `finetune`, with its log; a state is saved after each call."""

    def __init__(self, task: Task, model: Mistral7B) -> None:
        args = task.args
        trained = open_trained(args, model, None)  # type: ignore[arg-type]  # an adapter needs no tokenizer
        method = Supervised(model, documents(task), rows(task), 1, 1)
        recompute(model, task.recompute)
        self.inside = Clock(method, "backward"), Clock(trained.weights, "collect", "update")
        self.loop = Loop(args, self.inside[0], self.inside[1])  # type: ignore[arg-type]
        self.state = Path(task.folder) / "state.pt"
        self.metrics = MetricsFile(Path(task.folder) / "metrics.jsonl", [])

    def run(self, updates: int) -> Done:
        loop, end = self.loop, self.loop.step + updates
        before, began = sum(clock.seconds for clock in self.inside), time.perf_counter()
        loop.run(self.state, self.metrics, stops=lambda log: len(log) >= end)
        took = time.perf_counter() - began
        inside = sum(clock.seconds for clock in self.inside) - before
        last = loop.log[-updates:]
        return Done([r["seconds"] for r in last], [r["loss"] for r in last], 1 - inside / took)


def open_base(task: Task) -> Mistral7B:
    """Return the base of our engine, after setting up the process as `finetune` does."""
    machine.return_large_blocks()
    dtype = getattr(torch, task.dtype)
    if task.inputs:
        return Mistral7B.from_pretrained(f"{task.inputs}/base", dtype=dtype)
    return Mistral7B(ModelArgs(**task.shape), dtype=dtype)


class Peft:
    """A plain loop over a PEFT model: bfloat16 base, float32 adapter, SDPA, fused AdamW."""

    def __init__(self, task: Task, checkpointing: bool) -> None:
        import peft
        import transformers

        from mistral_7b.bench.peers.hf_transformers import build

        self.args, self.documents, self.rows = task.args, documents(task), rows(task)
        if task.inputs:
            base = transformers.AutoModelForCausalLM.from_pretrained(
                f"{task.inputs}/base", dtype=getattr(torch, task.dtype), attn_implementation="sdpa"
            )
            self.model: Any = peft.PeftModel.from_pretrained(base, f"{task.inputs}/adapter", is_trainable=True)
        else:
            base = build(dataclasses.asdict(ModelArgs(**task.shape)))
            base.requires_grad_(False)
            self.model = peft.get_peft_model(
                base, peft.LoraConfig(r=task.rank, lora_alpha=2 * task.rank, target_modules="all-linear")
            )
        if checkpointing:
            base.enable_input_require_grads()
            base.activation_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=task.lr, betas=self.args.betas, weight_decay=0.0, fused=True
        )
        self.step = 0

    def run(self, updates: int) -> Done:
        seconds, losses = [], []
        for _ in range(updates):
            began = time.perf_counter()
            losses.append(self._update())
            seconds.append(time.perf_counter() - began)
        return Done(seconds, losses)

    def _update(self) -> float:
        batch = pack([self.documents[i] for i in self.rows.parts(self.step, 1, 1)[0]])
        logits = self.model(input_ids=batch.tokens[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits.float(), batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.args.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.peak * self.args.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return float(loss.detach())


def main(task: Task) -> None:
    threads.use()
    checkpointing = task.engine.endswith("-checkpointing")
    engine = Ours(task, open_base(task)) if task.engine == OURS else Peft(task, checkpointing)
    for line in sys.stdin:
        done = engine.run(int(line))._asdict()
        print(json.dumps({**done, "peak": machine.peak_memory()}), flush=True)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
