"""GGUF files of architecture `llama`, which Mistral 7B uses: ModelArgs and tensors.

The rows of q and k are in Mistral's order, so nothing is permuted. llama.cpp reads no key for the window with
this architecture. Files written here have one; in other files theta 1e4 means v0.1 and its window of 4096.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...kernels.block_formats import FORMATS
from ...model import ModelArgs
from .. import rope
from ..config import V0_1_THETA, V0_1_WINDOW, check_supported, theta_and_window, to_args
from ..names import EMBEDDING, OUTPUT, rename
from ..stored import MappedFile, StoredTensor
from . import blocks as gguf_blocks
from . import file as gguf_file
from . import splits
from .file import Kind

ARCHITECTURES = ("llama", "mistral")  # "mistral": the name used by a few converters
FIELDS = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "hidden_dim": "feed_forward_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "max_seq_len": "context_length",
    "vocab_size": "vocab_size",
}
WINDOW, THETA, HEAD_DIM = "attention.sliding_window", "rope.freq_base", "rope.dimension_count"
WIDTHS = ("attention.key_length", "attention.value_length")
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {  # key -> the values that do not change the model
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window_pattern": (),
    "use_parallel_residual": (False,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
}
OTHER_KEYS = {"tensor_data_layout", *rope.GGUF_KEYS, *rope.GGUF_VALUES}
FREQUENCIES = "rope_freqs.weight"  # divisors of the rotary frequencies
TOKENS = "tokenizer.ggml.tokens"


@dataclasses.dataclass(frozen=True)
class StoredBlocks(StoredTensor):
    """A quantized tensor in a file, with values in float32."""

    kind: Kind = gguf_file.KINDS["Q8_0"]

    @property
    def kernel_ready(self) -> bool:
        """Whether this is a matrix in a block format of the kernels."""
        return len(self.shape) == 2 and self.kind.name in FORMATS

    @property
    def nbytes(self) -> int:
        """The size of the blocks, in bytes."""
        return math.prod(self.shape) // self.kind.block * self.kind.size

    def raw(self) -> Tensor:
        """Return the blocks as a view of the mapped file: (N, K / block * size) uint8."""
        mapped = self.file.map()
        if self.offset + self.nbytes > len(mapped):
            raise self.fault("extends beyond the end of the file", hint="fetch it again")
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=self.nbytes, offset=self.offset)
        return flat.view(math.prod(self.shape[:-1]), -1)

    def view(self) -> Tensor:
        """Return the dequantized values in float32; unlike `StoredTensor.view`, a copy."""
        return self.values(torch.float32)

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized values, rounded to `dtype`, and release the blocks' pages."""
        out = gguf_blocks.dequantize_to(self.kind, self.raw(), dtype).view(self.shape)
        self.release()
        return out


def read(path: pathlib.Path) -> tuple[ModelArgs, dict[str, StoredTensor]]:
    """Return the configuration of a file, or of the split file it is a part of, and its tensors by GGUF's names.

    Raises CheckpointError if it is not a Mistral 7B.
    """
    parts = splits.read(path)
    tensors = {name: tensor for part in parts for name, tensor in stored_tensors(part).items()}
    if frequencies := tensors.pop(FREQUENCIES, None):
        if frequencies.nbytes > 1 << 16 or not bool((frequencies.view() == 1).all()):
            raise CheckpointError(
                f"{FREQUENCIES!r} scales the rotary embedding, which Mistral 7B does not support",
                field=FREQUENCIES,
                place=path,
            )
        frequencies.release()
    entries = {name: entry for part in parts for name, entry in part.entries.items()}
    contents = dataclasses.replace(parts[0], entries=entries)
    return _args(contents, tied=rename(OUTPUT, "mistral", "gguf") not in tensors), tensors


def stored_tensors(contents: gguf_file.Contents) -> dict[str, StoredTensor]:
    file, out = MappedFile(contents.path), {}
    for name, entry in contents.entries.items():
        if entry.kind.name in gguf_blocks.FLOATS:
            out[name] = StoredTensor(file, name, gguf_blocks.FLOATS[entry.kind.name], entry.shape, entry.offset)
        else:
            out[name] = StoredBlocks(file, name, torch.float32, entry.shape, entry.offset, kind=entry.kind)
    return out


def _args(contents: gguf_file.Contents, tied: bool) -> ModelArgs:
    path, metadata = contents.path, contents.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"'general.architecture' is {architecture!r}; only 'llama' can be opened",
            field="general.architecture",
            place=path,
        )
    prefix = f"{architecture}."
    data = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    check_supported(path, data, SUPPORTED_VALUES)
    known = {*FIELDS.values(), *SUPPORTED_VALUES, *WIDTHS, *OTHER_KEYS, WINDOW, THETA, HEAD_DIM}
    if unknown_fields := sorted(data.keys() - known):
        warnings.warn(f"{path}: keys {', '.join(map(repr, unknown_fields))} are unknown and ignored", stacklevel=2)
    data.setdefault("attention.head_count_kv", data.get("attention.head_count"))
    data.setdefault("vocab_size", _vocabulary(contents))
    scaling = rope.read_gguf(path, data)
    data["context_length"] = rope.longest_context(data.get("context_length"), scaling)
    theta, window = _theta_and_window(path, data)
    return to_args(
        path, data, FIELDS, head_dim=_head_dim(path, data), rope_theta=theta, sliding_window=window,
        tie_embeddings=tied, rope_scaling=scaling,
    )  # fmt: skip


def _vocabulary(contents: gguf_file.Contents) -> int | None:
    """Return the vocabulary size: of the tokenizer, else of the embedding."""
    tokens = contents.metadata.get(TOKENS)
    if isinstance(tokens, list):
        return len(tokens)
    embedding = contents.entries.get(rename(EMBEDDING, "mistral", "gguf") or "")
    return embedding.shape[0] if embedding else None


def _theta_and_window(path: pathlib.Path, data: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return RoPE's theta (by default llama.cpp's) and the window (None for 0)."""
    theta, window = data.get(THETA, V0_1_THETA), data.get(WINDOW)
    if WINDOW not in data and theta == V0_1_THETA:
        warnings.warn(
            f"{path}: theta 1e4 as in v0.1, and GGUF has no key for the window: using v0.1's {V0_1_WINDOW}",
            stacklevel=2,
        )
        window = V0_1_WINDOW
    return theta_and_window(path, theta, None if window == 0 and not isinstance(window, bool) else window)


def _head_dim(path: pathlib.Path, data: Mapping[str, Any]) -> Any:
    """Return the head width, which must be equal for rotation, keys and values."""
    given = {name: data[name] for name in (HEAD_DIM, *WIDTHS) if data.get(name) is not None}
    heads, dim = data.get(FIELDS["n_heads"]), data.get(FIELDS["dim"])
    widths = list(given.values())
    if not set(WIDTHS) & given.keys():  # the width defaults to dim / heads and must equal the rotated part
        if not (isinstance(heads, int) and isinstance(dim, int) and heads > 0 and dim % heads == 0):
            raise CheckpointError(f"embedding_length {dim!r} / head_count {heads!r} is not an integer", place=path)
        widths.append(dim // heads)
    if any(width != widths[0] for width in widths):
        raise CheckpointError(f"heads of different widths ({given}), or only partly rotated", place=path)
    return widths[0]


def metadata(args: ModelArgs) -> dict[str, Any]:
    """Return the `llama.*` keys of a file."""
    values = {theirs: getattr(args, ours) for ours, theirs in FIELDS.items()}
    values |= dict.fromkeys((HEAD_DIM, *WIDTHS), args.head_dim)
    values |= {THETA: float(rope.theta(args)), WINDOW: args.sliding_window or 0}
    values[FIELDS["norm_eps"]] = float(args.norm_eps)
    values |= rope.gguf(args)
    return {f"llama.{key}": value for key, value in values.items()}


def plain_dtype(stored: StoredTensor, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return the type in which other formats store a tensor of a GGUF file.

    llama.cpp requires vectors in float32. A vector is converted back to the type of the matrices if that is
    exact, so that converting to GGUF and back restores the checkpoint.
    """
    wide = tensors[EMBEDDING].dtype
    if len(stored.shape) > 1 or wide == torch.float32:
        return stored.dtype
    values = stored.view()
    return wide if torch.equal(values.to(wide).to(values.dtype), values) else stored.dtype
