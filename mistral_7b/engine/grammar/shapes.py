"""What a JSON schema allows, as a union of shapes, each of one JSON type, that can be intersected exactly.

What stands inside an array or an object is kept as the places in the schema that it must obey all together, so
that recursive schemas stay finite and nothing is intersected before it is needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction

from . import digits, strings
from .digits import Bound

Places = tuple[str, ...]  # of schemas, all of which a value must obey; () allows every value


@dataclass(frozen=True)
class Literal:
    """null, true or false."""

    text: str


@dataclass(frozen=True)
class Number:
    low: Bound | None = None
    high: Bound | None = None
    whole: bool = False
    step: Fraction | None = None  # a multiple of it

    def meet(self, other: Number) -> Number | None:
        steps = [step for step in (self.step, other.step) if step]
        low = tighter(self.low, other.low, 1)
        high = tighter(self.high, other.high, -1)
        met = Number(low, high, self.whole or other.whole, _common(steps) if steps else None)
        return None if met.is_empty() else met

    def is_empty(self) -> bool:
        """Whether no number is in it."""
        if self.low is None or self.high is None:
            return False
        if step := self.unit:
            first, last = self.ends(step)
            return first is not None and last is not None and first > last
        open_ = self.low.open or self.high.open
        return self.low.value > self.high.value or (self.low.value == self.high.value and open_)

    @property
    def unit(self) -> Fraction | None:
        """What every number in it is a multiple of."""
        if not self.whole:
            return self.step
        return _common([self.step, Fraction(1)]) if self.step else Fraction(1)

    def ends(self, unit: Fraction) -> tuple[int | None, int | None]:
        """The first and the last multiple of `unit` between the bounds, in units."""
        low = high = None
        if self.low is not None:
            low = math.ceil(self.low.value / unit)
            low += self.low.open and low * unit == self.low.value
        if self.high is not None:
            high = math.floor(self.high.value / unit)
            high -= self.high.open and high * unit == self.high.value
        return low, high

    def terminal(self) -> str | None:
        """A terminal of these numbers; None where only llguidance itself can count in such steps."""
        unit = self.unit
        if unit is None:
            if self.low is not None and self.high is not None and self.low.value == self.high.value:
                return f'"{digits.written(self.low.value)}"'
            return digits.decimals(self.low, self.high)
        low, high = self.ends(unit)
        if unit == 1:
            return digits.integers(low, high)
        if low is not None and low == high:
            return f'"{digits.written(low * unit)}"'
        return None


@dataclass(frozen=True)
class Text:
    least: int = 0
    most: int | None = None
    patterns: tuple[str, ...] = ()  # all of which are found in it
    formats: tuple[str, ...] = ()
    value: str | None = None  # this one alone

    def meet(self, other: Text) -> Text | None:
        if None not in (self.value, other.value) and self.value != other.value:
            return None
        met = Text(
            max(self.least, other.least),
            _least(self.most, other.most),
            tuple(dict.fromkeys((*self.patterns, *other.patterns))),
            tuple(dict.fromkeys((*self.formats, *other.formats))),
            self.value if other.value is None else other.value,
        )
        return None if met.is_empty() else met

    def is_empty(self) -> bool:
        """Whether no text is in it."""
        if self.value is not None:
            length = len(self.value)
            held = all(strings.holds(terminal, self.value) for terminal in self._limits())
            return not held or length < self.least or (self.most is not None and length > self.most)
        if self.most is not None and self.least > self.most:
            return True
        if not self.patterns and len(self.formats) < 2 and self.least == 0 and self.most is None:
            return False
        return bool(self.patterns or self.formats) and strings.is_empty(self.terminal())

    def terminal(self) -> str:
        if self.value is not None:
            return strings.literal(self.value)
        limits = self._limits()
        if self.least or self.most is not None or not limits:
            limits.append(strings.of_length(self.least, self.most))
        return " & ".join(limits)

    def _limits(self) -> list[str]:
        return [*map(strings.of_pattern, self.patterns), *map(strings.of_format, self.formats)]


@dataclass(frozen=True)
class Array:
    """`parts`: all of which hold; each the items of a prefix, and what the others are."""

    parts: tuple[tuple[tuple[Places, ...], Places], ...] = ()
    least: int = 0
    most: int | None = None

    def meet(self, other: Array) -> Array | None:
        least, most = max(self.least, other.least), _least(self.most, other.most)
        empty = most is not None and least > most
        return None if empty else Array(_union(self.parts, other.parts), least, most)

    @property
    def fixed(self) -> int:
        """How many items have a schema of their own."""
        return max((len(prefix) for prefix, _ in self.parts), default=0)

    def item(self, i: int) -> Places:
        return _joined(prefix[i] if i < len(prefix) else others for prefix, others in self.parts)


@dataclass(frozen=True)
class Properties:
    """Properties by name, by pattern, and those that no name and no pattern fits."""

    named: tuple[tuple[str, Places], ...] = ()
    patterns: tuple[tuple[str, Places], ...] = ()
    others: Places = ()

    @functools.cached_property
    def _by_name(self) -> dict[str | None, Places]:
        return dict(self.named)

    def of(self, name: str | None, matched: Collection[str]) -> Places:
        """What a property must obey: of this name, if it is one of these, and matched by these patterns."""
        found = [self._by_name[name]] if name in self._by_name else []
        found += [places for pattern, places in self.patterns if pattern in matched]
        return _joined(found) if found else self.others


@dataclass(frozen=True)
class Object:
    """`parts`: all of which hold."""

    parts: tuple[Properties, ...] = ()
    required: tuple[str, ...] = ()
    least: int = 0
    most: int | None = None

    def meet(self, other: Object) -> Object | None:
        least, most = max(self.least, other.least), _least(self.most, other.most)
        required = _union(self.required, other.required)
        empty = most is not None and max(least, len(required)) > most
        return None if empty else Object(_union(self.parts, other.parts), required, least, most)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the schema, in the order in which they are written."""
        named = [name for part in self.parts for name, _ in part.named]
        return tuple(dict.fromkeys((*named, *self.required)))

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(pattern for part in self.parts for pattern, _ in part.patterns))

    def property(self, name: str) -> Places:
        """What the property of a name must obey."""
        matched = [pattern for pattern in self.patterns if strings.holds(strings.of_pattern(pattern), name)]
        return _joined(part.of(name, matched) for part in self.parts)

    def others(self, matched: Collection[str]) -> Places:
        """What a property must obey whose name is none of `names` and is matched by these patterns alone."""
        return _joined(part.of(None, matched) for part in self.parts)


Shape = Literal | Number | Text | Array | Object
ANYTHING: tuple[Shape, ...] = (
    Literal("null"), Literal("true"), Literal("false"), Number(), Text(), Array(), Object(),
)  # fmt: skip


def meet(one: Shape, other: Shape) -> Shape | None:
    """What is in both shapes; None where nothing is."""
    if isinstance(one, Literal):
        return one if one == other else None
    return one.meet(other) if type(one) is type(other) else None  # type: ignore[arg-type]


def tighter(one: Bound | None, other: Bound | None, sign: int) -> Bound | None:
    """The higher one of two lower bounds (`sign` 1), or the lower one of two upper bounds (-1)."""
    if one is None or other is None:
        return other if one is None else one
    return max(one, other, key=lambda bound: (sign * bound.value, bound.open))


def _common(steps: list[Fraction]) -> Fraction:
    """The least common multiple of fractions."""
    return Fraction(math.lcm(*(step.numerator for step in steps)), math.gcd(*(step.denominator for step in steps)))


def _least(one: int | None, other: int | None) -> int | None:
    return min((number for number in (one, other) if number is not None), default=None)


def _union(one: tuple, other: tuple) -> tuple:
    return tuple(dict.fromkeys((*one, *other)))


def _joined(places: Iterable[Places]) -> Places:
    return tuple(dict.fromkeys(place for some in places for place in some))
