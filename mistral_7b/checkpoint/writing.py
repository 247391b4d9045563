"""Write a model or checkpoint as a folder (or one GGUF file), one tensor at a time.

The folder is written under a temporary name and renamed when it is complete. Its configuration is written
last, so that the remains of an interrupted run cannot be opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import check_room, partial_name, raise_write_error, remove_left_over, size_in_bytes
from ..model import Mistral7B, ModelArgs
from ..quantization.linear import PackedLinear, unpacked_tensors
from ..quantization.schemes import scheme_of
from . import hub, huggingface, mistral
from .gguf import reading as gguf
from .gguf import writing as gguf_writing
from .names import EMBEDDING, OUTPUT, expected, half_split, rename, rotated_heads
from .reading import Checkpoint, open_checkpoint
from .stored import CODES, StoredTensor
from .tokenizer_files import TokenizerFiles

Progress = Callable[[int, int, str], None]  # bytes written, total bytes, name of the tensor just written
ALIGNMENT = 64  # bytes: alignment of mapped tensors, for aligned vector loads


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """One tensor to write: its name in Mistral's layout, and a function that loads its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]  # in Mistral's layout
    release: Callable[[], None] = lambda: None  # called after the tensor is written
    stored: StoredTensor | None = None  # the source file's tensor, if any: quantized blocks are copied unchanged

    @property
    def nbytes(self) -> int:
        """The size of the data, in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save(
    model: Mistral7B,
    path: str | os.PathLike[str],
    format: str = "huggingface",
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
    type: str | None = None,
    distance: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Write a model in format "huggingface", "mistral", "gguf" or "quantized".

    These load in transformers, mistral-inference, llama.cpp and this package. `path` must not exist or be an
    empty folder. `max_shard_size` is in bytes or like "5GB"; Mistral's layout is always one file. GGUF is one
    file; `type` is the type of its matrices: "f32", "f16", "bf16", "q8_0", "q4_0", "q6_k", "q4_k_m", or None for
    the model's own. The tokenizer's files, with chat templates and ends, are those of the model's source. Raises
    CheckpointError if a weight has no data or does not belong to a plain Mistral 7B: merge adapters, save before
    quantizing. Weights that are packed (PackedLinear) are unpacked, without loss.

    A model of int8 or int4 modules is saved as "quantized", with its measured `distance` from the original and
    its `calibration` (see quantized.Record). Raises QuantizationError without a distance.
    """
    if format == "quantized":
        from .quantizing import save_quantized  # it imports this module

        save_quantized(model, path, distance, calibration, progress)
        return
    if distance is not None or calibration is not None:
        raise CheckpointError(
            f"format {format!r} cannot store a distance or calibration; 'quantized' can", field="format"
        )
    if scheme_of(model) is not None:
        raise CheckpointError(
            f"format {format!r} cannot store a quantized model",
            field="format",
            hint="save it as 'quantized'",
        )
    state = unpacked_tensors(model)
    packed = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    plain = dict(expected(model.args))
    for name, value in state.items():
        if name not in plain or tuple(value.shape) != plain[name]:
            raise CheckpointError(
                f"{name!r} {tuple(value.shape)} is not a weight of Mistral 7B without additions; not saved",
                field=name,
            )
        if value.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no data to save", field=name)
        if value.dtype not in CODES:
            raise CheckpointError(f"{name!r} has type {value.dtype}, which cannot be saved", field=name)
    if missing := [name for name in plain if name not in state and name not in packed]:
        raise CheckpointError(
            f"the model lacks {missing[0]!r}: a quantized or adapted model cannot be saved in this format",
            field=missing[0],
        )
    outgoing = [
        Outgoing(name, packed[name].dtype, shape, packed[name].dense)
        if name in packed
        else Outgoing(name, state[name].dtype, shape, functools.partial(state.__getitem__, name))
        for name, shape in plain.items()
    ]
    write(pathlib.Path(path), model.args, format, outgoing, max_shard_size, model.source, progress, type)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "huggingface",
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
    type: str | None = None,
) -> None:
    """Convert the checkpoint `source` (folder, file or hub id) to format `to` at `out`.

    Values keep their type and bits, except for GGUF's `type` (see `save`) and for quantized tensors, which other
    formats store dequantized. At most two tensors are in memory at a time. `out` must not exist or be an empty
    folder. `progress(done, total, name)` is called after each tensor, in bytes.
    """
    checkpoint = open_checkpoint(hub.resolve(source))
    outgoing = outgoing_of(checkpoint)
    write(pathlib.Path(out), checkpoint.args, to, outgoing, max_shard_size, checkpoint.folder, progress, type)


def outgoing_of(checkpoint: Checkpoint) -> list[Outgoing]:
    """Return all tensors of a checkpoint, those of a tied output included, to be written as they are."""
    outgoing = []
    for name, shape in expected(checkpoint.args):
        held = name if name in checkpoint.tensors else EMBEDDING  # a tied output is stored once, as the embedding
        stored = checkpoint.tensors[held]
        dtype = stored.dtype if checkpoint.format != "gguf" else gguf.plain_dtype(stored, checkpoint.tensors)
        fetch = functools.partial(checkpoint.read, held, dtype)
        outgoing.append(Outgoing(name, dtype, shape, fetch, stored.release, stored))
    return outgoing


def write(
    out: pathlib.Path,
    args: ModelArgs,
    format: str,
    outgoing: list[Outgoing],
    max_shard_size: int | str,
    source: pathlib.Path | None,
    progress: Progress | None,
    type: str | None,
    beside: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Write tensors in `format`, with the tokenizer and generation settings of `source`.

    `beside` is called with the unfinished folder, to add or replace files in it; not for GGUF.
    """
    if format in ("huggingface", "gguf") and args.tie_embeddings:
        outgoing = [t for t in outgoing if t.name != OUTPUT]
    check_format(format, type)
    if format == "gguf":
        gguf_writing.write(out, args, outgoing, type, source, _progress_callback(outgoing, progress))
        return
    if format == "mistral":
        mistral.params(args)  # refuses what it has no field for before anything is written
    limit = _bytes(max_shard_size)
    with new_folder(out, sum(t.nbytes for t in outgoing)) as partial:
        _write_weights(partial, args, format, outgoing, limit, progress)
        tokenizer = TokenizerFiles.of(source)
        tokenizer.write(partial, format)
        if beside is not None:
            beside(partial)
        _write_configs(partial, args, format, outgoing, tokenizer.ids)


def check_format(format: str, type: str | None) -> None:
    """Raise CheckpointError for an unknown format, or a type with a format other than GGUF."""
    if format not in ("huggingface", "mistral", "gguf"):
        raise CheckpointError(
            f"unknown format {format!r}; must be 'huggingface', 'mistral', 'gguf' or 'quantized'", field="format"
        )
    if type is not None and format != "gguf":
        raise CheckpointError(
            f"type {type!r} applies only to GGUF; other formats keep the type of the weights", field="type"
        )


@contextlib.contextmanager
def new_folder(out: pathlib.Path, needed: int) -> Iterator[pathlib.Path]:
    """Yield a temporary folder for `needed` bytes; rename it to `out` on success.

    On an error it is removed. Raises CheckpointError if `out` exists and is not empty, WriteError if the disk is
    full or writing fails.
    """
    remove_left_over(out.absolute())
    check_target(out, needed)
    partial = partial_name(out.absolute())
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()  # empty, as checked; some systems cannot rename onto a folder
        os.replace(partial, out)
    except Exception as error:
        raise_write_error(error, out, partial)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(out: pathlib.Path, needed: int, file: bool = False) -> None:
    """Raise CheckpointError if `out` exists (as more than an empty folder), WriteError without room for it."""
    if out.exists() and not (not file and out.is_dir() and not any(out.iterdir())):
        raise CheckpointError("exists already", place=out, hint="choose a new folder, or remove this one")
    check_room(out, needed)


def _bytes(size: int | str) -> int:
    """Parse a size in bytes from a number or a string such as "5GB" (10^9) or "5GiB" (2^30)."""
    found = size_in_bytes(size) if isinstance(size, str) else size
    if not isinstance(found, int) or found <= 0:
        raise CheckpointError(
            f'max_shard_size {size!r} is not a size: use bytes, or a string like "5GB" or "500MB"',
            field="max_shard_size",
        )
    return found


def _progress_callback(outgoing: list[Outgoing], progress: Progress | None) -> Callable[[Outgoing], None]:
    """Return a callback for written tensors that counts bytes and calls `progress`."""
    done, total = 0, sum(t.nbytes for t in outgoing)

    def on_written(tensor: Outgoing) -> None:
        nonlocal done
        done += tensor.nbytes
        if progress is not None:
            progress(done, total, tensor.name)

    return on_written


def _write_weights(
    folder: pathlib.Path,
    args: ModelArgs,
    format: str,
    outgoing: list[Outgoing],
    limit: int,
    progress: Progress | None,
) -> None:
    """Write all tensors: one file in Mistral's layout, else shards of at most `limit` bytes."""
    on_written = _progress_callback(outgoing, progress)
    if format == "mistral":
        _write_safetensors(folder / "consolidated.safetensors", args, format, outgoing, on_written)
        return
    shards = _shards(outgoing, limit)
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", args, format, outgoing, on_written)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, args, format, shard, on_written)
        weight_map.update({rename(t.name, "mistral", format): file for t in shard})
    total = {
        "total_parameters": sum(math.prod(t.shape) for t in outgoing),
        "total_size": sum(t.nbytes for t in outgoing),
    }
    write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def _shards(outgoing: list[Outgoing], limit: int) -> list[list[Outgoing]]:
    """Group consecutive tensors into shards of at most `limit` bytes (or one larger tensor)."""
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in outgoing:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_safetensors(
    path: pathlib.Path,
    args: ModelArgs,
    format: str,
    tensors: list[Outgoing],
    on_written: Callable[[Outgoing], None],
) -> None:
    """Write one safetensors file, loading, writing and releasing one tensor at a time."""
    tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # stable; widest first keeps alignment
    names = [rename(t.name, "mistral", format) for t in tensors]
    assert None not in names, "a tensor is not in the table"
    with path.open("wb") as f:
        f.write(header_of(zip(names, (t.dtype for t in tensors), (t.shape for t in tensors), strict=True)))
        for t in tensors:
            value = t.fetch().cpu()
            heads = rotated_heads(t.name, args) if format == "huggingface" else None
            value = value if heads is None else half_split(value, heads)
            f.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
            t.release()
            on_written(t)


def header_of(tensors: Iterable[tuple[str | None, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return a safetensors header for tensors of these names, types and shapes, in this order."""
    codes = {**CODES, torch.int64: "I64"}  # of token ids; weights are never int64
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[str(name)] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw


def _write_configs(
    folder: pathlib.Path, args: ModelArgs, format: str, outgoing: list[Outgoing], ids: Mapping[str, Any]
) -> None:
    if format == "mistral":
        write_json(folder / "params.json", mistral.params(args))
        return
    dtype = Counter(t.dtype for t in outgoing).most_common(1)[0][0]
    write_json(folder / "config.json", huggingface.config(args, str(dtype).removeprefix("torch."), ids))


def write_json(path: pathlib.Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
