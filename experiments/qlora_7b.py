"""QLoRA of the whole 7B shape on the CPU: peak memory, seconds an update, and the share of the matrix peak.

    python experiments/qlora_7b.py [--layers 32] [--updates 2] [--json FILE]

Random int4 weights, rank 16 on all Linears, an update of one row of 1024 tokens through the loop of `finetune`. As
many blocks are recomputed as the budget of memory requires. The matrix peak is the best of bfloat16 products of
1024 x 4096 x 14336 in the same process, before and after. The share is that of the operations that an update needs
with frozen weights, 4 a weight and token (29 GFLOP a token for 7B), at that peak: recomputation does not count.
Bars: 7 GB resident at the peak, 60% of the matrix peak.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from commits import commit_of
from finetune_engines import OURS, Ours, Task

from mistral_7b import Mistral7B, ModelArgs, machine
from mistral_7b.kernels import threads
from mistral_7b.quantization.schemes import random_model
from mistral_7b.training.estimate import LOGIT_COPIES, block_activations, fewest, trained_numbers
from mistral_7b.training.loss import LOGITS

PRODUCT = (1024, 4096, 14336)
MARGIN = 300e6  # bytes for what is not counted: pieces of dequantized weights, and the C library's own


def matrix_peak(times: int = 5) -> float:
    """Return the most operations per second of a bfloat16 product."""
    m, k, n = PRODUCT
    x, w = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        torch.mm(x, w)
        seconds.append(time.perf_counter() - began)
    return 2 * m * k * n / min(seconds)


def blocks_to_recompute(task: Task, shape: ModelArgs, budget: float) -> int:
    """Return the fewest blocks that must be recomputed, so that the run stays within `budget` bytes."""
    args = dataclasses.replace(task.args, method="qlora")
    kept, inputs = block_activations(args, shape, task.seq_len), 2 * task.seq_len * shape.dim
    later = 16 * trained_numbers(args, shape) + LOGIT_COPIES * 4 * LOGITS + MARGIN  # adapter, gradients and AdamW
    return fewest(kept, inputs, shape.n_layers, int(budget - machine.resident_memory() - later))


def operations(shape: ModelArgs, tokens: int) -> int:
    """Return the operations of the products of an update: one forward, and one for the gradient of the inputs."""
    model = Mistral7B(shape, device="meta")
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2) - shape.vocab_size * shape.dim
    return 4 * weights * tokens


def main(
    layers: int = 32,
    seq_len: int = 1024,
    updates: int = 2,
    budget: float = 7.0,
    recompute: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure some updates, after one that is not counted.

    Args:
        layers: Blocks of the model.
        seq_len: Tokens of an update.
        updates: Updates that are timed.
        budget: Resident memory to stay within, in GB.
        recompute: Blocks that are recomputed in the backward pass; None: as few as the budget allows.
        json_file: Write the record to this file.
    """
    threads.use()
    machine.return_large_blocks()  # as `finetune` does
    shape, load, before = dataclasses.replace(ModelArgs(), n_layers=layers), os.getloadavg()[0], matrix_peak()
    with tempfile.TemporaryDirectory() as folder:
        task = Task(OURS, dataclasses.asdict(shape), seq_len, folder)
        model = random_model(shape, "int4")
        count = blocks_to_recompute(task, shape, budget * 1e9) if recompute is None else recompute
        engine = Ours(dataclasses.replace(task, recompute=count), model)
        engine.run(1)
        done = engine.run(updates)
    after = matrix_peak()
    seconds = statistics.median(done.seconds)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(Path(__file__).parent),
        "command": "python " + " ".join(sys.argv), "cpu": machine.cpu_name(), "cores": machine.cores(),
        "load": load, "torch": torch.__version__, "layers": layers, "recomputed": count,
        "peak_gb": machine.peak_memory() / 1e9, "seconds": done.seconds, "losses": done.losses,
        "tokens_per_s": seq_len / seconds, "gflop_per_token": operations(shape, seq_len) / seq_len / 1e9,
        "matrix_peak": [before, after],
        "share_of_peak": operations(shape, seq_len) / seconds / max(before, after),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
