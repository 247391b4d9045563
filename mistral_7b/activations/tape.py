"""What a recording holds: activations by point and layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import InterpretError
from .points import POINTS, Place, place_of, split_name
from .recorder import Recorder


class Tape(Recorder, Mapping[Place, Tensor]):
    """The activations of a recording, by (point, layer); the layer is None for points outside the layers.

        tape["residual", 3]                  (B, T, D) after layer 3; -1 is the last layer
        tape["residual"]                     (L, B, T, D), the recorded layers in order
        tape["logits"]                       (B, T, V)
        tape["blocks.3.hook_resid_post"]     by TransformerLens's name

    Shapes are those of activations/points.py, without B for packed tokens. If the model was called several times,
    T counts the tokens of all calls in order, and weights of earlier calls are 0 for positions of later ones.
    Tensors have the model's type (weights and logits float32 at least), and their autograd graph if there is one.
    """

    def __init__(self, places: list[Place], n_layers: int) -> None:
        super().__init__(places)
        self.n_layers = n_layers

    def __getitem__(self, key: str | tuple[str, int | None]) -> Tensor:
        name, layer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        point, own = split_name(name)
        if POINTS[point].layered and layer is None and own is None:
            layers = [n for recorded, n in self.kept if recorded == point]
            return torch.stack([self._joined((point, n)) for n in layers or [None]])
        return self._joined(place_of(name, layer, self.n_layers))

    def __iter__(self) -> Iterator[Place]:
        return (place for place, found in self.kept.items() if found)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        place: Any = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        name, layer = place
        try:
            return bool(self.kept.get(place_of(name, layer, self.n_layers)))
        except InterpretError:
            return False

    def __repr__(self) -> str:
        points: dict[str, list[int]] = {}
        for point, layer in self:
            points.setdefault(point, []).extend([] if layer is None else [layer])
        return f"Tape({', '.join(f'{p} {n}' if n else p for p, n in points.items())})"

    def _joined(self, place: Place) -> Tensor:
        found = self.kept.get(place)
        name = place[0] if place[1] is None else f"{place[0]!r}, layer {place[1]}"
        if not found:
            raise InterpretError(
                f"the tape has no {name}",
                field="name",
                hint="name it in record(...)" if found is None else "call the model within the recording",
            )
        tokens = -2 - POINTS[place[0]].heads  # the dimension of the tokens in what watchers see
        if place[0] == "attention":
            found = [pad(x, (0, found[-1].shape[-1] - x.shape[-1])) for x in found]
        try:
            out = found[0] if len(found) == 1 else torch.cat(found, dim=tokens)
        except RuntimeError:
            raise InterpretError(
                f"the calls that recorded {name} had batches of different sizes",
                hint="record each on a tape of its own",
            ) from None
        return out.transpose(-3, -2) if place[0] == "attention" else out
