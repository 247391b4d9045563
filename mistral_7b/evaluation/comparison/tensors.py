"""The difference of two models' weights, tensor by tensor, and how much of it the rounding of each file explains.

    error   |W_B - W_A| / |W_A|, of the whole tensor and of its worst row
    bound   2 sqrt(u_A^2 + u_B^2), where u is the relative rounding error of the stored type: 2^-9 of bfloat16,
            2^(1 - b) of a block format of b bits per weight

Rounding to nearest gives half the bound or less. A tensor beyond it holds other values: permuted, swapped, scaled
or another model's. Errors that hide within the bound of a coarse format are found by their effect (run.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...checkpoint.names import EMBEDDING, OUTPUT, expected
from .sides import Side

ROW_BOUND = 2.0  # a row's errors vary more than a tensor's


@dataclasses.dataclass(frozen=True)
class Difference:
    """The error of one tensor of B, relative to A's; `update` is the part of an adapter's update in it."""

    name: str
    error: float
    worst_row: float
    bound: float
    update: tuple[float, ...] = (0.0, 0.0, 0.0)  # <B - A, U>, <U, U>, |B - A|^2, with A's update U, else B's
    elements: int = 1

    @property
    def beyond(self) -> bool:
        """Whether rounding does not explain it; so also where it is not a number."""
        return not (self.error <= self.bound and self.worst_row <= ROW_BOUND * self.bound)

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


def differences(a: Side, b: Side) -> Iterator[Difference]:
    """Yield the difference of every tensor, in the order of the forward pass."""
    for name, _ in expected(a.args):
        yield difference(a, b, name, shared(b, name, b.weight(name), a))


def difference(a: Side, b: Side, name: str, other: Tensor) -> Difference:
    """The difference of A's tensor and `other`, which B has in its place, in A's shape."""
    own = shared(a, name, a.weight(name), b)
    bound = 2 * math.hypot(a.unit(name), b.unit(name))
    if own.shape != other.shape:
        return Difference(name, math.inf, math.inf, bound)
    delta = other - own
    error = (delta.norm() / own.norm().clamp_min(1e-30)).item()
    worst = error
    if own.dim() > 1:
        rows, size = delta.norm(dim=1), own.norm(dim=1)
        worst = (rows / size.clamp_min(size.square().mean().sqrt().item() or 1e-30)).max().item()
    out = Difference(name, error, worst, bound, elements=own.numel())
    adapted = a if a.adapter is not None else b
    if (update := adapted.update(name)) is not None and update.shape == delta.shape:
        delta, update = delta.double(), update.double()
        sums = ((delta * update).sum(), update.square().sum(), delta.square().sum())
        out = dataclasses.replace(out, update=tuple(t.item() for t in sums))
    for side in (a, b):
        side.release(name)
    return out


def shared(side: Side, name: str, weight: Tensor, other: Side) -> Tensor:
    """A tensor in the shape that both sides can have: key and value heads repeated, rows of padding left out."""
    if name in (EMBEDDING, OUTPUT):
        return weight[: min(side.args.vocab_size, other.args.vocab_size)]
    own, most = side.args.n_kv_heads, max(side.args.n_kv_heads, other.args.n_kv_heads)
    if own == most or most % own or not name.endswith(("wk.weight", "wv.weight")):
        return weight
    return weight.unflatten(0, (own, -1)).repeat_interleave(most // own, 0).flatten(0, 1)


def noisy(side: Side, found: list[Difference]) -> Side:
    """The model with random errors, independent of the weights, in place of the other's: of each tensor's size."""
    size = {d.name: d.error for d in found}
    seeds = {d.name: i for i, d in enumerate(found)}
    tied = side.args.tie_embeddings

    def weight(name: str, inner: object) -> Tensor:
        source = EMBEDDING if tied and name == OUTPUT else name
        out = side.weight(source)
        if not 0 < size[source] < math.inf:
            return out
        drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(seeds[source]))
        return out + drawn * (size[source] * out.norm() / math.sqrt(out.numel()))

    return side.changed(weight)
