"""Limits of one rendering of a chat template: CPU time of its thread, bytes made, size of a value, depth of calls.

A template is code that came with a model's weights. Nothing interrupts a thread, so every operation that can take
long or make much is checked before it runs, and counted: template_sandbox.py calls `current()` from the compiled
template. One operation then works on at most `VALUE` characters, and the clock is read every few operations.

    size     characters of a string; of a container, those of all it holds, plus one for every item
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.runtime import Macro
from markupsafe import Markup

SECONDS = 1.0  # CPU time of the thread
PROBE_SECONDS = 0.1  # the same, for a conversation of our own that tries a template
VALUE = 2_000_000  # size of one value, beyond what the conversation itself is
ITEMS = 200_000  # items of what a filter iterates over
KEYS = 2000  # of a dictionary, besides texts: numbers can be chosen so that all their hashes are equal
BYTES = 256 << 20  # all values made, alive or not
DEPTH = 50  # nested calls of macros, recursive loops and blocks
BITS = 8192  # of a whole number
WIDTH = 9999  # of a field in a format
UNITS = 64  # operations between two looks at the clock

LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class LimitError(Exception):
    """A template asked for more than the limits of a rendering."""


class Budget:
    """What one rendering may still use. `size` is the size of the conversation."""

    def __init__(self, size: int, seconds: float) -> None:
        self.value = VALUE + 4 * size
        self.bytes = BYTES + 16 * size
        self.depth = 0
        self._units = 0
        self._end = time.thread_time() + seconds
        self._seconds = seconds

    def spend(self, made: int = 0, units: int = 1) -> None:
        """Count operations, and the bytes that they make or read."""
        self.bytes -= made
        if self.bytes < 0:
            raise LimitError(f"it makes more than {BYTES >> 20} MB of text")
        self._units += units + (made >> 10)
        if self._units >= UNITS:
            self._units = 0
            if time.thread_time() > self._end:
                raise LimitError(f"it takes more than {self._seconds:g} s of CPU time")

    def allow(self, size: int) -> None:
        """Check the size of a value before it is made."""
        if size > self.value:
            raise LimitError(f"it makes a value of more than {self.value:,} characters")
        self.spend(size)

    def measured(self, value: Any) -> Any:
        """Return a new value, counted. Shared parts count as often as they are seen, since text repeats them."""
        if isinstance(value, str):
            if len(value) > self.value:
                self.allow(len(value))
            self.spend(value.__sizeof__())
        elif isinstance(value, int):
            if value.bit_length() > BITS:
                raise LimitError(f"it makes a number of more than {BITS} bits")
            self.spend()
        elif isinstance(value, (list, tuple, dict)):
            self.size(value)
            self.spend(16 * len(value))
        else:
            self.spend()
        return value

    def size(self, value: Any) -> int:
        """Return the size of a value. LimitError as soon as it exceeds that of a value."""
        if isinstance(value, str):
            return len(value)
        total, stack = 0, [value]
        while stack:
            part = stack.pop()
            if isinstance(part, str):
                total += len(part)
            elif isinstance(part, dict):
                total += 2 * len(part)
                stack.extend(part)
                stack.extend(part.values())
            elif isinstance(part, (list, tuple)):
                total += len(part)
                stack.extend(part)
            else:
                total += 1
            if total > self.value:
                self.allow(total)
        self.spend(total)
        return total

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count one level of calls."""
        self.depth += 1
        if self.depth > DEPTH:
            raise LimitError(f"it nests more than {DEPTH} calls")
        try:
            yield
        finally:
            self.depth -= 1


_BUDGET: ContextVar[Budget] = ContextVar("budget")


def current() -> Budget:
    """Return the budget of the rendering under way on this thread."""
    return _BUDGET.get()


@contextmanager
def limited(size: int = 0, probe: bool = False) -> Iterator[None]:
    """Give what runs inside a budget of its own."""
    token = _BUDGET.set(Budget(size, PROBE_SECONDS if probe else SECONDS))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def step(made: int) -> None:
    """Count a block of statements whose own text has `made` characters."""
    current().spend(made)


def taken(value: Any) -> Any:
    """Count a new value."""
    return current().measured(value)


def compared(value: Any) -> Any:
    """Count a comparison, which may have looked at two whole values."""
    current().spend(units=8)
    return value


def tilde(parts: tuple[Any, ...]) -> str:
    """Jinja's `~`."""
    budget = current()
    budget.allow(sum(budget.size(part) for part in parts))
    text: str = taken("".join(map(str, parts)))
    return text


def multiply(left: Any, right: Any) -> None:
    """Check the product of two values."""
    numbers = isinstance(left, int) and isinstance(right, int)
    if numbers and left.bit_length() + right.bit_length() > BITS:
        raise LimitError(f"it makes a number of more than {BITS} bits")
    for text, count in ((left, right), (right, left)):
        if isinstance(text, (str, list, tuple)) and isinstance(count, int) and count > 0:
            current().allow(max(len(text), 1) * count)


def power(left: Any, right: Any) -> None:
    """Check the power of two numbers."""
    if isinstance(left, int) and isinstance(right, int) and right > 0 and left.bit_length() * right > BITS:
        raise LimitError(f"it makes a number of more than {BITS} bits")


def add(left: Any, right: Any) -> None:
    """Check the sum of two values."""
    for kind in (str, list, tuple):
        if isinstance(left, kind) and isinstance(right, kind):
            current().allow(len(left) * (6 if isinstance(right, Markup) else 1) + len(right))


def formatted(text: str, values: Any) -> None:
    """Check a text with fields, `%5d` or `{:5}`, and what fills them."""
    widths = [int(n) for n in re.findall(r"\d{1,9}", text)]
    if re.search(r"%[^a-zA-Z%]*\*|\{[^{}:]*:[^{}]*\{", text) or max(widths, default=0) > WIDTH:
        raise LimitError("it formats a value with a computed or very large width")
    fields = text.count("%") + text.count("{")
    current().allow(len(text) + fields * (10 * current().size(values) + max(widths, default=0)))


def modulo(left: Any, right: Any) -> None:
    """Check `%`, which formats when its left side is a text."""
    if isinstance(left, str):
        formatted(left, right if isinstance(right, (tuple, dict)) else (right,))


def check_keys(keys: Iterable[Any]) -> None:
    """Check what becomes the keys of a dictionary or set."""
    if sum(not isinstance(key, str) for key in keys) > KEYS:
        raise LimitError(f"it makes a dictionary with more than {KEYS:,} keys that are no texts")


BINARY: dict[str, Callable[[Any, Any], None]] = {"*": multiply, "**": power, "+": add, "%": modulo}


# Methods of values. A method that is in neither table is not offered; those of SAFE make nothing larger than what
# they are called on, in time proportional to it.
SAFE = frozenset([
    "startswith", "endswith", "upper", "lower", "title", "capitalize", "swapcase", "casefold", "find", "index",
    "count", "isdigit", "isalpha", "isalnum", "isspace", "isupper", "islower", "isnumeric", "isdecimal", "istitle",
    "isascii", "isidentifier", "isprintable", "removeprefix", "removesuffix", "partition", "items", "keys",
    "values", "get", "copy", "bit_length", "is_integer",
])  # fmt: skip


def _searched(text: Any, *args: Any) -> None:
    """Check a search whose time is the product of two lengths."""
    if isinstance(text, str) and len(text) * max((len(a) for a in args if isinstance(a, str)), default=0) > 10**8:
        raise LimitError("it searches a long text for another")
    current().spend(len(text))


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> None:
    _searched(text, sep)
    pieces = len(text) // 2 if sep is None else text.count(sep)
    _pieces((pieces if maxsplit < 0 else min(pieces, maxsplit)) + 1)


def _lines(text: str, keepends: bool = False) -> None:
    _pieces(sum(text.count(end) for end in LINE_ENDS) + 1)


def _pieces(count: int) -> None:
    if count > ITEMS + current().value // 10:
        raise LimitError(f"it splits a text into more than {ITEMS:,} pieces")
    current().spend(64 * count)


def _replace(text: Any, old: Any, new: Any, count: int | None = -1) -> None:
    text, old, new = str(text), str(old), str(new)
    current().allow(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _join(separator: str, values: Any) -> None:
    budget = current()
    budget.allow(budget.size(values) + len(separator) * len(values))


def _padded(text: Any, width: Any = 0, *args: Any) -> None:
    if isinstance(width, int):
        current().allow(len(str(text)) + max(width, 0))


METHODS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition"), _searched),
    **dict.fromkeys(("split", "rsplit"), _split),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    "splitlines": _lines,
    "replace": _replace,
    "join": _join,
}


def check_method(name: str, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check a call of a method of a text, list, dictionary or number."""
    if name in METHODS:
        METHODS[name](owner, *args, **kwargs)
    elif name in SAFE:
        current().spend(len(owner) if hasattr(owner, "__len__") else 0)
    else:
        raise LimitError(f"it calls {type(owner).__name__}.{name}, which chat templates are not offered")


def collects_arguments(call: Any) -> bool:
    """Return whether a call keeps its arguments in new containers: a macro that uses varargs or kwargs."""
    return isinstance(call, Macro) and bool(call.catch_varargs or call.catch_kwargs)
