"""GGUF of architecture `llama`, as which every Mistral 7B is stored: its keys, and its tensors where they lie.

q's and k's rows are in Mistral's own order, so nothing is permuted. A key for the window is not among those
that llama.cpp reads for this architecture; files written here have it all the same, and in others theta 1e4
means v0.1 and its window of 4096.
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

from ..errors import CheckpointError
from ..model import ModelArgs
from . import gguf_blocks, gguf_file
from .config import V0_1_THETA, V0_1_WINDOW, refuse, theta_and_window, to_args
from .gguf_file import Kind
from .names import EMBEDDING, OUTPUT, rename
from .stored import MappedFile, Stored

ARCHITECTURES = ("llama", "mistral")  # the second is what a few converters called the same thing
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
HARMLESS: dict[str, tuple[Any, ...]] = {  # key -> the values that leave the model as it is
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.alpha": (0, 1),
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
SPEAKS_OF_TRAINING = ("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout")
FREQUENCIES = "rope_freqs.weight"  # what each rotary frequency is divided by
TOKENS = "tokenizer.ggml.tokens"


@dataclasses.dataclass(frozen=True)
class StoredBlocks(Stored):
    """A quantised tensor in a file; what it stands for is float32."""

    kind: Kind = gguf_file.KINDS["Q8_0"]

    @property
    def kept(self) -> bool:
        """Whether this is a matrix whose blocks can be used as they are."""
        return len(self.shape) == 2 and self.kind.name in gguf_blocks.ZERO_POINTS

    @property
    def nbytes(self) -> int:
        """The size of the blocks, in bytes."""
        return math.prod(self.shape) // self.kind.block * self.kind.size

    def raw(self) -> Tensor:
        """The blocks' bytes as they lie in the mapped file: (N, K / block * size) uint8."""
        mapped = self.file.map()
        if self.offset + self.nbytes > len(mapped):
            raise self.fault("lies beyond the end of the file", hint="fetch it again")
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=self.nbytes, offset=self.offset)
        return flat.view(math.prod(self.shape[:-1]), -1)

    def view(self) -> Tensor:
        """The values, float32: a new tensor, for blocks cannot be looked at as they lie."""
        return self.values(torch.float32)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The values, dequantised and then rounded to `dtype`; only this copy stays in memory."""
        out = gguf_blocks.dequantise_to(self.kind, self.raw(), dtype).view(self.shape)
        self.release()
        return out


def read(path: pathlib.Path) -> tuple[ModelArgs, dict[str, Stored]]:
    """The configuration in a file, and its tensors by GGUF's names. CheckpointError if it is no Mistral 7B."""
    contents = gguf_file.read(path)
    tensors = _tensors(contents)
    if frequencies := tensors.pop(FREQUENCIES, None):
        if frequencies.nbytes > 1 << 16 or not bool((frequencies.view() == 1).all()):
            raise CheckpointError(
                f"{FREQUENCIES!r} scales the rotary embedding; Mistral 7B's is not", field=FREQUENCIES, place=path
            )
        frequencies.release()
    return _args(contents, tied=rename(OUTPUT, "mistral", "gguf") not in tensors), tensors


def _tensors(contents: gguf_file.Contents) -> dict[str, Stored]:
    file, out = MappedFile(contents.path), {}
    for name, entry in contents.entries.items():
        if entry.kind.name in gguf_blocks.FLOATS:
            out[name] = Stored(file, name, gguf_blocks.FLOATS[entry.kind.name], entry.shape, entry.offset)
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
    if metadata.get("split.count", 1) != 1:
        raise CheckpointError(
            f"one part of {metadata['split.count']}",
            field="split.count",
            place=path,
            hint="join them with llama-gguf-split",
        )
    prefix = f"{architecture}."
    data = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    refuse(path, data, HARMLESS)
    known = {*FIELDS.values(), *HARMLESS, *WIDTHS, *SPEAKS_OF_TRAINING, WINDOW, THETA, HEAD_DIM}
    if strange := sorted(data.keys() - known):
        warnings.warn(f"{path}: keys {', '.join(map(repr, strange))} are not known and not used", stacklevel=2)
    data.setdefault("attention.head_count_kv", data.get("attention.head_count"))
    data.setdefault("vocab_size", _vocabulary(contents))
    theta, window = _theta_and_window(path, data)
    return to_args(
        path, data, FIELDS, head_dim=_head_dim(path, data), rope_theta=theta, sliding_window=window,
        tie_embeddings=tied,
    )  # fmt: skip


def _vocabulary(contents: gguf_file.Contents) -> int | None:
    """How many tokens the tokenizer has, or the embedding where there is none."""
    tokens = contents.metadata.get(TOKENS)
    if isinstance(tokens, list):
        return len(tokens)
    embedding = contents.entries.get(rename(EMBEDDING, "mistral", "gguf") or "")
    return embedding.shape[0] if embedding else None


def _theta_and_window(path: pathlib.Path, data: Mapping[str, Any]) -> tuple[Any, Any]:
    """RoPE's theta, llama.cpp's own default where it is not given, and the window: None for 0."""
    theta, window = data.get(THETA, V0_1_THETA), data.get(WINDOW)
    if WINDOW not in data and theta == V0_1_THETA:
        warnings.warn(
            f"{path}: theta 1e4 as in v0.1, and GGUF has no key for the window: taking v0.1's {V0_1_WINDOW}",
            stacklevel=2,
        )
        window = V0_1_WINDOW
    return theta_and_window(path, theta, None if window == 0 and not isinstance(window, bool) else window)


def _head_dim(path: pathlib.Path, data: Mapping[str, Any]) -> Any:
    """The one width of a head that rotation, keys and values have."""
    given = {name: data[name] for name in (HEAD_DIM, *WIDTHS) if data.get(name) is not None}
    heads, dim = data.get(FIELDS["n_heads"]), data.get(FIELDS["dim"])
    widths = list(given.values())
    if not set(WIDTHS) & given.keys():  # then it is dim / heads, and that is all of it to be rotated
        if not (isinstance(heads, int) and isinstance(dim, int) and heads > 0 and dim % heads == 0):
            raise CheckpointError(f"embedding_length {dim!r} / head_count {heads!r} is not whole", place=path)
        widths.append(dim // heads)
    if any(width != widths[0] for width in widths):
        raise CheckpointError(f"heads of different widths ({given}), or not rotated whole", place=path)
    return widths[0]


def metadata(args: ModelArgs) -> dict[str, Any]:
    """The keys of a file, without general ones and the tokenizer's."""
    values = {theirs: getattr(args, ours) for ours, theirs in FIELDS.items()}
    values |= dict.fromkeys((HEAD_DIM, *WIDTHS), args.head_dim)
    values |= {THETA: float(args.rope_theta), WINDOW: args.sliding_window or 0}
    values[FIELDS["norm_eps"]] = float(args.norm_eps)
    return {f"llama.{key}": value for key, value in values.items()}


def plain_dtype(stored: Stored, tensors: Mapping[str, Stored]) -> torch.dtype:
    """The type in which another format should have a tensor of a GGUF file.

    llama.cpp wants vectors in float32 whatever the matrices are. One whose values the matrices' type holds
    exactly is taken back to it, so that a checkpoint which went through GGUF is what it was.
    """
    wide = tensors[EMBEDDING].dtype
    if len(stored.shape) > 1 or wide == torch.float32:
        return stored.dtype
    values = stored.view()
    return wide if torch.equal(values.to(wide).to(values.dtype), values) else stored.dtype
