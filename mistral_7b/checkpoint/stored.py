"""Tensors in memory-mapped files, with known name, dtype, shape and offset.

A file is mapped once, privately (writing to a tensor never changes the file), and each tensor is a view of
the mapping. Pages are loaded when touched and dropped by `release`, so that copying a checkpoint one tensor
at a time never holds it twice. Two containers are supported:

    safetensors           an 8-byte header length, a JSON header of names and offsets, then the data
    PyTorch's zip pickle  opened with `weights_only=True` on the meta device: runs no code from the file, and
                          gives the offset of each storage
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import pathlib
import struct
import zipfile
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, first_line
from .others import check_weight_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "I8": torch.int8,  # quantized weights only
}  # fmt: skip
READABLE = DTYPES | {"I32": torch.int32, "I64": torch.int64}  # in checkpoints quantized elsewhere (packed.py)
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = {dtype for dtype in CODES if dtype.is_floating_point}  # dtypes of unquantized weights
NAMED_DTYPES = {
    "auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16,
    "float32": torch.float32, "float": torch.float32, "float64": torch.float64,
}  # fmt: skip


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype for weights, given as such or by a name of vLLM's. ConfigError for any other."""
    found = NAMED_DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype must be one of {', '.join(NAMED_DTYPES)}, not {dtype!r}", field="dtype")
    return found


class MappedFile:
    """A weight file, memory-mapped when its first tensor is read."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None

    def map(self) -> mmap.mmap:
        if self._map is None:
            try:
                with self.path.open("rb") as f:
                    self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as e:
                raise CheckpointError(f"cannot be mapped into memory ({e})", place=self.path) from e
        return self._map


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file, not yet loaded."""

    file: MappedFile
    name: str  # the name in the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    stride: tuple[int, ...] | None = None  # in elements; None: contiguous

    @property
    def path(self) -> pathlib.Path:
        return self.file.path

    @property
    def nbytes(self) -> int:
        """The size of the tensor's values, in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def fault(self, what: str, **more: str) -> CheckpointError:
        """Return a CheckpointError about this tensor."""
        return CheckpointError(f"tensor {self.name!r} {what}", field=self.name, place=self.path, **more)

    def _elements(self) -> int:
        """Return the number of elements of the file that the tensor spans."""
        if self.stride is None:
            return torch.Size(self.shape).numel()
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def view(self) -> Tensor:
        """Return the tensor as a view of the mapped file; writes to it never reach the file."""
        mapped = self.file.map()
        count = self._elements()
        if self.offset + count * self.dtype.itemsize > len(mapped):
            raise self.fault("extends beyond the end of the file", hint="fetch it again")
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count * self.dtype.itemsize, offset=self.offset)
        if raw.data_ptr() % self.dtype.itemsize:  # the header is not padded, so the data is unaligned
            raw = raw.clone()
            self.release()
        flat = raw.view(self.dtype)
        return flat.view(self.shape) if self.stride is None else flat.as_strided(self.shape, self.stride)

    def release(self) -> None:
        """Let the operating system drop the tensor's pages; the next access loads them again."""
        mapped = self.file.map()
        if hasattr(mapped, "madvise"):
            begin = self.offset - self.offset % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, begin, self.offset + self.nbytes - begin)


def read_file(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Return the tensors of a weight file by its content. CheckpointError if it is damaged, or another file."""
    check_weight_file(path)
    with path.open("rb") as f:
        head = f.read(8)
    return _read_pickle(path) if head[:4] == b"PK\x03\x04" else _read_safetensors(path, head)


def _read_safetensors(path: pathlib.Path, head: bytes) -> dict[str, StoredTensor]:
    try:
        with safetensors.safe_open(path, "pt"):  # checks header, offsets and the file's length
            pass
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header: dict[str, Any] = json.loads(f.read(length), object_pairs_hook=_unique_names)
    except CheckpointError as e:
        raise CheckpointError.of(e, place=path) from e
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError, struct.error) as e:
        if head[:1] == b"\x80" and head[2:] != bytes(6):  # a pickle's first bytes, not a plausible header length
            raise CheckpointError(
                "a pickle written by PyTorch before 1.6", place=path, hint="save it as safetensors"
            ) from e
        raise CheckpointError(f"damaged or truncated ({e})", place=path, hint="fetch the file again") from e
    header.pop("__metadata__", None)
    file, out = MappedFile(path), {}
    for name, entry in header.items():
        if entry["dtype"] not in READABLE:
            raise CheckpointError(
                f"tensor {name!r} has type {entry['dtype']}, which is not supported", field=name, place=path
            )
        begin = 8 + length + entry["data_offsets"][0]
        out[name] = StoredTensor(file, name, READABLE[entry["dtype"]], tuple(entry["shape"]), begin)
    return out


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise CheckpointError(f"tensor {twice!r} appears twice", field=twice)
    return out


def _read_pickle(path: pathlib.Path) -> dict[str, StoredTensor]:
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        starts = _storage_offsets(path)
    # A damaged pickle can raise any exception; `weights_only` guarantees that no code ran.
    except Exception as e:
        raise CheckpointError(
            "refused: it is damaged, or contains more than tensors, which could execute code "
            f"({type(e).__name__}: {first_line(e)})",
            place=path,
            hint="use a safetensors file",
        ) from e
    file, out = MappedFile(path), {}
    if not isinstance(tensors, dict):
        raise CheckpointError(
            f"contains a {type(tensors).__name__} instead of a dictionary of tensors", place=path
        )
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.dtype in FLOATS):
            raise CheckpointError(
                f"entry {str(name)[:80]!r} is not a floating-point tensor", field=str(name)[:80], place=path
            )
        start = tensor.untyped_storage()._checkpoint_offset
        if start not in starts:
            raise CheckpointError(
                f"tensor {name!r} is stored compressed",
                field=name,
                place=path,
                hint="save it again with torch.save",
            )
        offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
        stride = None if tensor.is_contiguous() else tensor.stride()
        out[name] = StoredTensor(file, name, tensor.dtype, tuple(tensor.shape), offset, stride)
    return out


def _storage_offsets(path: pathlib.Path) -> set[int]:
    """Return the byte offsets of the uncompressed entries of a zip file."""
    out = set()
    with zipfile.ZipFile(path) as archive, path.open("rb") as f:
        for entry in archive.infolist():
            if entry.compress_type == zipfile.ZIP_STORED:
                f.seek(entry.header_offset + 26)  # local header: 30 bytes, then the name and padding
                name, extra = struct.unpack("<HH", f.read(4))
                out.add(entry.header_offset + 30 + name + extra)
    return out
