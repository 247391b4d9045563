"""Measure the time that sampling adds to a step: milliseconds per row of logits, by parameters and distribution.

    python experiments/sampling.py --json-file FILE

Flat logits are the worst case of top_p, which then keeps most of the vocabulary. The fastest and the median of the
calls are given, because other programs on the machine only add to the time. A pause comes before each call, as a
forward does in a step, so that the system does not preempt it for the work of the last calls.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path

import torch
import tyro

from mistral_7b import machine
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.sampling.sampler import Row, sample_rows

PAUSE = 0.005  # seconds
# Standard deviations of normal logits.
LOGITS = {"equal": 0.0, "flat": 0.01, "nearly flat": 0.3, "normal": 3.0, "peaked": 12.0}
PARAMETERS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(temperature=1),
    "top_p 0.95": SamplingParams(temperature=1, top_p=0.95),
    "top_k 40": SamplingParams(temperature=1, top_k=40),
    "top_k 20000, top_p 0.95": SamplingParams(temperature=1, top_k=20000, top_p=0.95),
    "min_p 0.05": SamplingParams(temperature=1, min_p=0.05),
}


def measured(logits: torch.Tensor, params: SamplingParams, times: int) -> tuple[float, float]:
    """The fastest and the median milliseconds per row."""
    rows = [Row(params, u=0.3 + 0.01 * i) for i in range(len(logits))]
    taken = []
    for _ in range(times + 3):
        time.sleep(PAUSE)
        began = time.perf_counter()
        sample_rows(logits, rows)
        taken.append((time.perf_counter() - began) / len(rows) * 1e3)
    taken = sorted(taken[3:])
    return taken[0], taken[times // 2]


def main(
    json_file: Path | None = None, vocabulary: int = 32000, rows: tuple[int, ...] = (1, 16), times: int = 60
) -> None:
    """Print a table of milliseconds per row: fastest / median.

    Args:
        json_file: Write the record to this file.
        vocabulary: Logits per row.
        rows: Numbers of rows that are sampled together.
        times: Calls per measurement.
    """
    torch.manual_seed(0)
    records = []
    for n in rows:
        print(f"{n} row{'s' * (n > 1)}".ljust(26) + "".join(name.rjust(16) for name in LOGITS))
        inputs = [torch.randn(n, vocabulary) * scale for scale in LOGITS.values()]
        for name, params in PARAMETERS.items():
            found = [measured(logits, params, times) for logits in inputs]
            print(name.ljust(26) + "".join(f"{f:.2f} / {m:.2f}".rjust(16) for f, m in found), flush=True)
            records += [
                {"rows": n, "parameters": name, "logits": kind, "fastest_ms": f, "median_ms": m}
                for kind, (f, m) in zip(LOGITS, found, strict=True)
            ]
    if json_file is not None:
        head = {
            "date": datetime.date.today().isoformat(), "commit": machine.commit(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "cpu": machine.cpu_name(), "vocabulary": vocabulary,
            "command": "python " + " ".join(sys.argv), "logits": LOGITS,
        }  # fmt: skip
        json_file.write_text(json.dumps(head | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    tyro.cli(main)
