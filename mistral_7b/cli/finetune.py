"""`mistral-7b finetune`: every field of FinetuneArgs is a flag."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING

from ..errors import TrainingError
from ..training.finetune_args import FinetuneArgs
from .inputs import pick_device, read_flags
from .stopping import terminated_as_interrupted

if TYPE_CHECKING:
    from ..model import ModelArgs
    from ..training.estimate import Estimate


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Fine-tune a model on examples, preferences or rewards, on this machine's CPU or GPU."""

    preview: int = 0
    """Print so many examples, tokens coloured by whether they are trained, and exit."""
    estimate: bool = False
    """Print the memory by component and the seconds of an update, before the weights are loaded, and exit."""
    training: FinetuneArgs = dataclasses.field(default_factory=FinetuneArgs)
    """Fine-tuning options."""


def run(argv: list[str]) -> int:
    args = read_flags(Finetune, "finetune", argv)
    training = args.training
    if args.preview < 0:
        raise TrainingError(f"--preview must be at least 0, not {args.preview}", field="--preview")
    from ..checkpoint import hub

    hub.find(training.model)  # before PyTorch is imported
    if args.preview:
        return _preview(training, args.preview)
    pick_device(training.device)
    if args.estimate:
        print(estimated(training).table())
        return 0
    from ..training.finetuning import finetune

    with terminated_as_interrupted() as stopped:
        try:
            last = finetune(args=training)
        except KeyboardInterrupt:
            if not stopped:
                raise
            return 128 + stopped[0]
    measured = [f"{name} {last[name]:.4f}" for name in ("loss", "eval_loss", "kl_from_base") if name in last]
    what = "model" if training.method == "full" else "adapter"
    print(f"{', '.join(measured)}: the {what} is in {training.out}/{what}, and report.html beside it")
    return 0


def _preview(args: FinetuneArgs, count: int) -> int:
    from ..text.tokenizer import Tokenizer
    from ..training.held_out import read_examples
    from ..training.preview import preview

    tokenizer = Tokenizer.from_pretrained(args.model, args.chat_template)
    examples = read_examples(args, tokenizer)
    for source in examples.report:
        print(source, file=sys.stderr)
    preview(examples.items, tokenizer, count)
    return 0


def estimated(args: FinetuneArgs) -> Estimate:
    """Estimate the run of these arguments; its weights are not loaded."""
    from ..checkpoint import hub, read_args
    from ..training.finetuning import estimate_run

    path = hub.resolve(args.model)
    shape, _ = read_args(path)
    return estimate_run(args, shape, weight_bytes(args, path, shape))


def weight_bytes(args: FinetuneArgs, path: pathlib.Path, shape: ModelArgs) -> int:
    """Return the bytes that a model's weights will take in memory."""
    import torch

    from ..checkpoint import read_record
    from ..checkpoint.reading import open_checkpoint
    from ..model import Mistral7B
    from ..quantization.schemes import Scheme, empty_model

    if (record := read_record(path)) is not None:
        return record.nbytes
    scheme, dtype = args.base_quantization, getattr(torch, args.dtype)
    if scheme is None and (checkpoint := open_checkpoint(path)).format == "gguf":
        return checkpoint.nbytes()
    if scheme is not None and Scheme(scheme).whole:
        return sum(t.nbytes for t in empty_model(shape, Scheme(scheme), dtype).state_dict().values())
    weights = Mistral7B(shape, dtype=dtype, device="meta").parameters()
    return sum(p.nbytes for p in weights) // (2 if scheme == "fp8" else 1)
