"""Time and memory of quantizing a 7B model, from one layer of its shape with random weights.

    python experiments/quantize_7b.py FOLDER [--scheme int4] [--calibration-tokens 4096]     needs 2 GB in FOLDER

Quantizes a checkpoint of one layer as `mistral-7b quantize` does. The time of 7B is that of 32 such layers, the
embedding and the output layer. CPU seconds are those of all threads: on busy cores they tell more than the clock.
"""

from __future__ import annotations

import dataclasses
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from mistral_7b import Mistral7B, ModelArgs
from mistral_7b.checkpoint import quantize

LAYERS = 32


def measure(source: Path, out: Path, scheme: str, calibration_tokens: int, tokens: int) -> None:
    """Quantize and print the times of the layer and of the rest, and the peak of memory."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (max(1, tokens // 512), min(512, tokens)), generator=draw)
    guide = torch.randint(0, 32000, (calibration_tokens // 512, 512), generator=draw)
    times = {"": (time.perf_counter(), time.process_time())}

    def progress(done: int, total: int, name: str) -> None:
        times[name.split(".")[0]] = (time.perf_counter(), time.process_time())

    quantize(source, out, scheme, ids, "", progress, calibration_tokens=list(guide) if len(guide) else None)
    times["end"] = (time.perf_counter(), time.process_time())
    for i, clock in enumerate(("elapsed", "CPU")):
        at = {name: value[i] for name, value in times.items()}
        layer = at["layers"] - at["tok_embeddings"]
        rest = at["end"] - at[""] - layer
        minutes = (LAYERS * layer + rest) / 60
        print(f"{clock} seconds: a layer {layer:.1f}, the rest {rest:.1f}; 7B: {minutes:.0f} minutes", flush=True)
    print(f"peak of resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def main(
    folder: tyro.conf.Positional[Path],
    scheme: str = "int4",
    calibration_tokens: int = 4096,
    tokens: int = 4096,
    measured: bool = False,
) -> None:
    """Create the checkpoint, then measure in a process of its own.

    Args:
        folder: Where the checkpoint and its quantized form are written, and removed.
        scheme: The quantization scheme.
        calibration_tokens: Tokens to calibrate on; 0 rounds to nearest.
        tokens: Tokens to measure the distance on.
        measured: Measure an existing checkpoint in this process.
    """
    source, out = folder / "quantize_7b", folder / "quantize_7b-quantized"
    if measured:
        measure(source, out, scheme, calibration_tokens, tokens)
        return
    try:
        args = dataclasses.replace(ModelArgs(), n_layers=1)
        Mistral7B(args, dtype=torch.bfloat16).requires_grad_(False).save_pretrained(source)
        subprocess.run([sys.executable, *sys.argv, "--measured"], check=True)
    finally:
        for path in (source, out):
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    tyro.cli(main)
