"""Minimum operations, bytes and time of a workload, counted analytically.

N layers · D width · H query heads · G key/value heads · K head width · F feed-forward width · V vocabulary
A multiply-add is two operations. Embedding, norms and softmax are omitted: below 1%.
"""

from __future__ import annotations

from typing import Any

# Bits per weight including scales, for planning. Records count our bytes from the tensors.
BITS = {
    "none": 16.0,
    "bf16": 16.0,
    "int8": 8.5,
    "q6_k": 6.5625,
    "q4_k_m": 4.85,
    "int4": 4.5,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q4_K_M": 4.85,
    "Q4_K": 4.5,
    "Q4_0": 4.5,
    "BF16": 16.0,
}


def layer_weights(args: dict[str, Any]) -> int:
    """Return the number of weights in all layers' matrices: N (2 D H K + 2 D G K + 3 D F)."""
    heads = args["n_heads"] + args["n_kv_heads"]
    return args["n_layers"] * args["dim"] * (2 * heads * args["head_dim"] + 3 * args["hidden_dim"])


def table_weights(args: dict[str, Any]) -> int:
    """Return the number of weights in the output projection or in the embedding: D V."""
    return args["dim"] * args["vocab_size"]


def keys_seen(args: dict[str, Any], held: int, new: int) -> int:
    """Return the number of (query, visible key) pairs when `new` tokens follow `held`.

    Each token attends to itself and the W - 1 tokens before it.
    """
    window = args["sliding_window"] or held + new
    return sum(min(p + 1, window) for p in range(held, held + new))


def operations(args: dict[str, Any], rows: int, held: int, new: int) -> int:
    """Return the operations of a forward pass with `new` tokens per row after `held`.

    Only the last token of each row is projected onto the vocabulary.
    """
    attention = 4 * args["n_layers"] * args["n_heads"] * args["head_dim"] * keys_seen(args, held, new)
    return rows * (2 * layer_weights(args) * new + 2 * table_weights(args) + attention)


def bytes_read(args: dict[str, Any], weight_bytes: int, kv_token_bytes: int, rows: int, held: int) -> int:
    """Return the bytes read by a forward pass: each weight once, each row's keys and values."""
    return weight_bytes + rows * kv_token_bytes * min(held, args["sliding_window"] or held)


def weight_memory(args: dict[str, Any], scheme: str) -> int:
    """Return the approximate bytes of a model of this shape."""
    return round((layer_weights(args) + 2 * table_weights(args)) * BITS[scheme] / 8)


def least_seconds(ops: float, size: float, peak: float, bandwidth: float) -> float:
    """Return the roofline time: computation and reads overlap, and the slower one counts."""
    return max(ops / peak, size / bandwidth)
