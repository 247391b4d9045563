"""LoRA: many adapters of one model in memory; each row of a step uses one of them, or none.

    adapters = Adapters(model)
    adapters.load("sql", "path/of/an/adapter")
    with adapters.over([("sql", 1), (None, 7), ("sql", 3)]) as adapted:  # eleven rows, in their order
        hidden = adapted.hidden(tokens, batch)

The model itself is never changed. A second tree of modules shares its weights and wraps the Linears that any
adapter targets:

    y = W x                           every row, bit-identical to the model without adapters
    y[rows] += scale B (A x[rows])    for each adapter, its own rows

If no row has an adapter, the model itself runs, at full speed.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..kernels.cpu.arguments import Weights
from ..kernels.low_rank import LowRank, LowRanks, Mixture
from ..model import Mistral7B
from ..quantization.linear import Compressed
from ..surgery import replace_linears
from .files import Adapter, read_adapter

Source = str | os.PathLike[str] | Adapter  # an adapter, or the folder or file of one
Run = tuple[str | None, int]  # an adapter's name, None for the model alone, and a number of rows


class LoraLinear(nn.Module):
    """A Linear with the low-rank updates of adapters, each for some rows."""

    in_features: int
    out_features: int

    def __init__(self, base: nn.Module, adapters: LowRanks) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features  # type: ignore[assignment]
        self.base, self.adapters = base, adapters

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        y = self.base(x)
        self.adapters.add(x, y)
        return y


class CompressedLoraLinear(LoraLinear, Compressed):
    """A LoraLinear on a quantized Linear, which a block that runs in one kernel call accepts."""

    base: Compressed

    def described(self) -> Weights:
        out = self.base.described()
        out.adapters = ctypes.addressof(self.adapters.table)
        out.mixture = ctypes.addressof(self.adapters.mixture.struct)
        return out

    def described_by(self) -> list[Tensor]:
        return self.base.described_by()


class Adapters:
    """The LoRA adapters of one model: up to `max_adapters` at a time, each of a rank up to `max_rank`.

    They are kept in the model's type, as it was when this was made, and on its device: in bfloat16 an adapter of
    rank 16 for every Linear of Mistral 7B takes 84 MB. Not for several threads at once: `load` and `unload` come
    between calls of the model.
    """

    def __init__(self, model: Mistral7B, max_adapters: int = 16, max_rank: int = 256) -> None:
        self.model, self.max_adapters, self.max_rank = model, max_adapters, max_rank
        self._held: dict[str, dict[str, LowRank]] = {}  # by name, then by Linear
        self._loadings: dict[str, int] = {}
        self._count = itertools.count(1)
        self._mixture, self._adapted = Mixture(), model

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded, in the order of loading."""
        return tuple(self._held)

    def loading(self, name: str | None) -> int:
        """The number of the load that an adapter came from, 0 for the model alone; part of prefix-cache keys.

        A name has another number after it was unloaded and loaded again.
        """
        if name is None:
            return 0
        self._of(name)
        return self._loadings[name]

    def factors(self, name: str) -> dict[str, LowRank]:
        """What an adapter adds, by Linear. AdapterError if there is none of that name."""
        return dict(self._of(name))

    def nbytes(self, name: str) -> int:
        """The size of an adapter in bytes."""
        return sum(low.nbytes for low in self._of(name).values())

    def load(self, name: str, source: Source) -> None:
        """Read an adapter (see `read_adapter`) and keep it under `name`.

        AdapterError, or CheckpointError for what is wrong with its files, and nothing has changed.
        """
        if not name or name in self._held:
            raise AdapterError(
                f"adapter {name!r} {'is loaded already' if name else 'is no name'}",
                field="name",
                hint="unload it first, or take another name" if name else None,
            )
        if len(self._held) >= self.max_adapters:
            raise AdapterError(
                f"{self.max_adapters} adapters are loaded, as many as there may be",
                field="max_adapters",
                hint="unload one, or raise max_adapters",
            )
        adapter = source if isinstance(source, Adapter) else read_adapter(source, self.model.args)
        if adapter.rank > self.max_rank:
            raise AdapterError(
                f"adapter {name!r} is of rank {adapter.rank}, and {self.max_rank} is allowed",
                field="max_rank",
                hint="raise max_rank",
            )
        if special := [*own_weights(self.model, adapter), *own_targets(adapter)]:
            raise AdapterError(
                f"adapter {name!r} has for {special[0]!r} more than the factors of a Linear (its own "
                "weight, DoRA, a bias, or the embedding): the rows of a batch cannot choose it",
                field=special[0],
                hint="merge it (`mistral-7b merge`) and open the merged model, or use it alone (`--adapter` of "
                "generate and chat)",
            )
        linears, norm, own = dict(self.model.named_modules()), self.model.norm.weight, {}
        for target, (a, b, scale) in adapter.targets.items():
            check_factors(name, target, a, b, linears.get(target))
            own[target] = LowRank(a, b.double() * scale, norm.dtype, norm.device)
        self._rebuild({**self._held, name: own})
        self._loadings[name] = next(self._count)

    def unload(self, name: str) -> None:
        """Unload an adapter. AdapterError if no adapter has that name."""
        self._of(name)
        self._rebuild({held: own for held, own in self._held.items() if held != name})

    @contextlib.contextmanager
    def over(self, runs: Sequence[Run]) -> Iterator[Mistral7B]:
        """The model to call with rows that belong to these adapters, in this order.

        The rows are those of one call: tokens (T,), or (B, T) row after row, for `hidden`. Where `logits` is
        asked for fewer of them, that is a call of its own, with an `over` of its own. AdapterError for an unknown
        name, within another `over`, and in the end if the model was given another number of rows.
        """
        rows: dict[int, list[int]] = {}
        numbers, total, mixture = {name: i for i, name in enumerate(self._held)}, 0, self._mixture
        for name, n in runs:
            if name is not None and n:
                self._of(name)
                rows.setdefault(numbers[name], []).extend(range(total, total + n))
            total += n
        if len(mixture.which):
            raise AdapterError("adapters are chosen for another call already", hint="leave its `over` first")
        if not rows:
            yield self.model
            return
        mixture.choose(rows, total, self.model.norm.weight.device)
        try:
            yield self._adapted
            if mixture.refused:
                raise AdapterError(f"adapters were chosen for {total} rows, and the model got {mixture.refused}")
        finally:
            mixture.choose({}, 0, "cpu")

    def _of(self, name: str) -> dict[str, LowRank]:
        if name not in self._held:
            raise AdapterError(
                f"no adapter {name!r} is loaded: there is {', '.join(self._held) or 'none'}", field="adapter"
            )
        return self._held[name]

    def _rebuild(self, held: dict[str, dict[str, LowRank]]) -> None:
        """Replace the adapters and build a new tree of modules for them."""

        def build(linear: nn.Module, name: str) -> nn.Module:
            adapters = LowRanks([own.get(name) for own in held.values()], self._mixture)
            if isinstance(linear, Compressed):
                return CompressedLoraLinear(linear, adapters)
            return LoraLinear(linear, adapters)

        adapted, targets = shell(self.model), {target for own in held.values() for target in own}
        replace_linears(adapted, build, lambda name, _: name in targets)
        assert isinstance(adapted, Mistral7B)
        self._held, self._adapted = held, adapted


def check_factors(name: str, target: str, a: Tensor, b: Tensor, linear: nn.Module | None) -> None:
    """AdapterError if the model has no such Linear, or one of another shape."""
    if linear is None or not hasattr(linear, "in_features"):
        raise AdapterError(
            f"adapter {name!r} has a part for {target!r}, which is no Linear of the model", field=target
        )
    if a.shape[1:] != (linear.in_features,) or b.shape != (linear.out_features, a.shape[0]):
        raise AdapterError(
            f"adapter {name!r} has factors {tuple(a.shape)} and {tuple(b.shape)} for {target!r}, which takes "
            f"{linear.in_features} to {linear.out_features}",
            field=target,
        )


def own_weights(model: Mistral7B, adapter: Adapter) -> dict[str, Tensor]:
    """The weights that an adapter has in place of the model's, if they differ.

    PEFT saves embedding and output with any adapter of one of them.
    """
    modules = dict(model.named_modules())

    def held(name: str) -> Tensor | None:
        module, _, weight = name.rpartition(".")
        return modules[module].state_dict().get(weight) if module in modules else None

    return {
        name: own
        for name, own in adapter.weights.items()
        if (base := held(name)) is None or base.shape != own.shape or not torch.equal(base, own.to(base))
    }


def own_targets(adapter: Adapter) -> list[str]:
    """The modules for which an adapter has more than the factors of a Linear."""
    more = {*adapter.magnitudes, *adapter.biases, "tok_embeddings"}
    return [name for name in adapter.targets if name in more]


def shell(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules that shares its leaves, so that a leaf can be replaced in the copy alone."""
    if not module._modules:
        return module
    out = copy.copy(module)
    out._modules = {key: child and shell(child) for key, child in module._modules.items()}
    return out
