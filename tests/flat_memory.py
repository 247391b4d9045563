"""Memory does not grow beyond the window: decode three windows and print resident memory on the way.

    python tests/flat_memory.py [--windows 3] [--no-window]

A model of middling size with random weights: 4 layers, width 512, window 512. The first forwards fill
PyTorch's own pools, so memory is judged from the end of the first window on: it may then grow by 1 MB
at most. `--no-window` is the negative control: full attention, whose cache grows with every token, and
which is expected to fail. Ends with status 1 when memory grew.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import sys
import time

import torch

from mistral_7b.generate import stream
from mistral_7b.model import Mistral7B, ModelArgs
from mistral_7b.sampling.params import SamplingParams

WINDOW = 512
ALLOWED = 1.0  # MB


def resident_mb() -> float:
    """Resident memory in MB: now, on Linux; elsewhere the highest so far."""
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--no-window", action="store_true", help="full attention: a cache that grows")
    options = parser.parse_args()
    args = ModelArgs(
        dim=512, n_layers=4, head_dim=64, hidden_dim=1408, n_heads=8, n_kv_heads=2, vocab_size=4096,
        sliding_window=None if options.no_window else WINDOW,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mistral7B(args, dtype=torch.float32)
    params = SamplingParams(max_tokens=options.windows * WINDOW, ignore_eos=True, seed=0)
    settled, start = 0.0, time.perf_counter()
    print(f"{'tokens':>8} {'windows':>8} {'resident MB':>12} {'since the first window':>24}")
    for i, _ in enumerate(stream(model, [1], params), start=1):
        if i % (WINDOW // 4) == 0:
            now = resident_mb()
            settled = now if i == WINDOW else settled
            grown = f"{now - settled:+.2f}" if i >= WINDOW else ""
            print(f"{i:8} {i / WINDOW:8.2f} {now:12.2f} {grown:>24}", flush=True)
    grown_mb, seconds = resident_mb() - settled, time.perf_counter() - start
    print(f"{grown_mb:+.2f} MB in {options.windows - 1} windows beyond the first (at most {ALLOWED} allowed);"
          f" {params.max_tokens / seconds:.0f} tokens/s")  # fmt: skip
    return int(grown_mb > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
