"""What a JSON schema allows: a union of shapes, each of one JSON type, that can be intersected exactly.

For the contents of an array or an object, a shape keeps pointers to the subschemas that apply. So recursive
schemas stay finite, and nothing is intersected before it is needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction

from . import digits, strings
from .digits import Bound

Subschemas = tuple[str, ...]  # JSON pointers to schemas that all apply to one value; () allows every value


@dataclass(frozen=True)
class Literal:
    """null, true or false."""

    text: str


@dataclass(frozen=True)
class Number:
    """Numbers between two bounds that are integers, multiples of a number, or both."""

    low: Bound | None = None
    high: Bound | None = None
    integer: bool = False
    multiple_of: Fraction | None = None

    def intersect(self, other: Number) -> Number | None:
        steps = [step for step in (self.multiple_of, other.multiple_of) if step]
        low = tighter(self.low, other.low, 1)
        high = tighter(self.high, other.high, -1)
        common = Number(low, high, self.integer or other.integer, _lcm(steps) if steps else None)
        return None if common.is_empty() else common

    def is_empty(self) -> bool:
        """Whether it allows no number."""
        if self.low is None or self.high is None:
            return False
        if step := self.unit:
            first, last = self.ends(step)
            return first is not None and last is not None and first > last
        open_ = self.low.open or self.high.open
        return self.low.value > self.high.value or (self.low.value == self.high.value and open_)

    @property
    def unit(self) -> Fraction | None:
        """The number of which all allowed numbers are multiples, if there is one."""
        if not self.integer:
            return self.multiple_of
        return _lcm([self.multiple_of, Fraction(1)]) if self.multiple_of else Fraction(1)

    def ends(self, unit: Fraction) -> tuple[int | None, int | None]:
        """The first and last multiple of `unit` within the bounds, divided by `unit`."""
        low = high = None
        if self.low is not None:
            low = math.ceil(self.low.value / unit)
            low += self.low.open and low * unit == self.low.value
        if self.high is not None:
            high = math.floor(self.high.value / unit)
            high -= self.high.open and high * unit == self.high.value
        return low, high

    def terminal(self) -> str | None:
        """A Lark terminal of these numbers; None for multiples, which llguidance itself must count."""
        unit = self.unit
        if unit is None:
            if self.low is not None and self.high is not None and self.low.value == self.high.value:
                return f'"{digits.format_decimal(self.low.value)}"'
            return digits.decimals(self.low, self.high)
        low, high = self.ends(unit)
        if unit == 1:
            return digits.integers(low, high)
        if low is not None and low == high:
            return f'"{digits.format_decimal(low * unit)}"'
        return None


@dataclass(frozen=True)
class String:
    """Strings of some length that match all patterns and formats, or a single string."""

    min_size: int = 0
    max_size: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    value: str | None = None  # the only string allowed

    def intersect(self, other: String) -> String | None:
        if None not in (self.value, other.value) and self.value != other.value:
            return None
        common = String(
            max(self.min_size, other.min_size),
            _minimum(self.max_size, other.max_size),
            tuple(dict.fromkeys((*self.patterns, *other.patterns))),
            tuple(dict.fromkeys((*self.formats, *other.formats))),
            self.value if other.value is None else other.value,
        )
        return None if common.is_empty() else common

    def is_empty(self) -> bool:
        """Whether it allows no string."""
        if self.value is not None:
            length = len(self.value)
            held = all(strings.matches(terminal, self.value) for terminal in self._limits())
            return not held or length < self.min_size or (self.max_size is not None and length > self.max_size)
        if self.max_size is not None and self.min_size > self.max_size:
            return True
        if not self.patterns and len(self.formats) < 2 and self.min_size == 0 and self.max_size is None:
            return False
        return bool(self.patterns or self.formats) and strings.is_empty(self.terminal())

    def terminal(self) -> str:
        if self.value is not None:
            return strings.literal(self.value)
        limits = self._limits()
        if self.min_size or self.max_size is not None or not limits:
            limits.append(strings.of_length(self.min_size, self.max_size))
        return " & ".join(limits)

    def _limits(self) -> list[str]:
        return [*map(strings.of_pattern, self.patterns), *map(strings.of_format, self.formats)]


@dataclass(frozen=True)
class Array:
    """Arrays. All `parts` apply; each holds the subschemas of the prefix items and those of the other items."""

    parts: tuple[tuple[tuple[Subschemas, ...], Subschemas], ...] = ()
    min_size: int = 0
    max_size: int | None = None

    def intersect(self, other: Array) -> Array | None:
        min_size, max_size = max(self.min_size, other.min_size), _minimum(self.max_size, other.max_size)
        empty = max_size is not None and min_size > max_size
        return None if empty else Array(_merge(self.parts, other.parts), min_size, max_size)

    @property
    def prefix_length(self) -> int:
        """The number of items that have their own schema."""
        return max((len(prefix) for prefix, _ in self.parts), default=0)

    def item(self, i: int) -> Subschemas:
        return _flatten(prefix[i] if i < len(prefix) else others for prefix, others in self.parts)


@dataclass(frozen=True)
class Properties:
    """Subschemas of properties: by name, by pattern, and for all others (additionalProperties)."""

    named: tuple[tuple[str, Subschemas], ...] = ()
    patterns: tuple[tuple[str, Subschemas], ...] = ()
    others: Subschemas = ()

    @functools.cached_property
    def _by_name(self) -> dict[str | None, Subschemas]:
        return dict(self.named)

    def subschemas_of(self, name: str | None, matched: Collection[str]) -> Subschemas:
        """The subschemas of a property with this name, which matches the patterns `matched`."""
        found = [self._by_name[name]] if name in self._by_name else []
        found += [subschemas for pattern, subschemas in self.patterns if pattern in matched]
        return _flatten(found) if found else self.others


@dataclass(frozen=True)
class Object:
    """Objects. All `parts` apply."""

    parts: tuple[Properties, ...] = ()
    required: tuple[str, ...] = ()
    min_size: int = 0
    max_size: int | None = None

    def intersect(self, other: Object) -> Object | None:
        min_size, max_size = max(self.min_size, other.min_size), _minimum(self.max_size, other.max_size)
        required = _merge(self.required, other.required)
        empty = max_size is not None and max(min_size, len(required)) > max_size
        return None if empty else Object(_merge(self.parts, other.parts), required, min_size, max_size)

    @property
    def names(self) -> tuple[str, ...]:
        """The property names in the schema, in its order."""
        named = [name for part in self.parts for name, _ in part.named]
        return tuple(dict.fromkeys((*named, *self.required)))

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(pattern for part in self.parts for pattern, _ in part.patterns))

    def property(self, name: str) -> Subschemas:
        """The subschemas of the property with this name."""
        matched = [pattern for pattern in self.patterns if strings.matches(strings.of_pattern(pattern), name)]
        return _flatten(part.subschemas_of(name, matched) for part in self.parts)

    def others(self, matched: Collection[str]) -> Subschemas:
        """The subschemas of a property that is not in `names` and matches exactly the patterns `matched`."""
        return _flatten(part.subschemas_of(None, matched) for part in self.parts)


Shape = Literal | Number | String | Array | Object
ANYTHING: tuple[Shape, ...] = (
    Literal("null"), Literal("true"), Literal("false"), Number(), String(), Array(), Object(),
)  # fmt: skip


def intersect(one: Shape, other: Shape) -> Shape | None:
    """The values in both shapes, as a shape; None if there are none."""
    if isinstance(one, Literal):
        return one if one == other else None
    return one.intersect(other) if type(one) is type(other) else None  # type: ignore[arg-type]


def tighter(one: Bound | None, other: Bound | None, sign: int) -> Bound | None:
    """The higher of two lower bounds (`sign` 1), or the lower of two upper bounds (-1)."""
    if one is None or other is None:
        return other if one is None else one
    return max(one, other, key=lambda bound: (sign * bound.value, bound.open))


def _lcm(steps: list[Fraction]) -> Fraction:
    """The least common multiple of fractions."""
    return Fraction(math.lcm(*(step.numerator for step in steps)), math.gcd(*(step.denominator for step in steps)))


def _minimum(one: int | None, other: int | None) -> int | None:
    return min((number for number in (one, other) if number is not None), default=None)


def _merge(one: tuple, other: tuple) -> tuple:
    return tuple(dict.fromkeys((*one, *other)))


def _flatten(subschemas: Iterable[Subschemas]) -> Subschemas:
    return tuple(dict.fromkeys(pointer for some in subschemas for pointer in some))
