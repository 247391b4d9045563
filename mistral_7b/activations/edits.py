"""Watchers that change activations. An edit replaces a part of each activation at its places:

    x[..., t, heads] = change(x[..., t, heads])        for the tokens t at `positions`

Positions are absolute, so that an edit means the same tokens in prefill and in decode, with any cache.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InterpretError
from .points import POINTS, Place

MOST_POSITIONS = 1 << 24
Value = Tensor | float | Callable[[Tensor], Tensor]


class Edit:
    """Replaces activations by values, numbers or the results of functions.

    `positions` are those of the tokens concerned, None for all; `heads` those concerned, None for all. A value is
    broadcast to what is selected: (..., P, D) for P positions, (..., P, heads, K) with heads. A function takes
    the selected rows, (rows, D) or (rows, heads, K); without positions and heads the whole activation.
    """

    def __init__(
        self,
        values: Mapping[Place, Value],
        positions: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        self.values, self.positions, self.heads = dict(values), positions, heads

    def wants(self, point: str, layer: int | None) -> bool:
        return (point, layer) in self.values

    def see(self, point: str, layer: int | None, x: Tensor, positions: Tensor) -> Tensor:
        value = self.values[point, layer]
        try:
            return self._edited(point, value, x, positions)
        except (RuntimeError, IndexError) as e:
            where = point if layer is None else f"{point}, layer {layer}"
            raise InterpretError(
                f"the value for {where} does not fit an activation {tuple(x.shape)}: {e}", field="values"
            ) from e

    def _edited(self, point: str, value: Value, x: Tensor, positions: Tensor) -> Tensor:
        if self.positions is None:
            return self._of_heads(x, lambda part: _replacement(value, part))
        lead = x.shape[: x.dim() - (2 if POINTS[point].heads else 1)]  # (..., T)
        if positions.shape[-1] != lead[-1]:
            raise RuntimeError("positions can be chosen only where a forward's tokens are all computed")
        chosen = torch.tensor(self.positions, device=x.device)  # (P,)
        *at, which = (positions[..., None] == chosen).expand(*lead, len(chosen)).nonzero(as_tuple=True)

        def change(part: Tensor) -> Tensor:  # (rows, ...)
            if callable(value):
                return _replacement(value, part)
            of_rows = _replacement(value, part.new_empty(1).expand(*lead[:-1], len(chosen), *part.shape[1:]))
            return of_rows[(*at[:-1], which)]

        out = x.clone()
        out[tuple(at)] = self._of_heads(x[tuple(at)], change)
        return out

    def _of_heads(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """x (..., heads, K) with these heads changed."""
        if self.heads is None:
            return change(x)
        heads, out = list(self.heads), x.clone()
        out[..., heads, :] = change(x[..., heads, :])
        return out


def _replacement(value: Value, x: Tensor) -> Tensor:
    """What replaces x: of its shape and type."""
    if not callable(value):
        try:
            return torch.as_tensor(value, device=x.device, dtype=x.dtype).expand(x.shape)
        except (TypeError, ValueError, OverflowError) as e:
            raise RuntimeError(f"{type(value).__name__} is no tensor, number or function ({e})") from e
    new = value(x)
    if not isinstance(new, Tensor):
        raise RuntimeError(f"its function returned {type(new).__name__}, not a tensor")
    if new.shape != x.shape:
        raise RuntimeError(f"its function returned {tuple(new.shape)}")
    return new.to(x.dtype)


class Steer:
    """Adds scale * vector (D,) to the residual stream after a layer, in float32 at least.

    `positions` are those of the tokens concerned: numbers, a slice, which may be without an end, or None for all.
    InterpretError for a vector that does not fit the width, or has values that are not finite; in the forward if
    the residual stream overflows after this layer or a later one.
    """

    def __init__(
        self,
        layer: int,
        vector: Tensor,
        dim: int,
        scale: float = 1.0,
        positions: Sequence[int] | slice | None = None,
    ) -> None:
        if not isinstance(vector, Tensor):
            raise InterpretError(f"a steering vector is a tensor, not {vector!r:.80}", field="vector")
        if not _is_number(scale):
            raise InterpretError(f"scale is a finite number, not {scale!r:.80}", field="scale")
        if vector.shape != (dim,) or not vector.is_floating_point():
            raise InterpretError(
                f"a steering vector is ({dim},) floating-point numbers, the model's width, not "
                f"{tuple(vector.shape)} {vector.dtype}",
                field="vector",
            )
        self.layer, self.positions = layer, positions
        self.added = vector.to(torch.promote_types(vector.dtype, torch.float32)) * scale
        if not bool(torch.isfinite(self.added).all()):
            raise InterpretError("scale * vector has values that are not finite", field="vector")

    def wants(self, point: str, layer: int | None) -> bool:
        return point == "residual" and layer is not None and layer >= self.layer

    def see(self, point: str, layer: int | None, x: Tensor, positions: Tensor) -> Tensor:
        x = self._steered(x, positions) if layer == self.layer else x
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        if not bool(wide.square().sum(-1).isfinite().all()):  # the next norm's sum, which infinity makes zeros
            raise InterpretError(
                f"the steering vector overflows: after layer {layer} the residual stream exceeds what {x.dtype} "
                f"or a norm can hold; scale * vector has length {self.added.double().norm():.3g} and is added "
                f"after layer {self.layer}",
                field="vector",
                hint="use a smaller scale",
            )
        return x

    def _steered(self, x: Tensor, positions: Tensor) -> Tensor:
        added = self.added.to(x.device)
        if self.positions is not None:
            added = torch.where(_among(positions, self.positions)[..., None], added, 0)
        return (x.to(torch.promote_types(x.dtype, added.dtype)) + added).to(x.dtype)


def _among(positions: Tensor, wanted: Sequence[int] | slice) -> Tensor:
    """Which positions are wanted, as a mask."""
    if not isinstance(wanted, slice):
        return torch.isin(positions, torch.tensor(wanted, device=positions.device))
    start, step = wanted.start or 0, wanted.step or 1
    mask = (positions >= start) & ((positions - start) % step == 0)
    return mask if wanted.stop is None else mask & (positions < wanted.stop)


def checked_positions(positions: int | Sequence[int] | slice | None, end: bool = True) -> list[int] | slice | None:
    """Absolute positions as a list, or as a slice if it may be without an `end`. InterpretError for others."""
    if positions is None:
        return None
    if isinstance(positions, slice):
        numbers = [n for n in (positions.start, positions.stop, positions.step) if n is not None]
        good = all(map(_is_position, numbers)) and positions.step != 0
        if good and not end:
            return positions
        found = range(positions.stop)[positions] if good and positions.stop is not None else None
    else:
        found = [positions] if isinstance(positions, int) else positions  # type: ignore[assignment]
    if not isinstance(found, Sequence) or len(found) > MOST_POSITIONS or not all(map(_is_position, found)):
        raise InterpretError(
            f"positions are numbers from 0, the first token's, below 2**31, at most {MOST_POSITIONS} of them, or "
            f"a slice with an end, not {positions!r:.200}",
            field="positions",
        )
    return list(found)


def _is_position(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 31


def _is_number(x: object) -> bool:
    """Whether x is a real number that a float can hold; infinities and NaN are floats too."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        return False
    try:
        float(x)
    except OverflowError:
        return False
    return True
