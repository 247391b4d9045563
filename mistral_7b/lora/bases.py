"""The weights that an adapter is merged into: those of a checkpoint, or what they are after quantization.

An adapter that was trained on quantized weights (QLoRA) is fitted to their rounding errors: merged into the
weights before rounding, the model is not the one that was trained. So it is merged into the dequantized weights.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..checkpoint import hub, load, quantized, writing
from ..checkpoint.config import read_json
from ..checkpoint.gguf.reading import StoredBlocks
from ..checkpoint.names import EMBEDDING, expected
from ..checkpoint.reading import open_checkpoint
from ..checkpoint.stored import dtype_of
from ..checkpoint.writing import Outgoing
from ..model import ModelArgs
from ..quantization.linear import Int8Embedding
from ..quantization.schemes import Scheme

Fetch = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights of a base, by name. Those that were quantized are fetched in float32, wider than their dtype."""

    folder: pathlib.Path  # with the tokenizer; of GGUF, the file
    args: ModelArgs
    weights: Mapping[str, Outgoing]
    scheme: Scheme | None = None  # how they are quantized
    original: Mapping[str, Fetch] | None = None  # before quantization, if that is at hand

    @property
    def dequantized(self) -> int:
        """The number of matrices that were quantized."""
        if self.scheme is not None:
            return sum(len(t.shape) > 1 for t in self.weights.values())
        return sum(isinstance(t.stored, StoredBlocks) for t in self.weights.values())


def open_base(source: str | os.PathLike[str], into: str | None = None) -> Base:
    """Open a checkpoint, or a folder of `mistral-7b quantize`, as a base.

    `into` is a scheme that an unquantized checkpoint is quantized by first. Raises CheckpointError for what cannot
    be opened, QuantizationError for another scheme than that of a quantized folder.
    """
    path = hub.resolve(source)
    if (record := quantized.read_record(path)) is not None:
        quantized.check_scheme(path, record, into)
        return _of_quantized(path, record.scheme)
    checkpoint = open_checkpoint(path)
    weights = {t.name: t for t in writing.outgoing_of(checkpoint)}
    if into is None:
        return Base(checkpoint.folder, checkpoint.args, weights)
    scheme, layers = Scheme(into), checkpoint.args.n_layers
    rounded = {
        name: t if len(t.shape) == 1 else dataclasses.replace(t, stored=None, fetch=_rounded(t, scheme, layers))
        for name, t in weights.items()
    }
    original = {name: t.fetch for name, t in weights.items()}
    return Base(checkpoint.folder, checkpoint.args, rounded, scheme, original)


def _rounded(t: Outgoing, scheme: Scheme, n_layers: int) -> Fetch:
    def fetch() -> Tensor:
        if t.name == EMBEDDING:
            return Int8Embedding.from_weight(t.fetch()).dequantized()
        return scheme.linear(t.fetch(), t.name.removesuffix(".weight"), n_layers).dequantized()  # type: ignore[operator]

    return fetch


def _of_quantized(path: pathlib.Path, scheme: Scheme) -> Base:
    folder = path if path.is_dir() else path.parent
    dtype = dtype_of(read_json(folder / "config.json").get("dtype", torch.bfloat16))
    model = load(path, dtype=dtype)
    weights = {}
    for name, shape in expected(model.args):
        module = model.get_submodule(name.removesuffix(".weight"))
        fetch = getattr(module, "dequantized", None) or functools.partial(getattr, module, "weight")
        weights[name] = Outgoing(name, dtype, shape, fetch)
    return Base(folder, model.args, weights, scheme)
