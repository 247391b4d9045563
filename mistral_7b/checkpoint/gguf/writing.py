"""Write a GGUF file for llama.cpp: header, metadata, tokenizer and tensors."""

from __future__ import annotations

import pathlib
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files import atomic_write, check_room
from ...model import ModelArgs
from ...quantization.schemes import is_promoted
from ..names import EMBEDDING, OUTPUT, rename
from . import blocks as gguf_blocks
from . import quantizing, tokenizer_metadata
from . import reading as gguf
from .file import ALIGNMENT, ARRAY, BOOL, FLOAT32, INT32, KINDS, MAGIC, STRING, UINT32, Kind, is_gguf
from .file import read as read_gguf
from .vocabulary import MODEL

if TYPE_CHECKING:
    from ..writing import Outgoing

FILE_TYPES = {  # llama.cpp's codes of `general.file_type`, by the type of most matrices
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
MATRICES = {  # the type of most matrices, by the name of a mixture
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q6_k": "Q6_K", "q4_k_m": "Q4_K",
}  # fmt: skip
TYPES = tuple(MATRICES)
NARROW = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # llama.cpp's choice for rows that are no multiple of 256
VERSION, QUANTIZATION_VERSION = 3, 2
_KIND_OF = {dtype: KINDS[name] for name, dtype in gguf_blocks.FLOATS.items()}


def write(
    path: pathlib.Path,
    args: ModelArgs,
    outgoing: list[Outgoing],
    type: str | None,
    source: pathlib.Path | None,
    on_written: Callable[[Outgoing], None],
) -> None:
    """Write the file `path`, which must not exist, atomically (written, then renamed).

    `type` is the type of the matrices; None keeps the type of each, and blocks bit by bit. Vectors
    are float32, as llama.cpp requires. With "q4_0" the output matrix is Q8_0, because it is the most sensitive to
    quantization. "q4_k_m" mixes Q4_K and Q6_K as llama.cpp does. Raises CheckpointError, naming the tensor, if a
    type cannot hold its values.
    """
    if type is not None and type not in TYPES:
        raise CheckpointError(f"unknown type {type!r}; must be one of {', '.join(map(repr, TYPES))}", field="type")
    if path.exists():
        raise CheckpointError("exists already", place=path, hint="choose a new file, or remove this one")
    plan = [(t, _kind(t, type, args)) for t in outgoing]
    for tensor, kind in plan:
        _check(tensor, kind)
    check_room(path, sum(_nbytes(t.shape, kind) for t, kind in plan))
    try:
        with atomic_write(path, folders=True) as partial, partial.open("wb") as f:
            f.write(_header(_metadata(args, plan, source, type), [(_name(t), kind, t.shape) for t, kind in plan]))
            for tensor, kind in plan:
                f.write(bytes(-f.tell() % ALIGNMENT))
                _write_tensor(f, tensor, kind)
                on_written(tensor)
            f.write(bytes(-f.tell() % ALIGNMENT))
    except (struct.error, OverflowError) as e:  # a configuration or tokenizer value out of range
        raise CheckpointError(f"not written: a value is out of the range of its GGUF key ({e})", place=path) from e


def write_floats(path: pathlib.Path, metadata: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file of float tensors by GGUF's names, which must not exist, atomically."""
    plan = [(name, _KIND_OF[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    check_room(path, sum(t.nbytes for t in tensors.values()))
    with atomic_write(path, folders=True) as partial, partial.open("wb") as f:
        f.write(_header(metadata, plan))
        for tensor in tensors.values():
            f.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            f.write(bytes(-f.tell() % ALIGNMENT))


def _name(tensor: Outgoing) -> str:
    name = rename(tensor.name, "mistral", "gguf")
    assert name is not None, f"{tensor.name} is not in the table"
    return name


def _kind(tensor: Outgoing, type: str | None, args: ModelArgs) -> Kind:
    """Return the type of a tensor in the file."""
    if len(tensor.shape) == 1:
        return KINDS["F32"]
    if type is None:
        if isinstance(tensor.stored, gguf.StoredBlocks):
            return tensor.stored.kind
        if tensor.dtype not in _KIND_OF:
            raise CheckpointError(
                f"tensor {tensor.name!r} has type {tensor.dtype}, which GGUF does not have",
                field=tensor.name,
                hint="choose a type",
            )
        return _KIND_OF[tensor.dtype]
    name = MATRICES[type]
    if tensor.name == (EMBEDDING if args.tie_embeddings else OUTPUT):
        name = {"q4_0": "Q8_0", "q4_k_m": "Q6_K"}.get(type, name)
    elif type == "q4_k_m" and is_promoted(tensor.name.removesuffix(".weight"), args.n_layers):
        name = "Q6_K"
    return KINDS[NARROW.get(name, name) if tensor.shape[-1] % KINDS[name].block else name]


def _check(tensor: Outgoing, kind: Kind) -> None:
    if tensor.shape[-1] % kind.block:
        raise CheckpointError(
            f"tensor {tensor.name!r} has rows of {tensor.shape[-1]} values, not a multiple of the {kind.block} "
            f"values of a {kind.name} block",
            field=tensor.name,
            hint="use 'bf16' or 'f16'",
        )


def _nbytes(shape: tuple[int, ...], kind: Kind) -> int:
    return torch.Size(shape).numel() // kind.block * kind.size


def _metadata(
    args: ModelArgs, plan: list[tuple[Outgoing, Kind]], source: pathlib.Path | None, type: str | None
) -> dict[str, Any]:
    kinds = [
        kind.name for tensor, kind in plan if len(tensor.shape) > 1 and tensor.name not in (EMBEDDING, OUTPUT)
    ]
    name = source.stem if source is not None and source.is_file() else source.name if source else "Mistral 7B"
    head: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": name or "Mistral 7B",
        "general.file_type": FILE_TYPES[MATRICES[type] if type else max(set(kinds), key=kinds.count)],
    }
    if any(kind.block > 1 for _, kind in plan):
        head["general.quantization_version"] = QUANTIZATION_VERSION
    return head | gguf.metadata(args) | _from_source(source, args.vocab_size)


def _from_source(source: pathlib.Path | None, vocab_size: int) -> dict[str, Any]:
    """Return the name and tokenizer keys of a GGUF source, else those of a folder's tokenizer files."""
    if source is not None and is_gguf(source):
        kept = ("tokenizer.", "huggingface.", "general.name")
        return {k: v for k, v in read_gguf(source).metadata.items() if k.startswith(kept)}
    keys = tokenizer_metadata.of_folder(source, vocab_size) if source is not None and source.is_dir() else None
    if keys is None:
        warnings.warn(
            "there is no tokenizer.model or tokenizer.json beside the weights, so the GGUF file has no tokenizer",
            stacklevel=2,
        )
        return {MODEL: "none"}
    return keys


def _header(metadata: dict[str, Any], plan: list[tuple[str, Kind, tuple[int, ...]]]) -> bytes:
    """The header of tensors with these names, types and shapes, padded to the alignment."""
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(plan), len(metadata))]
    for key, value in metadata.items():
        out += [_text(key), *_value(value)]
    offset = 0
    for name, kind, shape in plan:
        out += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        out.append(struct.pack("<IQ", kind.code, offset))
        size = _nbytes(shape, kind)
        offset += size + -size % ALIGNMENT
    raw = b"".join(out)
    return raw + bytes(-len(raw) % ALIGNMENT)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> Iterator[bytes]:
    """Yield a metadata value with its type code. As in ggml, ints are uint32; int32 in arrays."""
    if isinstance(value, list):
        first = value[0] if value else 0
        code, form = {str: (STRING, ""), float: (FLOAT32, "f")}.get(type(first), (INT32, "i"))
        yield struct.pack("<IIQ", ARRAY, code, len(value))
        yield b"".join(map(_text, value)) if code == STRING else struct.pack(f"<{len(value)}{form}", *value)
    elif isinstance(value, str):
        yield struct.pack("<I", STRING) + _text(value)
    elif isinstance(value, bool):
        yield struct.pack("<I?", BOOL, value)
    elif isinstance(value, float):
        yield struct.pack("<If", FLOAT32, value)
    else:
        yield struct.pack("<II", UINT32, value)


def _write_tensor(f: BinaryIO, tensor: Outgoing, kind: Kind) -> None:
    """Load one tensor, write it as `kind` a chunk of rows at a time, and release it."""
    stored = tensor.stored
    if isinstance(stored, gguf.StoredBlocks) and stored.kind == kind:
        f.write(stored.raw().numpy().data)
    else:
        values = tensor.fetch().cpu()
        rows = values.reshape(-1, values.shape[-1])
        step = max(1, gguf_blocks.VALUES_AT_ONCE // rows.shape[1])
        for begin in range(0, len(rows), step):
            raw = _encode(tensor.name, rows[begin : begin + step], kind)
            f.write(raw.contiguous().view(torch.uint8).numpy().data)
    tensor.release()


def _encode(name: str, values: Tensor, kind: Kind) -> Tensor:
    """Return rows of values in the representation of `kind`."""
    try:
        if kind.block > 1:
            return quantizing.quantize(kind, values)
    except ValueError as e:
        raise CheckpointError(
            f"tensor {name!r} contains {e}: it cannot be stored as {kind.name}", field=name
        ) from e
    out = values.to(gguf_blocks.FLOATS[kind.name])
    if bool((out.isinf() & values.isfinite()).any()):
        raise CheckpointError(
            f"tensor {name!r} contains values too large for {kind.name}", field=name, hint="use 'bf16'"
        )
    return out
