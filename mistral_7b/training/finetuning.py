"""Fine-tuning: a model and examples -> an adapter or a model.

    data -> items -> method (what is learned)  \\
    checkpoint -> model -> trained part         }  Loop -> adapter or model, states, log
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import TrainingError
from ..kernels import threads
from ..model import Mistral7B
from ..text.tokenizer import Tokenizer
from .finetune_args import FinetuneArgs
from .loop import Loop, Method, Record
from .progress import ProgressLine
from .trained import Trained, TrainedAdapter, TrainedModel
from .weights import adamw


class FinetuneMethod(Method, Protocol):
    """A method whose data has epochs, and which can be evaluated."""

    def updates(self, epochs: int) -> int:
        """Return the number of updates that `epochs` passes over the data take."""
        ...

    def evaluate(self, items: Sequence[Any]) -> dict[str, float]:
        """Return what is measured on held-out items, with "eval_loss" the lower the better."""
        ...


class Setting(NamedTuple):
    """What a method is made from: `method_of(setting)` in the module that METHODS names."""

    args: FinetuneArgs
    model: Mistral7B  # with its adapter, if one is trained
    tokenizer: Tokenizer
    items: Sequence[Any]  # of the method's kind: encoding.Encoded, Pair, Thumb or Prompt
    copies: Sequence[float] = ()  # how often each is taken in an epoch; () once


METHODS = {
    "lora": "supervised",
    "qlora": "supervised",
    "full": "supervised",
    "dpo": "preferences",
    "kto": "preferences",
    "grpo": "grpo",
}


def build_method(setting: Setting) -> FinetuneMethod:
    """Return the method of these arguments."""
    module = importlib.import_module(f".{METHODS[setting.args.method]}", __package__)
    return module.method_of(setting)


def open_trained(args: FinetuneArgs, model: Mistral7B, tokenizer: Tokenizer) -> Trained:
    """Make the model ready for training: all of it, or an adapter of it."""
    made = TrainedModel(model, tokenizer, args) if args.method == "full" else TrainedAdapter(model, args)
    made.weights.optimize(adamw(made.weights.masters, args.peak, args.betas, args.weight_decay))
    return made


def finetune_items(
    args: FinetuneArgs,
    model: Mistral7B,
    tokenizer: Tokenizer,
    items: Sequence[Any],
    show: Callable[[Record], None] | None = None,
) -> Record:
    """Fine-tune a loaded model on items of the method's kind; return the last record of the log."""
    threads.use()
    trained = open_trained(args, model, tokenizer)
    method = build_method(Setting(args, model, tokenizer, items))
    args = dataclasses.replace(args, steps=args.steps or method.updates(args.epochs))
    loop = Loop(args, method, trained.weights)
    out = Path(args.out)
    state_path = out / "state.pt"
    if (out / trained.folder).exists() and not state_path.exists():
        raise TrainingError(
            f"{out / trained.folder} exists already, and belongs to no run in {out}",
            field="out",
            hint="name another --out",
        )
    loop.resume(state_path, args.device)
    out.mkdir(parents=True, exist_ok=True)
    loop.run(state_path, show or ProgressLine(args))
    trained.save(out)
    return dict(loop.log[-1])
