"""Lark terminals of the numbers between two bounds, built over decimal digits: exact at any size."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

ANY_INTEGER = "/0|-?[1-9][0-9]*/"
# Exponents are limited to those of floats: most parsers read 1e400 as infinity.
ANY_NUMBER = r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[12]?[0-9]{1,2})?/"


@dataclass(frozen=True)
class Bound:
    """The end of a range of numbers; `open`: exclusive."""

    value: Fraction
    open: bool = False

    def __neg__(self) -> Bound:
        return Bound(-self.value, self.open)


def integers(low: int | None, high: int | None) -> str:
    """A Lark terminal of the integers from `low` to `high` inclusive, low <= high; None is unbounded."""
    if low is None and high is None:
        return ANY_INTEGER
    parts = []
    if high is None or high >= 0:
        parts.append(_naturals(max(low or 0, 0), high))
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        parts.append(f"-({_naturals(least, None if low is None else -low)})")
    return f"/{'|'.join(parts)}/"


def decimals(low: Bound | None, high: Bound | None) -> str:
    """A Lark terminal of the numbers between the bounds; None is unbounded. Bounded numbers have no exponent.

    The bounds have finitely many decimal digits, and the range is not empty.
    """
    if low is None and high is None:
        return ANY_NUMBER
    parts = []
    zero = Bound(Fraction(0))
    if high is None or high.value > 0 or high == zero:
        parts.append(f"({_unsigned(low if low is not None and low.value >= 0 else zero, high)})")
    if low is None or low.value < 0:
        least = -high if high is not None and high.value < 0 else Bound(Fraction(0), open=True)
        parts.append(f'"-" ({_unsigned(least, None if low is None else -low)})')
    return " | ".join(parts)


def format_decimal(value: Fraction) -> str:
    """A number with finitely many decimal digits, without an exponent."""
    whole, part = _digits(abs(value))
    return f"{'-' if value < 0 else ''}{whole}{'.' + part if part else ''}"


def _naturals(low: int, high: int | None) -> str:
    """A regex of the natural numbers from `low` to `high`."""
    a, b = str(low), str(high)
    if high is None:
        return f"{_between(a, '9' * len(a))}|[1-9][0-9]{{{len(a)},}}"
    if len(a) == len(b):
        return _between(a, b)
    parts = [_between(a, "9" * len(a))]
    if len(b) - len(a) > 1:
        parts.append(f"[1-9][0-9]{{{len(a)},{len(b) - 2}}}")
    return "|".join([*parts, _between("1" + "0" * (len(b) - 1), b)])


def _between(a: str, b: str) -> str:
    """A regex of the digit strings from `a` to `b`, which have equal length; a <= b."""
    if a == b:
        return a
    same = next(i for i, pair in enumerate(zip(a, b, strict=True)) if len(set(pair)) > 1)
    x, y, left, right = int(a[same]), int(b[same]), a[same + 1 :], b[same + 1 :]
    parts = [f"{x}{rest}" for rest in _at_least(left)] + [f"{y}{rest}" for rest in _at_most(right)]
    if y - x > 1:
        parts.append(_class(x + 1, y - 1) + _any(len(left)))
    return f"{a[:same]}({'|'.join(parts)})"


def _at_least(a: str) -> list[str]:
    """Regexes of the digit strings as long as `a` that are at least `a`."""
    core = a.rstrip("0")
    parts = [core + _any(len(a) - len(core))]
    steps = [(i, int(digit)) for i, digit in enumerate(core) if digit != "9"]
    return parts + [core[:i] + _class(digit + 1, 9) + _any(len(a) - i - 1) for i, digit in steps]


def _at_most(b: str) -> list[str]:
    """Regexes of the digit strings as long as `b` that are at most `b`."""
    core = b.rstrip("9")
    parts = [core + _any(len(b) - len(core))]
    steps = [(i, int(digit)) for i, digit in enumerate(core) if digit != "0"]
    return parts + [core[:i] + _class(0, digit - 1) + _any(len(b) - i - 1) for i, digit in steps]


def _class(low: int, high: int) -> str:
    return str(low) if low == high else f"[{low}-{high}]"


def _any(n: int) -> str:
    return f"[0-9]{{{n}}}" if n else ""


def _unsigned(low: Bound, high: Bound | None) -> str:
    """A Lark terminal of the numbers between two nonnegative bounds, without a sign."""
    above = f"/{_above(low)}/"
    return above if high is None else f"{above} & /{_below(high)}/"


def _above(bound: Bound) -> str:
    """A regex of the unsigned numbers above a bound."""
    whole, part = _digits(bound.value)
    if not part and not bound.open:
        return rf"({_naturals(int(whole), None)})(\.[0-9]+)?"
    least = rf"{part}0*[1-9][0-9]*" if bound.open else f"{part}[0-9]*"
    steps = [(i, int(digit)) for i, digit in enumerate(part) if digit != "9"]
    parts = [least, *(part[:i] + _class(digit + 1, 9) + "[0-9]*" for i, digit in steps)]
    return rf"({_naturals(int(whole) + 1, None)})(\.[0-9]+)?|{whole}\.({'|'.join(parts)})"


def _below(bound: Bound) -> str:
    """A regex of the unsigned numbers below a bound."""
    whole, part = _digits(bound.value)
    regexes = [] if whole == "0" else [rf"({_naturals(0, int(whole) - 1)})(\.[0-9]+)?"]
    parts = [part[:i] for i in range(1, len(part))]  # a proper prefix is less
    parts += [part[:i] + _class(0, int(digit) - 1) + "[0-9]*" for i, digit in enumerate(part) if digit != "0"]
    if not bound.open:
        parts.append(f"{part}0*" if part else "0+")
    if part or not bound.open:
        regexes.append(rf"{whole}(\.({'|'.join(parts)}))?")
    return "|".join(regexes)


def _digits(value: Fraction) -> tuple[str, str]:
    """The digits before and after the point of a nonnegative number, without trailing zeros."""
    places, scale = 0, value.denominator
    while scale > 1:
        scale, places = Fraction(scale, 10).numerator, places + 1
    shifted = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    whole, part = (shifted[:-places], shifted[-places:]) if places else (shifted, "")
    return whole, part.rstrip("0")
