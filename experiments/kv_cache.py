"""Measure the loss of an int8 KV cache: a model's distance from itself with a KV cache of another type.

    python experiments/kv_cache.py --json-file FILE                  the bundled model in bfloat16, held-out files
    python experiments/kv_cache.py --text news.txt --json-file FILE  the starter model in float32, rows of a text

Each row is prefilled into a rolling cache of each type in chunks, so that most keys are read from the cache. The
bundled model's files are longer than its window, so that the ring buffer wraps around. The starter's weights are
dequantized: the products of quantized weights round their input, so that any difference grows to more than that of
the cache.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from calibration import documents
from commits import finish
from torch import Tensor

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.bench.quality.ours import float_model
from mistral_7b.cache import Cache, RollingCache
from mistral_7b.checkpoint import hub
from mistral_7b.checkpoint.reading import open_checkpoint
from mistral_7b.evaluation import Distance
from mistral_7b.quantization.distance import Comparison


class RoundedCache:
    """A rolling cache of float32 that stores bfloat16 numbers, for a model of float32."""

    def __init__(self, ring: RollingCache) -> None:
        self.ring = ring
        self.layers = [RoundedMemory(memory.attend) for memory in ring.layers]

    def writable(self) -> RoundedCache:
        return self

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        return self.ring.extend(tokens, sequence_ids)


class RoundedMemory:
    """One layer of a RoundedCache."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self._attend = attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype))


def starter_in_float32() -> Mistral7B:
    """The starter model with dequantized weights."""
    return float_model(open_checkpoint(hub.resolve("starter")))


def rows_of(text: str, n: int, tokens: int) -> list[list[int]]:
    """The first n rows of a text in the starter's tokens; the last token of each also begins the next."""
    ids = Tokenizer.from_pretrained("starter").encode(text)
    return [ids[at : at + tokens] for at in range(0, n * (tokens - 1), tokens - 1)]


def logits(model: Mistral7B, tokens: Tensor, chunk: int, cache: Cache) -> Tensor:
    """Return the logits (T, V) of tokens (T,), prefilled into a cache in chunks."""
    return torch.cat([model(part[None], cache)[0][0] for part in tokens.split(chunk)])


def token_bytes(ring: RollingCache) -> int:
    """Return the bytes of one position in all layers, including scales."""
    return sum(t.nbytes for memory in ring.layers for t in memory.entries) // ring.slots


def main(
    json_file: Path | None = None, text: Path | None = None, rows: int | None = None, tokens: int = 513,
    chunk: int = 128,
) -> None:  # fmt: skip
    """Measure and print the distances.

    Args:
        json_file: Write the record to this file.
        text: Measure the starter model in float32 on this text, instead of the bundled one in bfloat16.
        rows: Rows of the text, by default 4; or held-out files, evenly spread over their list, by default 20.
        tokens: Tokens per row or file; the last one is only predicted.
        chunk: Tokens per forward.
    """
    if text is None:
        model = Mistral7B.from_pretrained("demo", dtype=torch.bfloat16)
        files = documents("held_out", tokens)
        count = min(rows or 20, len(files))
        ids = [files[i * len(files) // count] for i in range(count)]
        source = {"model": "demo", "dtype": "bfloat16", "files": count}
    else:
        model, words = starter_in_float32(), text.read_text(encoding="utf-8")
        ids = rows_of(words, rows or 4, tokens)
        sha256 = hashlib.sha256(words.encode()).hexdigest()
        source = {"model": "starter", "dtype": "float32", "rows": len(ids), "text_sha256": sha256}
    model.requires_grad_(False)
    own = str(model.norm.weight.dtype).removeprefix("torch.")
    comparisons = {f"int8 from {own}": Comparison()}
    if text is not None:
        comparisons |= {"int8 from bfloat16": Comparison(), "bfloat16 from float32": Comparison()}
    for row in map(torch.tensor, ids):

        def run(kv_dtype: torch.dtype | None, rounded: bool = False, row: Tensor = row) -> Tensor:
            ring = model.rolling_cache(max_seq_len=len(row), kv_dtype=kv_dtype)
            return logits(model, row[:-1], chunk, RoundedCache(ring) if rounded else ring)

        found = {own: run(None), "int8": run(torch.int8)}
        if text is not None:
            found["bfloat16"] = run(None, rounded=True)
        for name, comparison in comparisons.items():
            other, base = name.split(" from ")
            comparison.add(found[base], found[other], row[1:])
    sizes = [token_bytes(model.rolling_cache(1, 1, kv_dtype=kv_dtype)) for kv_dtype in (None, torch.int8)]
    record: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **source, "window": model.args.sliding_window, "chunk": chunk,
        "bytes_a_token": dict(zip((own, "int8"), sizes, strict=True)),
        "distances": {name: Distance.of(c).to_dict() for name, c in comparisons.items()},
    }  # fmt: skip
    finish(record, json_file)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    tyro.cli(main)
