"""A model or a checkpoint -> a folder (or GGUF's one file) that others open, a tensor at a time.

The folder is written beside its place and renamed when it is whole; its configuration is written last,
so that what an interrupted run leaves behind opens for nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import check_room, raise_refusal
from ..model import Mistral7B, ModelArgs
from ..quantization.schemes import scheme_of
from . import gguf, gguf_tokenizer, gguf_writing, hub, huggingface, mistral
from .gguf_file import is_gguf
from .gguf_file import read as read_gguf
from .names import EMBEDDING, OUTPUT, expected, half_split, rename, rotated_heads
from .reading import open_checkpoint
from .stored import CODES, Stored

Progress = Callable[[int, int, str], None]  # bytes written, bytes in all, the tensor just written
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ALIGNMENT = 64  # bytes: tensors of a file that is mapped begin where vector loads like it


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """One tensor to be written: by Mistral's name, its data fetched only when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]  # in Mistral's layout
    release: Callable[[], None] = lambda: None  # called when it has been written
    stored: Stored | None = None  # where it lies in a file, if it does: quantised blocks are copied from there

    @property
    def nbytes(self) -> int:
        """The size of the tensor's values, in bytes."""
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
    """Write a model as transformers ("huggingface"), mistral-inference ("mistral") or llama.cpp ("gguf") loads it,
    or "quantized".

    `path` must not exist, or be an empty folder; GGUF is one file, `type` that of its matrices: "f32", "f16",
    "bf16", "q8_0", "q4_0", or None for the model's own. `max_shard_size` is in bytes or like "5GB"; Mistral's
    layout is one file whatever its size. The tokenizer is taken along from where the model was opened.
    Raises CheckpointError if a weight has no data, or is not one of a plain Mistral 7B (merge an
    adapter, or save before quantising).

    A model of int8 or int4 modules is "quantized", one file too, with its measured `distance` from the original
    and how it was calibrated (see quantized.Record); QuantizationError without.
    """
    if format == "quantized":
        from .quantizing import save_quantized  # which stands on this module

        save_quantized(model, path, distance, calibration, progress)
        return
    if distance is not None or calibration is not None:
        raise CheckpointError(
            f"format {format!r} has no place for a distance or calibration: 'quantized' has", field="format"
        )
    if scheme_of(model) is not None:
        raise CheckpointError(
            f"the model is quantised, which format {format!r} cannot say",
            field="format",
            hint="save it as 'quantized'",
        )
    state = {name: value.detach() for name, value in model.state_dict().items()}
    plain = dict(expected(model.args))
    for name, value in state.items():
        if name not in plain or tuple(value.shape) != plain[name]:
            raise CheckpointError(
                f"{name!r} {tuple(value.shape)} is no weight of a plain Mistral 7B; not saved", field=name
            )
        if value.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no data to save", field=name)
        if value.dtype not in CODES:
            raise CheckpointError(f"{name!r} is of type {value.dtype}: cannot be saved", field=name)
    if missing := [name for name in plain if name not in state]:
        raise CheckpointError(
            f"the model lacks {missing[0]!r}: quantised or adapted, it cannot be saved", field=missing[0]
        )
    outgoing = [
        Outgoing(name, state[name].dtype, shape, functools.partial(state.__getitem__, name))
        for name, shape in plain.items()
    ]
    _write(pathlib.Path(path), model.args, format, outgoing, max_shard_size, model.source, progress, type)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "huggingface",
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
    type: str | None = None,
) -> None:
    """Write the checkpoint `source` (folder, file or hub id) as format `to` into the folder (or file) `out`.

    Values keep their type and bits, but for what GGUF's `type` asks (see `save`) and for quantised tensors,
    of which other formats get the values they stand for. No more than a tensor or two is in memory at a
    time. `out` must not exist, or be empty. `progress(done, total, name)` is called after each tensor, in bytes.
    """
    checkpoint = open_checkpoint(hub.resolve(source))
    outgoing = []
    for name, shape in expected(checkpoint.args):
        held = name if name in checkpoint.tensors else EMBEDDING  # a tied output is stored once
        stored = checkpoint.tensors[held]
        dtype = stored.dtype if checkpoint.format != "gguf" else gguf.plain_dtype(stored, checkpoint.tensors)
        fetch = functools.partial(checkpoint.read, held, dtype)
        outgoing.append(Outgoing(name, dtype, shape, fetch, stored.release, stored))
    _write(pathlib.Path(out), checkpoint.args, to, outgoing, max_shard_size, checkpoint.folder, progress, type)


def _write(
    out: pathlib.Path,
    args: ModelArgs,
    format: str,
    outgoing: list[Outgoing],
    max_shard_size: int | str,
    source: pathlib.Path | None,
    progress: Progress | None,
    type: str | None,
) -> None:
    if format in ("huggingface", "gguf") and args.tie_embeddings:
        outgoing = [t for t in outgoing if t.name != OUTPUT]
    if format == "gguf":
        gguf_writing.write(out, args, outgoing, type, source, _teller(outgoing, progress))
    elif type is not None:
        raise CheckpointError(
            f"a type ({type!r}) is chosen for GGUF alone; other formats keep that of the weights", field="type"
        )
    else:
        _write_folder(out, args, format, outgoing, max_shard_size, source, progress)


def _write_folder(
    out: pathlib.Path,
    args: ModelArgs,
    format: str,
    outgoing: list[Outgoing],
    max_shard_size: int | str,
    source: pathlib.Path | None,
    progress: Progress | None,
) -> None:
    if format not in ("huggingface", "mistral"):
        raise CheckpointError(
            f"format {format!r} is not known: 'huggingface', 'mistral', 'gguf' or 'quantized'", field="format"
        )
    limit = _bytes(max_shard_size)
    with new_folder(out, sum(t.nbytes for t in outgoing)) as partial:
        _write_weights(partial, args, format, outgoing, limit, progress)
        copy_beside(source, partial, format)
        _write_configs(partial, args, format, outgoing)


@contextlib.contextmanager
def new_folder(out: pathlib.Path, needed: int) -> Iterator[pathlib.Path]:
    """A folder beside `out` to write `needed` bytes into; it becomes `out` when all is well, else it goes.

    CheckpointError if `out` is there and not empty, WriteError if there is no room or writing fails.
    """
    _check_room(out, needed)
    partial = out.absolute().parent / f".{out.absolute().name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()  # empty, as checked; not everywhere can a folder be renamed onto another
        os.replace(partial, out)
    except Exception as error:
        raise_refusal(error, out, partial)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_room(out: pathlib.Path, needed: int) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError("exists already", place=out, hint="name a new folder, or remove that one")
    check_room(out, needed)


def _bytes(size: int | str) -> int:
    """A size in bytes, from a number or a text such as "5GB" (10^9) or "5GiB" (2^30)."""
    if isinstance(size, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())):
        number, unit = found.groups()
        size = int(float(number) * UNITS[unit.upper()]) if unit.upper() in UNITS else 0
    if not isinstance(size, int) or size <= 0:
        raise CheckpointError(
            f'max_shard_size {size!r} is no size: bytes, or like "5GB" or "500MB"', field="max_shard_size"
        )
    return size


def _teller(outgoing: list[Outgoing], progress: Progress | None) -> Callable[[Outgoing], None]:
    """What to call when a tensor has been written: it counts the bytes and tells `progress`."""
    done, total = 0, sum(t.nbytes for t in outgoing)

    def tell(tensor: Outgoing) -> None:
        nonlocal done
        done += tensor.nbytes
        if progress is not None:
            progress(done, total, tensor.name)

    return tell


def _write_weights(
    folder: pathlib.Path,
    args: ModelArgs,
    format: str,
    outgoing: list[Outgoing],
    limit: int,
    progress: Progress | None,
) -> None:
    """All tensors: one file in Mistral's layout, in Hugging Face's shards of at most `limit` bytes."""
    tell = _teller(outgoing, progress)
    if format == "mistral":
        _write_safetensors(folder / "consolidated.safetensors", args, format, outgoing, tell)
        return
    shards = _shards(outgoing, limit)
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", args, format, outgoing, tell)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, args, format, shard, tell)
        weight_map.update({rename(t.name, "mistral", format): file for t in shard})
    total = {
        "total_parameters": sum(math.prod(t.shape) for t in outgoing),
        "total_size": sum(t.nbytes for t in outgoing),
    }
    write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def _shards(outgoing: list[Outgoing], limit: int) -> list[list[Outgoing]]:
    """Consecutive tensors, together at most `limit` bytes; one that is larger has a shard to itself."""
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
    path: pathlib.Path, args: ModelArgs, format: str, tensors: list[Outgoing], tell: Callable[[Outgoing], None]
) -> None:
    """One safetensors file, its tensors fetched, written and let go one after another."""
    tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # stable; wide ones first keeps all aligned
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
            tell(t)


def header_of(tensors: Iterable[tuple[str | None, torch.dtype, tuple[int, ...]]]) -> bytes:
    """How a safetensors file begins that holds tensors of these names, types and shapes, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[str(name)] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw


def copy_beside(source: pathlib.Path | None, folder: pathlib.Path, format: str) -> None:
    """Tokenizer files, and generation_config.json where it belongs, from where the model came."""
    if source is not None and is_gguf(source):
        metadata = read_gguf(source).metadata
        if metadata.get(gguf_tokenizer.MODEL) == "llama":
            vocabulary = gguf_tokenizer.sentencepiece_model(source, metadata)
            (folder / gguf_tokenizer.file_name(metadata)).write_bytes(vocabulary)
    if source is None or not source.is_dir():
        return
    for entry in sorted(source.iterdir()):
        settings = format == "huggingface" and entry.name == "generation_config.json"
        if entry.is_file() and (settings or hub.TOKENIZER_FILES.fullmatch(entry.name)):
            shutil.copyfile(entry, folder / entry.name)


def _write_configs(folder: pathlib.Path, args: ModelArgs, format: str, outgoing: list[Outgoing]) -> None:
    if format == "mistral":
        write_json(folder / "params.json", mistral.params(args))
        return
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", huggingface.GENERATION)
    dtype = Counter(t.dtype for t in outgoing).most_common(1)[0][0]
    write_json(folder / "config.json", huggingface.config(args, str(dtype).removeprefix("torch.")))


def write_json(path: pathlib.Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
