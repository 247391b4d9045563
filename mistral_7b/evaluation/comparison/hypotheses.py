"""What a broken converter may have done to one tensor: for each mistake, what undoes it.

A hypothesis is tried on B's tensor alone. It is accepted if what remains is within the bound of rounding, which
no wrong one reaches: two different orders of the rows of a trained weight differ by about 1.4 of its size.

H query heads · G key/value heads · K head width · V vocabulary · D width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from ...checkpoint.names import EMBEDDING, OUTPUT, half_split, interleaved
from .sides import Side, Weights

SWAPPED = (
    ("attention_norm", "ffn_norm"), ("feed_forward.w1", "feed_forward.w3"), ("attention.wk", "attention.wv"),
    ("attention.wq", "attention.wo"),
)  # fmt: skip
SHIFTS = (1, -1, 2, -2, 3, -3)  # rows of the vocabulary


class Hypothesis(NamedTuple):
    """A mistake by name, in words, and the tensor without it, computed from those of the side."""

    cause: str
    text: str
    undo: Callable[[Weights], Tensor]


def hypotheses(name: str, a: Side, b: Side) -> Iterator[Hypothesis]:
    """Yield the mistakes that a tensor of B, of a shape that both have, can be explained by."""
    kind = name.removesuffix(".weight").rpartition("layers.")[2].partition(".")[2]
    if name in (EMBEDDING, OUTPUT):
        yield from _vocabulary(name, a, b)
    if kind in ("attention.wq", "attention.wk", "attention.wv", "attention.wo"):
        yield from _heads(name, kind, a, b)
    for pair in SWAPPED:
        if kind in pair:
            other = name.replace(kind, pair[1 - pair.index(kind)])
            what = "norms_swapped" if "norm" in kind else "tensors_swapped"
            text = f"the file has {pair[0]} and {pair[1]} in each other's place"
            yield Hypothesis(what, text, lambda w, other=other: w(other))  # type: ignore[misc]
    weight = a.weight(name)
    if weight.dim() == 1:
        yield Hypothesis("norm_offset", "the norm's weights are 1 too large", lambda w: w(name) - 1)
        yield Hypothesis("norm_offset", "the norm's weights are 1 too small", lambda w: w(name) + 1)
    elif weight.shape[0] == weight.shape[1]:
        yield Hypothesis("transposed", "the matrix is transposed", lambda w: w(name).T)
    yield from _scaled(name, a, b)


def _scaled(name: str, a: Side, b: Side) -> Iterator[Hypothesis]:
    own, other = a.weight(name), b.weight(name)
    rows = min(len(own), len(other))
    own, other = own[:rows], other[:rows]
    if own.shape != other.shape:
        return
    scale = ((own * other).sum() / own.square().sum().clamp_min(1e-30)).item()
    if not math.isfinite(scale) or scale == 0 or abs(scale - 1) < 1e-3:
        return
    root = math.sqrt(a.args.dim)
    of = {root: f"sqrt({a.args.dim})", 1 / root: f"1 / sqrt({a.args.dim})"}
    factor = next((text for value, text in of.items() if abs(scale / value - 1) < 1e-2), f"{scale:.4g}")
    embedding = name == EMBEDDING or (name == OUTPUT and b.args.tie_embeddings)
    yield Hypothesis(
        "embedding_scale" if embedding else "scaled",
        f"the {'embedding' if embedding else 'weight'} is multiplied by {factor}",
        lambda w: w(name) / scale,
    )


def _vocabulary(name: str, a: Side, b: Side) -> Iterator[Hypothesis]:
    for shift in SHIFTS:
        text = f"the rows of the vocabulary are shifted by {shift}"
        yield Hypothesis("rows_shifted", text, lambda w, by=-shift: w(name).roll(by, 0))  # type: ignore[misc]
    if name == OUTPUT and not b.args.tie_embeddings:
        yield Hypothesis(
            "untied", "the output is not the embedding, to which it is tied in A", lambda w: w(EMBEDDING)
        )
    if name == OUTPUT and b.args.tie_embeddings and not a.args.tie_embeddings:
        text = "the output is tied to the embedding: the file lacks the output's own weight"
        yield Hypothesis("tied", text, lambda w: a.weight(OUTPUT))


def _heads(name: str, kind: str, a: Side, b: Side) -> Iterator[Hypothesis]:
    H, G, K = b.args.n_heads, b.args.n_kv_heads, b.args.head_dim
    own = H if kind in ("attention.wq", "attention.wo") else G
    if kind in ("attention.wq", "attention.wk"):
        to, back = ("Hugging Face's", "Mistral's")
        yield Hypothesis(
            "qk_not_permuted",
            f"the rows of {kind} are in {back} order, and the file's format has {to} (half-split)",
            lambda w: half_split(w(name), own),
        )
        yield Hypothesis(
            "qk_not_permuted",
            f"the rows of {kind} are in {to} order (half-split), and the file's format has {back} (interleaved)",
            lambda w: interleaved(w(name), own),
        )
        for other in {H, G, a.args.n_kv_heads} - {own}:
            for first, second in ((own, other), (other, own)):
                if own * K % (2 * other) == 0:
                    yield Hypothesis(
                        "kv_head_count",
                        f"the rows of {kind} are permuted as those of {other} heads; it has {own}",
                        lambda w, f=first, s=second: interleaved(half_split(w(name), f), s),  # type: ignore[misc]
                    )
    less = a.args.n_kv_heads
    if own == G > less and G % less == 0:
        yield Hypothesis(
            "kv_head_count",
            f"the {less} key and value heads are repeated to {G} as a whole (0 1 0 1), not each (0 0 1 1)",
            lambda w: w(name).unflatten(0, (G // less, less, K)).transpose(0, 1).flatten(0, 2),
        )
    dim = 1 if kind == "attention.wo" else 0
    for sizes, text in (
        ((K, own), "the head and its width are exchanged in"),
        ((G, own // G, K), "the heads are ordered by group, not by member, in"),
        ((own // G, G, K), "the heads are ordered by member, not by group, in"),
    ):
        if min(sizes) > 1:
            yield Hypothesis(
                "head_order",
                f"{text} {kind}",
                lambda w, s=sizes: (
                    w(name).unflatten(dim, s).transpose(dim, dim + 1).flatten(dim, dim + len(s) - 1)
                ),  # type: ignore[misc]
            )
