"""Comparisons for the checks: what differs, where, and which mistake gives exactly this result.

A check states the right result and, as guesses, the results of common mistakes. If a wrong result equals that of a
mistake, the learner is told which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import CourseError

Guesses = Mapping[str, Tensor | tuple[Tensor, ...]]  # the mistake, as a sentence -> what it gives


def wrong(what: str, mistake: str | None = None) -> NoReturn:
    """Raise CourseError: what differs, and the likely mistake."""
    raise CourseError(what, hint=f"likely mistake: {mistake}" if mistake else None)


def expect(condition: bool, what: str, mistake: str | None = None) -> None:
    """`wrong` unless the condition holds."""
    if not condition:
        wrong(what, mistake)


def equal(got: object, expected: object, what: str, mistakes: Mapping[Any, str] | None = None) -> None:
    """`wrong` unless two plain values are equal; `mistakes` explains wrong values, lists as tuples."""
    if got != expected:
        value = tuple(got) if isinstance(got, list | dict) else got
        known = next((why for known, why in (mistakes or {}).items() if known == value), None)
        wrong(f"{what} is {got!r}, expected {expected!r}", known)


def same(
    got: object, expected: Tensor, what: str, guesses: Guesses | None = None, tolerance: float = 1e-5
) -> None:
    """`wrong` unless a tensor has this type, shape and these values, up to `tolerance` (relative above 1).

    Names the first element that differs, how many do and by how much.
    """
    guesses = guesses or {}
    if not isinstance(got, Tensor):
        wrong(f"{what} is {_described(got)}, expected a tensor {tuple(expected.shape)}", _missing_return(got))
    mistake = _explained(got, guesses, tolerance)
    if got.shape != expected.shape:
        wrong(f"{what} has the shape {tuple(got.shape)}, expected {tuple(expected.shape)}", mistake)
    if got.dtype != expected.dtype:
        wrong(f"{what} is of type {_type(got)}, expected {_type(expected)}", mistake)
    off = _difference(got, expected) > tolerance
    if not off.any():
        return
    at = tuple(off.nonzero()[0].tolist())
    index = f"[{', '.join(map(str, at))}]" if at else ""
    largest = float(_difference(got, expected).max())
    if mistake is None and not got.isfinite().all():
        mistake = "a division by zero, or a softmax over a row without a visible key"
    wrong(
        f"{what}{index} is {_number(got[at])}, expected {_number(expected[at])} "
        f"({int(off.sum())} of {off.numel()} values differ, by up to {largest:.2g})",
        mistake,
    )


def same_mask(got: object, expected: Tensor, what: str, guesses: Guesses | None = None) -> None:
    """`wrong` unless a mask (T, S) shows each query exactly these keys. Names the first wrong row."""
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != torch.bool:
        same(got, expected, what, guesses)
    assert isinstance(got, Tensor)
    if torch.equal(got, expected):
        return
    row = int((got != expected).any(-1).nonzero()[0])
    mistake = _explained(got, guesses or {}, 0)
    seen, right = (mask[row].nonzero().flatten().tolist() for mask in (got, expected))
    wrong(
        f"{what}: row {row} sees {len(seen)} keys, should see {len(right)}: columns {_listed(seen)}, "
        f"expected {_listed(right)}",
        mistake,
    )


def _difference(got: Tensor, expected: Tensor) -> Tensor:
    """Absolute, and relative where the expected value exceeds 1; infinite for what is not finite."""
    got, expected = got.double(), expected.double()
    same_values = (got == expected) | (got.isnan() & expected.isnan())  # infinities too
    difference = (got - expected).abs() / expected.abs().clamp(min=1)
    return torch.where(same_values, 0.0, torch.where(difference.isnan(), torch.inf, difference))


def _explained(got: Tensor, guesses: Guesses, tolerance: float) -> str | None:
    """The first mistake that gives this result, shape and type included."""
    for why, values in guesses.items():
        for value in values if isinstance(values, tuple) else (values,):
            if value.dtype == got.dtype and _alike(got, value, tolerance):
                return why
    return None


def _alike(got: Tensor, guess: Tensor, tolerance: float) -> bool:
    return got.shape == guess.shape and bool((_difference(got, guess) <= tolerance).all())


def _described(value: object) -> str:
    return repr(value) if value is None else f"a {type(value).__name__}"


def _missing_return(value: object) -> str | None:
    return "the function does not return its result" if value is None else None


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number(value: Tensor) -> str:
    return f"{value.item():.6g}" if value.is_floating_point() else str(value.item())


def _listed(places: Sequence[int]) -> str:
    return ", ".join(map(str, places)) or "none"
