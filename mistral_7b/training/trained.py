"""What a run trains, an adapter or the whole model: its weights, and how it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..distributed import ranks
from ..distributed.ranks import Share
from ..errors import TrainingError
from ..lora.files import read_adapter, save_adapter
from ..lora.trainable import LoraArgs, adapt, trained_adapter
from ..model import Mistral7B
from ..quantization.fused import fuse
from ..text.tokenizer import Tokenizer
from .finetune_args import FinetuneArgs
from .weights import Weights


class Trained(Protocol):
    """The trained part of a model."""

    folder: str  # the name of what is written, below the run's folder
    weights: Weights
    in_shards: bool  # of FSDP

    def save(self, out: Path) -> None:
        """Write it to its folder below `out`, replacing that of an earlier moment of the run."""
        ...


class TrainedAdapter:
    """A LoRA adapter; the weights below it are frozen."""

    folder = "adapter"
    in_shards = False

    def __init__(self, model: Mistral7B, args: FinetuneArgs, share: Share) -> None:
        self.model, self.args = model, args
        fuse(model)  # in one pass between the Linears, a block is faster and keeps less for its backward pass
        lora = LoraArgs(args.rank, args.alpha, args.dropout, args.targets, args.rslora)
        adapt(model, lora, args.seed, None if args.start is None else read_adapter(args.start, model.args))
        self.weights = weights_of(model, share)

    def save(self, out: Path) -> None:
        if ranks.rank():
            return
        adapter = trained_adapter(self.model)
        replace(
            out / self.folder,
            lambda path: save_adapter(adapter, path, self.model.args, base_model=self.args.model),
        )


class TrainedModel:
    """All weights of a model."""

    folder = "model"

    def __init__(self, model: Mistral7B, tokenizer: Tokenizer, args: FinetuneArgs, share: Share) -> None:
        if not all(p.requires_grad for p in model.parameters()):
            raise TrainingError(
                f"{args.model} is quantized, and quantized weights cannot be trained",
                field="method",
                hint="use the method 'lora', which trains an adapter of it",
            )
        self.model, self.tokenizer, self.shape = model, tokenizer, model.args
        self.in_shards = ranks.launched() and args.tensor_parallel == 1
        if ranks.launched():
            from .distributed import divide

            divide(model, args.tensor_parallel)
        self.weights = weights_of(model, share)

    def save(self, out: Path) -> None:
        model = self.weights.whole(self.model, self.shape)
        if model is not None:
            save_model(model, self.tokenizer, out / self.folder)


def weights_of(model: Mistral7B, share: Share) -> Weights:
    """Return what is trained of a model, which may be divided among processes."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not ranks.launched():
        return Weights(trained)
    from .distributed import RankWeights

    return RankWeights(model, trained, share)


def save_model(model: Mistral7B, tokenizer: Tokenizer, path: Path) -> None:
    """Write the model with its tokenizer, then replace that of an earlier end of the same run."""
    model.source = tokenizer.path.parent  # the tokenizer file is copied from here
    replace(path, model.save_pretrained)


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside `path`, then put it in the place of what is there."""
    temporary = path.with_name(f".next.{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run killed at this point
    write(temporary)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
