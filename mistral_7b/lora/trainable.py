"""LoRA that is trained: y = W x + scale B (A dropout(x)), with A and B the only parameters that have a gradient.

    parameters = adapt(model, LoraArgs(rank=16), seed=0)   # in place; the base's weights are frozen
    ...                                                     # forward, backward, optimizer step
    save_adapter(trained_adapter(model), "out", model.args)

W is any Linear: plain, packed bfloat16, int8 or int4. Its product is the one that is served, and so is the update,
with the factors rounded to the type of x: the logits are those of the saved adapter.

r rank · K inputs · N outputs
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterError
from ..model import Mistral7B
from ..surgery import replace_linears
from .adapters import check_factors, shell
from .files import Adapter, Factors

LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # of each block
TARGETS = (*LINEARS, "output")


@dataclasses.dataclass(frozen=True)
class LoraArgs:
    """The shape of a new adapter. AdapterError, naming the field, for what it cannot be.

    The defaults adapt all Linears of each block, because adapting attention alone is worse at equal size ("LoRA
    Without Regret", Schulman et al., 2025; QLoRA, arXiv:2305.14314, section 4), at a scale of 2, that of
    mistral-finetune.
    """

    rank: int = 16
    """Rank r of the update of each Linear."""
    alpha: float = 32.0
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs of A that are set to zero in training."""
    targets: tuple[str, ...] = LINEARS
    """The adapted Linears, by the last part of their names; "output" is the projection onto the vocabulary."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv:2312.03732): for high ranks."""

    def __post_init__(self) -> None:
        problems = {
            "rank": self.rank < 1 and f"must be at least 1, not {self.rank}",
            "alpha": not 0 < self.alpha < math.inf and f"must be a finite number above 0, not {self.alpha}",
            "dropout": not 0 <= self.dropout < 1 and f"must be at least 0 and below 1, not {self.dropout}",
            "targets": (not self.targets or not set(self.targets) <= set(TARGETS))
            and f"must be some of {', '.join(TARGETS)}, not {', '.join(self.targets) or 'none'}",
        }
        for field, problem in problems.items():
            if problem:
                raise AdapterError(f"LoraArgs.{field} {problem}", field=field)

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class _AddUpdate(torch.autograd.Function):
    """y (..., N) += low (..., r) (scale B)^T, in place, rounded once as an adapter that is served.

    `low` is small, and kept apart from the saved tensors: recomputation of a block ends at the last of these,
    before y.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.mark_dirty(y)
        ctx.kept = low.detach(), b.detach(), scale
        factor = (b * scale).to(y.dtype)
        y.view(-1, len(b)).addmm_(low.reshape(-1, low.shape[-1]), factor.t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        low, b, scale = ctx.kept
        rows = grad.reshape(-1, len(b))
        d_low = (rows @ (b * scale).to(grad.dtype)).view_as(low)
        d_b = (low.reshape(-1, low.shape[-1]).t() @ rows).t().to(b.dtype) * scale  # transposed: faster in bfloat16
        return grad, d_low, d_b, None


class TrainableLinear(nn.Module):
    """A Linear with a trainable low-rank update: y = base(x) + scale B (A dropout(x))."""

    in_features: int
    out_features: int

    def __init__(self, base: nn.Module, factors: Factors, dropout: float = 0.0) -> None:
        """The factors are copied to float32 parameters on their own device."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features  # type: ignore[assignment]
        self.base, self.scale, self.dropout = base, factors.scale, dropout
        self.a = nn.Parameter(factors.a.to(torch.float32, copy=True))  # (r, K)
        self.b = nn.Parameter(factors.b.to(torch.float32, copy=True))  # (N, r)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.a.to(x.dtype))  # (..., r)
        # After all that is saved: recomputation for the backward pass can leave out the product of the base.
        out: Tensor = _AddUpdate.apply(self.base(x), low, self.b, self.scale)
        return out

    def extra_repr(self) -> str:
        return f"rank={len(self.a)}, scale={self.scale:g}, dropout={self.dropout:g}"


def adapt(model: Mistral7B, args: LoraArgs, seed: int, start: Adapter | None = None) -> list[nn.Parameter]:
    """Make Linears of `model` trainable, in place, and freeze everything else; returns the factors.

    A new A is uniform within 1 / sqrt(K), as PEFT draws it. `seed` alone determines it: it is drawn by a generator
    of its own, in the order of the model and on the CPU. B is zero, so that training begins at the base model.
    With `start`, its Linears, ranks and scales are continued, and `args` gives the dropout only.

    Raises AdapterError if `model` is adapted already, the rank exceeds its width, or `start` does not fit it or is
    more than plain LoRA.
    """
    if any(isinstance(module, TrainableLinear) for module in model.modules()):
        raise AdapterError("the model is adapted already", field="model", hint="load it again")
    if start is None and args.rank > model.args.dim:
        raise AdapterError(
            f"LoraArgs.rank {args.rank} exceeds the width {model.args.dim} of the model", field="rank"
        )
    generator = torch.Generator().manual_seed(seed)
    device = model.norm.weight.device

    def drawn(base: nn.Module) -> Factors:
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(args.rank, inputs).uniform_(-bound, bound, generator=generator)
        return Factors(a, torch.zeros(outputs, args.rank), args.scale)

    def build(base: nn.Module, name: str) -> nn.Module:
        return TrainableLinear(base, drawn(base) if start is None else start.targets[name], args.dropout).to(
            device
        )

    if start is not None:
        _check_start(model, start)
    model.requires_grad_(False)
    chosen = args.targets if start is None else ()

    def where(name: str, module: nn.Module) -> bool:
        if start is not None:
            return name in start.targets
        return hasattr(module, "in_features") and name.split(".")[-1] in chosen

    replace_linears(model, build, where)
    return [p for p in model.parameters() if p.requires_grad]


def _check_start(model: Mistral7B, start: Adapter) -> None:
    """AdapterError if an adapter cannot be continued."""
    if start.magnitudes or start.biases or start.weights or "tok_embeddings" in start.targets:
        raise AdapterError(
            "only the factors of Linears can be trained further, and this adapter has more",
            field="start",
            place=start.source or None,
            hint="merge it into its base, and train a new adapter of the merged model",
        )
    linears = dict(model.named_modules())
    for target, factors in start.targets.items():
        check_factors(start.source, target, factors.a, factors.b, linears.get(target))


def trained_adapter(model: Mistral7B) -> Adapter:
    """Return the adapter that `adapt` made of the model's Linears, as it is trained by now.

    Its float32 factors share memory with the parameters: save or copy it before the next optimizer step. Its base
    and its tokenizer are those that the model was opened from.
    AdapterError if the model has none.
    """
    targets = {
        name: Factors(module.a.detach(), module.b.detach(), module.scale)
        for name, module in model.named_modules()
        if isinstance(module, TrainableLinear)
    }
    if not targets:
        raise AdapterError("the model has no trained adapter", field="model", hint="`adapt` makes one")
    return Adapter(targets, base_model=str(model.source or ""), tokenizer=model.source)


def without_adapter(model: Mistral7B) -> Mistral7B:
    """Return the base that `adapt` adapted, as a tree of modules of its own that shares its weights."""

    def base(linear: nn.Module, name: str) -> nn.Module:
        assert isinstance(linear, TrainableLinear)
        return linear.base

    out = shell(model)
    replace_linears(out, base, lambda _, module: isinstance(module, TrainableLinear))
    assert isinstance(out, Mistral7B)
    return out
