"""A watcher that keeps the activations it sees, as the model goes on with them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .points import Place


class Recorder:
    """Keeps the activations of some places: for each a list, one entry for every forward."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.kept: dict[Place, list[Tensor]] = {place: [] for place in places}

    def wants(self, point: str, layer: int | None) -> bool:
        return (point, layer) in self.kept

    def see(self, point: str, layer: int | None, x: Tensor, positions: Tensor) -> Tensor:
        self.kept[point, layer].append(x)
        return x
