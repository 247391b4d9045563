"""One adapter for the whole model, with all that an adapter can have; `Adapters` are plain LoRA, row by row.

    model, rest = apply(model, read_adapter("path/of/an/adapter", model.args))

Modules with more than plain LoRA are replaced in a copy of the model that shares its weights:

    LoRA        y = W x + scale (B A x + bias)
    DoRA        y = m (W + scale B A) x / |W + scale B A|      the norm of each row (arXiv:2402.09353, eq. 5)
    embedding   rows E[t] + scale (B A)[t]
    whole       the adapter's own weight in place of the model's

What remains is plain LoRA of Linears, which is left to `Adapters` and their kernels.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.names import OUTPUT
from ..errors import AdapterError
from ..kernels.backend import LOW_RANK, Backend, uses
from ..kernels.low_rank import LowRank, LowRanks, Mixture
from ..model import Mistral7B, RMSNorm
from .adapters import own_targets, own_weights, shell
from .files import Adapter, Factors


class AdaptedLinear(nn.Module):
    """A Linear with one adapter for every row: y = gain (W x + scale B A x) + bias."""

    def __init__(self, base: nn.Module, factors: Factors, like: Tensor, mixture: Mixture) -> None:
        """`like` is a tensor of the model's type and device; `mixture` is one that other Linears may share."""
        super().__init__()
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.base = base
        low = LowRank(factors.a, factors.b.double() * factors.scale, like.dtype, like.device)
        self.a, self.b = low.a, low.b  # (r, K), (r, N): the module's own, for the model's fingerprint
        self.adapters = LowRanks([low], mixture)
        self.gain: Tensor | None = None  # (N,), with DoRA
        self.bias: Tensor | None = None  # (N,)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        y = self.base(x)
        if uses(Backend.CPU, LOW_RANK, y, x, self.a):  # there a row does not depend on the others
            rows = y.numel() // self.out_features
            if self.adapters.mixture.total != rows:
                self.adapters.mixture.choose({0: range(rows)}, rows, "cpu")
            self.adapters.add(x, y)
        else:
            y = y + F.linear(x, self.a) @ self.b
        if self.gain is not None:
            y = (y * self.gain).to(y.dtype)
        return y if self.bias is None else (y + self.bias).to(y.dtype)


class AdaptedEmbedding(nn.Module):
    """An embedding with one adapter: row t is E[t] + scale B[t] A."""

    def __init__(self, base: nn.Module, factors: Factors, like: Tensor) -> None:
        super().__init__()
        self.base = base
        low = LowRank(factors.a, factors.b.double() * factors.scale, like.dtype, like.device)
        self.a, self.b = low.a, low.b  # (r, D), (r, V)

    def forward(self, tokens: Tensor) -> Tensor:  # (...) -> (..., D)
        return self.base(tokens) + self.b.T[tokens] @ self.a


def apply(model: Mistral7B, adapter: Adapter) -> tuple[Mistral7B, Adapter | None]:
    """Return the model with the parts of an adapter that are not plain LoRA, and the rest of the adapter.

    The model itself is not changed, and is returned if the adapter is plain; the rest is None if there is none.
    The vocabulary of the result is the adapter's. AdapterError for a part that this model cannot have.
    """
    whole, special = own_weights(model, adapter), own_targets(adapter)
    if not whole and not special:
        return model, adapter
    out, like, mixture = shell(model), model.norm.weight, Mixture()
    assert isinstance(out, Mistral7B)
    out.args = adapter.args(model.args)
    for name, weight in whole.items():
        path = name.removesuffix(".weight")
        out.set_submodule(path, _whole(out.get_submodule(path), weight.to(like)))
    if OUTPUT in whole:
        out.tie()
    for path in special:
        base = out.get_submodule(path)
        if path == "tok_embeddings":
            out.set_submodule(path, AdaptedEmbedding(base, adapter.targets[path], like))
        else:
            out.set_submodule(path, linear(base, path, adapter, like, mixture))
    rest = {name: factors for name, factors in adapter.targets.items() if name not in special}
    plain = dataclasses.replace(adapter, targets=rest, magnitudes={}, biases={}, weights={})
    return out, plain if rest else None


def linear(base: nn.Module, name: str, adapter: Adapter, like: Tensor, mixture: Mixture) -> AdaptedLinear:
    """Return the Linear `name` with all that an adapter has for it; see AdaptedLinear."""
    factors = adapter.targets[name]
    out = AdaptedLinear(base, factors, like, mixture)
    wide = torch.promote_types(like.dtype, torch.float32)
    if name in adapter.magnitudes:
        norm = updated(_weight(base, name), factors).norm(dim=1)
        out.gain = (adapter.magnitudes[name].to(norm) / norm).to(like.device, wide)
    if name in adapter.biases:
        out.bias = adapter.biases[name].to(like.device, wide) * factors.scale
    return out


def updated(weight: Tensor, factors: Factors) -> Tensor:
    """W + scale * B A (N, K), in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = factors.a.to(weight.device, wide), (factors.b.double() * factors.scale).to(weight.device, wide)
    return torch.addmm(weight.to(wide), b, a)


def _weight(base: nn.Module, name: str) -> Tensor:
    """The weight (N, K) of a Linear, quantized ones as they are computed with."""
    if callable(dequantized := getattr(base, "dequantized", None)):
        return dequantized()
    weight = dense() if callable(dense := getattr(base, "dense", None)) else base.weight
    if not isinstance(weight, Tensor):
        raise AdapterError(f"the weight of {name!r}, which DoRA's norm needs, cannot be read", field=name)
    return weight.detach()


def _whole(module: nn.Module, weight: Tensor) -> nn.Module:
    """Return a module of this kind with another weight, unquantized."""
    if isinstance(module, RMSNorm):
        out: nn.Module = copy.copy(module)
        out._parameters = {"weight": None}
        out.weight = nn.Parameter(weight, requires_grad=False)
        return out
    rows, columns = weight.shape
    if hasattr(module, "num_embeddings"):
        out = nn.Embedding(rows, columns, device="meta")
    else:
        out = nn.Linear(columns, rows, bias=False, device="meta")
    out.weight = nn.Parameter(weight, requires_grad=False)
    return out
