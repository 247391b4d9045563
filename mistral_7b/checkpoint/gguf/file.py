"""The GGUF container: parse header, metadata and tensor table strictly. Imports no torch.

    "GGUF"  version  tensors  pairs      4 bytes, uint32, 2 x uint64
    pairs                                key, type, value; an array is element type, count, elements
    tensors                              name, dimensions (innermost first), type, offset
    padding to the alignment, then the data; offsets count from the start of the data

The file is not trusted: every length is checked against the remaining bytes before anything of that length is
allocated, so that a damaged or malicious file raises CheckpointError. Source: ggml's gguf.h.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...errors import CheckpointError

MAGIC = b"GGUF"
ALIGNMENT = 32  # bytes, unless `general.alignment` says otherwise
VERSIONS = (2, 3)  # 1 (obsolete) had 32-bit lengths; 3 adds only a big-endian variant to 2


class Kind(NamedTuple):
    """A tensor type: each `block` consecutive values of a row are stored in `size` bytes."""

    code: int
    name: str
    block: int
    size: int


_KINDS = (
    Kind(0, "F32", 1, 4), Kind(1, "F16", 1, 2), Kind(30, "BF16", 1, 2),
    Kind(2, "Q4_0", 32, 18), Kind(3, "Q4_1", 32, 20), Kind(6, "Q5_0", 32, 22), Kind(7, "Q5_1", 32, 24),
    Kind(8, "Q8_0", 32, 34), Kind(10, "Q2_K", 256, 84), Kind(11, "Q3_K", 256, 110), Kind(12, "Q4_K", 256, 144),
    Kind(13, "Q5_K", 256, 176), Kind(14, "Q6_K", 256, 210), Kind(20, "IQ4_NL", 32, 18),
    Kind(23, "IQ4_XS", 256, 136),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _KINDS}
_BY_CODE = {kind.code: kind for kind in _KINDS}
_OTHERS = {  # known by name only, for error messages
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

# Type codes of metadata values, and their formats in struct.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_BYTES = {code: struct.calcsize(form) for code, form in NUMBERS.items()}

# Limits far above any model's values. They bound memory: Python objects are larger than their bytes in a file.
MAX_PAIRS, MAX_TENSORS, MAX_ELEMENTS, MAX_NAME_BYTES, MAX_KEY_BYTES = 4096, 1 << 16, 1 << 20, 64, 1 << 16
MAX_HEADER_BYTES = 1 << 27

Value = Any  # int, float, bool, str, or a list of one of these


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the tensor table; its data is known to lie within the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # in PyTorch's order: innermost dimension last
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file, in bytes."""
        return math.prod(self.shape) // self.kind.block * self.kind.size


@dataclasses.dataclass(frozen=True)
class Contents:
    """The metadata and tensor table of a file."""

    path: pathlib.Path
    metadata: Mapping[str, Value]
    entries: Mapping[str, Entry]


class _Cursor:
    """A bounds-checked read position in the header of a file."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def fault(self, what: str, **data: str | None) -> CheckpointError:
        return CheckpointError(f"{what} (byte {self.at})", place=self.path, **data)

    def advance(self, size: int) -> int:
        """Advance by `size` bytes and return the previous position."""
        begin = self.at
        if size > self.end - begin:
            raise self.fault(
                f"damaged or truncated: {size} bytes should follow, but {self.end - begin} do",
                hint="fetch the file again",
            )
        self.at = begin + size
        return begin

    def number(self, code: int) -> Any:
        value = struct.unpack_from(NUMBERS[code], self.data, self.advance(_BYTES[code]))[0]
        if code == BOOL and self.data[self.at - 1] > 1:
            raise self.fault(f"a boolean is {self.data[self.at - 1]}")
        if code != FLOAT32:
            return value
        import numpy as np  # here, because most commands look for GGUF files and find none

        return float(str(np.float32(value)))  # 1e-5, not 9.99999974e-06

    def count(self, most: int, what: str) -> int:
        number: int = self.number(10)
        if number > most:
            raise self.fault(f"damaged: {number} {what}; at most {most} are accepted")
        return number

    def text(self, most: int, what: str) -> str:
        size = self.count(most, f"bytes of {what}")
        begin = self.advance(size)
        try:
            return self.data[begin : begin + size].decode()
        except UnicodeDecodeError as e:
            raise self.fault(f"{what} is not UTF-8") from e

    def value(self, key: str) -> Value:
        code: int = self.number(UINT32)
        if code == STRING:
            return self.text(self.end, f"{key!r}")
        if code in NUMBERS:
            return self.number(code)
        if code != ARRAY:
            raise self.fault(f"{key!r} has the unknown type {code}", field=key)
        code = self.number(UINT32)
        size = self.count(MAX_ELEMENTS, f"elements of {key!r}")
        if code == STRING:
            return [self.text(self.end, f"an element of {key!r}") for _ in range(size)]
        if code not in NUMBERS:
            raise self.fault(f"{key!r} is an array of the unsupported type {code}", field=key)
        begin = self.advance(size * _BYTES[code])
        form = "B" if code == BOOL else NUMBERS[code][-1]
        return list(struct.unpack_from(f"<{size}{form}", self.data, begin))


def is_gguf(path: pathlib.Path) -> bool:
    """Return whether a file starts with GGUF's magic bytes."""
    try:
        with path.open("rb") as f:
            return f.read(4) == MAGIC
    except OSError:
        return False


def read(path: pathlib.Path) -> Contents:
    """Parse metadata and tensor table. CheckpointError if anything is invalid or out of bounds.

    The contents of the last two files are kept: opening a model reads its file for the weights, the tokenizer and
    the ends, and a large vocabulary takes a quarter of a second.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot be read ({e})", place=path) from e
    return _read(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _read(path: pathlib.Path, identity: tuple[int, ...]) -> Contents:
    """Parse a file. `identity` differs if the file was replaced or changed."""
    try:
        with path.open("rb") as f:
            if f.read(4) != MAGIC:
                raise CheckpointError("not a GGUF file", place=path)
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot be read ({e})", place=path) from e
    with data:
        return _contents(_Cursor(path, data))


def _contents(cursor: _Cursor) -> Contents:
    cursor.advance(len(MAGIC))
    version: int = cursor.number(UINT32)
    if version not in VERSIONS:
        big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise cursor.fault(
            "a big-endian GGUF file; convert it to little-endian" if big
            else f"GGUF of version {version}; {' and '.join(map(str, VERSIONS))} are supported"
        )  # fmt: skip
    tensors = cursor.count(MAX_TENSORS, "tensors")
    pairs = cursor.count(MAX_PAIRS, "metadata")
    metadata: dict[str, Value] = {}
    for _ in range(pairs):
        key = cursor.text(MAX_KEY_BYTES, "a key")
        if not key or key in metadata:
            raise cursor.fault(f"the key {key!r} is given twice" if key else "a key is empty", field=key or None)
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.fault(f"'general.alignment' is {alignment!r}, not a power of two", field="general.alignment")
    table = [_entry(cursor, alignment) for _ in range(tensors)]
    start = cursor.at + -cursor.at % alignment
    entries: dict[str, Entry] = {}
    end = start
    for entry in sorted(table, key=lambda entry: entry.offset):
        entry = dataclasses.replace(entry, offset=start + entry.offset)
        if entry.name in entries:
            raise cursor.fault(f"tensor {entry.name!r} appears twice", field=entry.name)
        if entry.offset < end:
            raise cursor.fault(f"tensor {entry.name!r} overlaps another", field=entry.name)
        end = entry.offset + entry.nbytes
        if end > len(cursor.data):
            raise cursor.fault(
                f"truncated: tensor {entry.name!r} would end at byte {end} of {len(cursor.data)}",
                field=entry.name,
                hint="fetch it again",
            )
        entries[entry.name] = entry
    return Contents(cursor.path, metadata, entries)


def _entry(cursor: _Cursor, alignment: int) -> Entry:
    """Parse one entry of the tensor table; its offset still counts from the start of the data."""
    name = cursor.text(MAX_NAME_BYTES, "a tensor's name")
    rank: int = cursor.number(UINT32)
    if not 1 <= rank <= 4:
        raise cursor.fault(f"tensor {name!r} has {rank} dimensions", field=name)
    sizes = [cursor.number(10) for _ in range(rank)]
    if not all(sizes):
        raise cursor.fault(f"tensor {name!r} has no elements", field=name)
    code: int = cursor.number(UINT32)
    offset: int = cursor.number(10)
    if code not in _BY_CODE:
        raise cursor.fault(
            f"tensor {name!r} has type {_OTHERS.get(code, code)}; supported are {', '.join(KINDS)}",
            field=name,
        )
    kind = _BY_CODE[code]
    if sizes[0] % kind.block:
        raise cursor.fault(
            f"tensor {name!r} has rows of {sizes[0]} values, not a multiple of {kind.name}'s {kind.block}",
            field=name,
        )
    if offset % alignment:
        raise cursor.fault(
            f"tensor {name!r} begins at {offset}, not a multiple of the alignment {alignment}", field=name
        )
    return Entry(name, kind, tuple(reversed(sizes)), offset)
