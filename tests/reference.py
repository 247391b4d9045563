"""The truth: Mistral 7B written a second time, in float64 and loops, without a cache.

From the papers alone: grouped-query and sliding-window attention and table 1 of arXiv:2310.06825,
rotary embedding from arXiv:2104.09864, SwiGLU from arXiv:2002.05202, RMSNorm from arXiv:1910.07467.
It imports nothing of the package, keeps nothing between calls, and computes every token, head, query
and key on its own; numpy adds up along the width of one vector and nothing more.

Weights carry Mistral's own names (`layers.0.attention.wq.weight`, ...) and its own, interleaved,
rotary layout: neighbours 2i and 2i + 1 of a head turn together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def reference_logits(
    weights: Mapping[str, NDArray],
    tokens: Sequence[int],
    *,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    norm_eps: float,
    rope_theta: float,
    window: int | None,
    sequence_ids: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """Logits of every token: (T, V). `sequence_ids` tell apart sequences that share the list."""
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    ids = [0] * len(tokens) if sequence_ids is None else list(sequence_ids)
    positions = [sum(1 for earlier in ids[:i] if earlier == ids[i]) for i in range(len(ids))]

    x = [w["tok_embeddings.weight"][t] for t in tokens]
    for n in range(n_layers):
        at = f"layers.{n}."
        normed = [rms_norm(v, w[at + "attention_norm.weight"], norm_eps) for v in x]
        heads = attend(
            [linear(w[at + "attention.wq.weight"], v) for v in normed],
            [linear(w[at + "attention.wk.weight"], v) for v in normed],
            [linear(w[at + "attention.wv.weight"], v) for v in normed],
            positions, ids, n_heads, n_kv_heads, head_dim, rope_theta, window,
        )  # fmt: skip
        x = [v + linear(w[at + "attention.wo.weight"], h) for v, h in zip(x, heads, strict=True)]
        normed = [rms_norm(v, w[at + "ffn_norm.weight"], norm_eps) for v in x]
        x = [v + feed_forward(w, at + "feed_forward.", h) for v, h in zip(x, normed, strict=True)]
    x = [rms_norm(v, w["norm.weight"], norm_eps) for v in x]
    return np.stack([linear(w["output.weight"], v) for v in x])


def linear(matrix: Vector, x: Vector) -> Vector:
    return np.array([np.dot(row, x) for row in matrix])


def rms_norm(x: Vector, weight: Vector, eps: float) -> Vector:
    return x / math.sqrt(np.dot(x, x) / len(x) + eps) * weight


def feed_forward(w: Mapping[str, Vector], at: str, x: Vector) -> Vector:
    gate = linear(w[at + "w1.weight"], x)
    up = linear(w[at + "w3.weight"], x)
    return linear(
        w[at + "w2.weight"], np.array([g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
    )


def rotated(x: Vector, position: int, theta: float) -> Vector:
    out = np.empty_like(x)
    for i in range(len(x) // 2):
        angle = position * theta ** (-2 * i / len(x))
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def sees(i: int, j: int, positions: Sequence[int], ids: Sequence[int], window: int | None) -> bool:
    """A query sees its own key, and those before it in its sequence, up to `window` keys in all."""
    back = positions[i] - positions[j]
    return ids[i] == ids[j] and back >= 0 and (window is None or back <= window - 1)


def attend(
    q: list[Vector],
    k: list[Vector],
    v: list[Vector],
    positions: Sequence[int],
    ids: Sequence[int],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    theta: float,
    window: int | None,
) -> list[Vector]:
    """For each token its heads' outputs, one after another: n_heads * head_dim numbers."""
    T = len(q)
    out = [np.zeros(n_heads * head_dim) for _ in range(T)]
    for head in range(n_heads):
        of = slice(head * head_dim, (head + 1) * head_dim)
        shared = head // (n_heads // n_kv_heads)  # the key and value head that this query head reads
        kv = slice(shared * head_dim, (shared + 1) * head_dim)
        turned = [rotated(k[j][kv], positions[j], theta) for j in range(T)]
        for i in range(T):
            query = rotated(q[i][of], positions[i], theta)
            seen = [j for j in range(T) if sees(i, j, positions, ids, window)]
            scores = [np.dot(query, turned[j]) / math.sqrt(head_dim) for j in seen]
            top = max(scores)
            parts = [math.exp(score - top) for score in scores]
            for part, j in zip(parts, seen, strict=True):
                out[i][of] += part / sum(parts) * v[j][kv]
    return out
