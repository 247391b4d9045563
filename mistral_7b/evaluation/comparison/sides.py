"""The two sides of a comparison: any model as ModelArgs and weights in float32, read one tensor at a time.

    MODEL            a folder (Hugging Face, Mistral, quantized), a GGUF file, a hub id, "demo", "starter"
    MODEL+ADAPTER    with a LoRA adapter as it is applied at run time, unrounded
    transformers:MODEL, llama.cpp:MODEL    that engine, which runs the same files (engine.py)

Both sides are computed in float32 by the same code, so their distance is that of weights, settings and tokens.

V vocabulary · D width
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint import hub, quantized
from ...checkpoint.gguf.file import KINDS
from ...checkpoint.gguf.reading import StoredBlocks
from ...checkpoint.names import EMBEDDING
from ...checkpoint.packed import PackedMatrix
from ...checkpoint.reading import Checkpoint, open_checkpoint
from ...errors import EvaluationError
from ...lora.applied import updated
from ...lora.bases import open_base
from ...lora.files import Adapter, read_adapter
from ...model import ModelArgs

_OTHER_MODELS = "compare a model with one that was made from it"
ENGINES = ("transformers", "llama.cpp")
Weights = Callable[[str], Tensor]  # of a tensor's name in Mistral's layout: float32


class Name(NamedTuple):
    """What a side is called on the command line, in parts."""

    engine: str | None  # one of ENGINES; None: this package
    model: str
    adapter: str | None


@dataclasses.dataclass(frozen=True)
class Side:
    """A model whose weights can be read.

    weight    reads a tensor by Mistral's name, in Mistral's layout, float32; of a tied output, the embedding
    unit      relative size of the rounding errors of a stored tensor, by the tensor's name
    release   drops the file's pages of a tensor
    base      reads a tensor without the adapter
    reread    the same files with other ModelArgs
    """

    name: str
    path: pathlib.Path
    args: ModelArgs
    format: str
    weight: Weights
    unit: Callable[[str], float]
    release: Callable[[str], None] = lambda name: None
    base: Weights | None = None
    adapter: Adapter | None = None
    reread: Callable[[ModelArgs], Side] | None = None

    def changed(
        self, weights: Callable[[str, Weights], Tensor] | None = None, args: ModelArgs | None = None
    ) -> Side:
        """Return this side with other weights, each computed from those of this side, or other ModelArgs."""
        inner = self.weight
        weight = inner if weights is None else lambda name: weights(name, inner)
        return dataclasses.replace(self, args=args or self.args, weight=weight)

    def update(self, name: str) -> Tensor | None:
        """What the adapter adds to a tensor; None if nothing."""
        if self.adapter is None or self.base is None or not _touches(self.adapter, name):
            return None
        after, before = self.weight(name), self.base(name)
        return after - before if after.shape == before.shape else None


def parse(name: str) -> Name:
    """Take the name of a side apart. EvaluationError if a part is empty."""
    engine, colon, rest = name.partition(":")
    known = engine if colon and engine in ENGINES else None
    model, adapter = (rest if known else name), None
    if "+" in model and not os.path.exists(model):
        model, _, adapter = model.rpartition("+")
    if not model or adapter == "":
        raise EvaluationError(f"{name!r} names no model", field="model", hint="write MODEL or MODEL+ADAPTER")
    if known and adapter:
        raise EvaluationError(
            f"{known} is compared without adapters", field="model", place=name, hint="merge the adapter first"
        )
    return Name(known, model, adapter)


def open_side(name: str | os.PathLike[str]) -> Side:
    """Open MODEL or MODEL+ADAPTER. Raises CheckpointError, HubError and AdapterError as elsewhere."""
    engine, model, adapter = parse(os.fspath(name))
    if engine is not None:
        raise EvaluationError(
            f"{engine} is no model but an engine, which runs B",
            field="model",
            place=os.fspath(name),
            hint="name it as B on the command line, or pass it to compare() as `run_b`",
        )
    path = hub.resolve(model)
    record = quantized.read_record(path)
    side = _plain(path, open_checkpoint(path)) if record is None else _quantized(path)
    side = dataclasses.replace(side, name=os.fspath(name))
    return side if adapter is None else _adapted(side, adapter)


def _plain(path: pathlib.Path, checkpoint: Checkpoint) -> Side:
    def held(name: str) -> str:
        return name if name in checkpoint.tensors else EMBEDDING  # a tied output

    def weight(name: str) -> Tensor:
        return checkpoint.read(held(name), torch.float32)

    def unit(name: str) -> float:
        stored = checkpoint.tensors[held(name)]
        if isinstance(stored, StoredBlocks | PackedMatrix):
            return _unit_of_bits(8 * stored.nbytes / math.prod(stored.shape))
        return torch.finfo(stored.dtype).eps / 2

    return Side(
        str(path), path, checkpoint.args, checkpoint.format, weight, unit,
        release=lambda name: checkpoint.tensors[held(name)].release(),
        reread=lambda args: _plain(path, dataclasses.replace(checkpoint, args=args)),
    )  # fmt: skip


def _quantized(path: pathlib.Path) -> Side:
    base = open_base(path)
    scheme = base.scheme
    assert scheme is not None

    def unit(name: str) -> float:
        if len(base.weights[name].shape) == 1:
            return torch.finfo(base.weights[name].dtype).eps / 2
        linear = name.removesuffix(".weight")
        kind = KINDS["Q8_0" if name == EMBEDDING else scheme.kind(linear, base.args.n_layers)]
        return _unit_of_bits(8 * kind.size / kind.block)

    return Side(
        str(path), path, base.args, "quantized", lambda name: base.weights[name].fetch().float(), unit,
        reread=lambda args: dataclasses.replace(_quantized(path), args=args),
    )  # fmt: skip


def _unit_of_bits(bits: float) -> float:
    """The error of block formats, relative to the weights: 0.0055 of Q8_0, 0.088 of Q4_K; rounding has less."""
    return 2 ** (1 - bits)


def _adapted(side: Side, path: str) -> Side:
    adapter = read_adapter(path, side.args)
    if biased := [name for name, bias in adapter.biases.items() if bias.any()]:
        raise EvaluationError(
            f"the adapter has a bias for {biased[0]!r}, and the Linears of Mistral 7B have none",
            field="adapter",
            place=adapter.source,
        )
    weight = functools.partial(_with_adapter, side.weight, adapter)
    return dataclasses.replace(
        side, args=adapter.args(side.args), weight=weight, base=side.weight, adapter=adapter,
        path=adapter.tokenizer or side.path, reread=None,
    )  # fmt: skip


def _with_adapter(base: Weights, adapter: Adapter, name: str) -> Tensor:
    own, linear = adapter.weights.get(name), name.removesuffix(".weight")
    weight = base(name) if own is None else own.float()
    if (factors := adapter.targets.get(linear)) is None:
        return weight
    wide = updated(weight, factors)
    magnitude = adapter.magnitudes.get(linear)
    return wide if magnitude is None else wide * (magnitude.to(wide) / wide.norm(dim=1))[:, None]


def _touches(adapter: Adapter, name: str) -> bool:
    return name in adapter.weights or name.removesuffix(".weight") in adapter.targets


def check_same_shape(a: Side, b: Side) -> None:
    """Raise EvaluationError, naming the field, unless both models have one width, depth and vocabulary.

    More rows in the vocabulary of B are padding if the tokenizers agree (texts.py); they are compared.
    """
    for field in ("dim", "n_layers", "hidden_dim"):
        one, other = getattr(a.args, field), getattr(b.args, field)
        if one != other:
            raise EvaluationError(f"{field} is {one} in A and {other} in B", field=field, hint=_OTHER_MODELS)
    heads: Mapping[str, int] = {side.name: side.args.n_heads * side.args.head_dim for side in (a, b)}
    if len(set(heads.values())) > 1:
        raise EvaluationError("the heads have different widths in all", field="n_heads", hint=_OTHER_MODELS)
    if a.args.vocab_size > b.args.vocab_size:
        raise EvaluationError(
            f"A has {a.args.vocab_size} tokens and B {b.args.vocab_size}",
            field="vocab_size",
            hint="if they are padding, name the models in the other order",
        )
