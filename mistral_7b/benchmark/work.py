"""What a piece of work cannot do without, counted by hand: operations, bytes, and the time they take at best.

N layers · D width · H query heads · G key/value heads · K head width · F feed-forward width · V vocabulary
A multiplication and an addition are two operations. Embedding, norms and softmax are left out: below 1%.
"""

from __future__ import annotations

from typing import Any

# Bits a weight takes, its share of scales included. Ours is counted from the tensors; this is for planning.
BITS = {"none": 16.0, "bf16": 16.0, "int8": 8.0, "int4": 4.25, "Q8_0": 8.5, "Q4_0": 4.5, "BF16": 16.0}


def layer_weights(args: dict[str, Any]) -> int:
    """Weights of all layers' matrices: N (2 D H K + 2 D G K + 3 D F)."""
    heads = args["n_heads"] + args["n_kv_heads"]
    return args["n_layers"] * args["dim"] * (2 * heads * args["head_dim"] + 3 * args["hidden_dim"])


def table_weights(args: dict[str, Any]) -> int:
    """Weights of the projection onto the vocabulary, and as many of the embedding: D V."""
    return args["dim"] * args["vocab_size"]


def keys_seen(args: dict[str, Any], held: int, new: int) -> int:
    """Pairs of query and visible key when `new` tokens follow `held`: each sees itself and W - 1 before it."""
    window = args["sliding_window"] or held + new
    return sum(min(p + 1, window) for p in range(held, held + new))


def operations(args: dict[str, Any], rows: int, held: int, new: int) -> int:
    """Of one forward in which each row has `new` tokens after `held`, and its last one is projected."""
    attention = 4 * args["n_layers"] * args["n_heads"] * args["head_dim"] * keys_seen(args, held, new)
    return rows * (2 * layer_weights(args) * new + 2 * table_weights(args) + attention)


def bytes_read(args: dict[str, Any], weight_bytes: int, kv_token_bytes: int, rows: int, held: int) -> int:
    """Of one forward: every weight once, whatever the number of rows, and each row's keys and values."""
    return weight_bytes + rows * kv_token_bytes * min(held, args["sliding_window"] or held)


def weight_memory(args: dict[str, Any], scheme: str) -> int:
    """Bytes that a model of this shape takes, nearly."""
    return round((layer_weights(args) + 2 * table_weights(args)) * BITS[scheme] / 8)


def least_seconds(ops: float, size: float, peak: float, bandwidth: float) -> float:
    """The roofline: operations and reading run side by side, and the slower one decides."""
    return max(ops / peak, size / bandwidth)
