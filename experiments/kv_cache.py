"""Measure the loss of an int8 KV cache: the bundled model's distance from itself with a bfloat16 cache.

    python experiments/kv_cache.py --json-file experiments/results/2026-11-24-kv-int8.json

The beginnings of held-out files are prefilled into a rolling cache of each type in chunks, so that most keys
are read from the cache. The texts are longer than the window, so that the ring buffer wraps around.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from calibration import documents
from commits import commit_of
from torch import Tensor

from mistral_7b import Mistral7B
from mistral_7b.cache import RollingCache
from mistral_7b.evaluation import Distance
from mistral_7b.quantization.distance import Comparison


def logits(model: Mistral7B, tokens: Tensor, chunk: int, kv_dtype: torch.dtype | None) -> Tensor:
    """Return the logits (T, V) of tokens (T,), prefilled into a rolling cache in chunks."""
    ring = model.rolling_cache(max_seq_len=len(tokens), kv_dtype=kv_dtype)
    return torch.cat([model(part[None], ring)[0][0] for part in tokens.split(chunk)])


def token_bytes(ring: RollingCache) -> int:
    """Return the bytes of one position in all layers, including scales."""
    return sum(t.nbytes for memory in ring.layers for t in memory.entries) // ring.slots


def main(json_file: Path | None = None, files: int = 20, tokens: int = 513, chunk: int = 128) -> None:
    """Measure and print the distance.

    Args:
        json_file: Write the record to this file.
        files: Number of held-out files, evenly spread over their list.
        tokens: Tokens per file; the last one is only predicted.
        chunk: Tokens per forward.
    """
    model = Mistral7B.from_pretrained("demo", dtype=torch.bfloat16).requires_grad_(False)
    texts = documents("held_out", tokens)
    files = min(files, len(texts))
    texts = [texts[i * len(texts) // files] for i in range(files)]
    comparison = Comparison()
    for ids in map(torch.tensor, texts):
        plain, int8 = (logits(model, ids[:-1], chunk, kv_dtype) for kv_dtype in (None, torch.int8))
        comparison.add(plain, int8, ids[1:])
    sizes = [token_bytes(model.rolling_cache(kv_dtype=kv_dtype)) for kv_dtype in (None, torch.int8)]
    cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(),
        "command": "python " + " ".join(sys.argv), "cpu": cpu.split(":")[1].strip(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "files": files, "window": model.args.sliding_window, "chunk": chunk,
        "bytes_a_token": dict(zip(("bfloat16", "int8"), sizes, strict=True)),
        "distance": Distance.of(comparison).to_dict(),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    tyro.cli(main)
