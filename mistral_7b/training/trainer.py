"""Pretraining: a model that learns text files, row after row."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..cache import Stateless
from ..errors import TrainingError, WriteError
from ..files import atomic_write
from ..kernels import threads
from ..model import Mistral7B, ModelArgs
from ..text.tokenizer import Tokenizer
from .args import TrainArgs
from .curve import draw_curve
from .data import IGNORE, PackedDocuments, Rows, held_out_documents, split_files
from .loop import Loop, Record
from .loss import bits_per_byte, loss_backward
from .progress import ProgressLine
from .trained import save_model
from .weights import Weights, adamw

MEASURED = "held_out_bits_per_byte"


class NextToken:
    """The method of pretraining: every token of a packed row but a document's first is a target."""

    def __init__(self, args: TrainArgs, model: Mistral7B, data: PackedDocuments) -> None:
        self.args, self.model, self.data = args, model, data
        self.n_targets = 0  # of the whole update

    def micro_batches(self, step: int) -> Sequence[Rows]:
        rows = self.data.rows(step * self.args.rows, self.args.rows)
        self.n_targets = int((rows.targets != IGNORE).sum())
        parts = (t.to(self.args.device).chunk(self.args.accumulate) for t in rows)
        return [Rows(*part) for part in zip(*parts, strict=True)]

    def backward(self, batch: Rows) -> dict[str, float]:
        hidden = self.model.hidden(batch.tokens, Stateless(self.model.args.sliding_window), batch.sequence_ids)
        loss = loss_backward(self.model, hidden, batch.targets, self.n_targets)
        return {"loss": float(loss), "tokens": batch.tokens.numel()}


class Trainer(Loop):
    """The loop over a model of which every weight is trained, on packed documents."""

    def __init__(self, args: TrainArgs, model: Mistral7B, data: PackedDocuments) -> None:
        super().__init__(args, NextToken(args, model, data), Weights(dict(model.named_parameters())))
        self.model = model
        self.weights.optimize(*optimizers(args, self.weights))
        if args.compile:
            for layer in model.layers:
                layer.compile()


def optimizers(args: TrainArgs, weights: Weights) -> list[torch.optim.Optimizer]:
    """Return AdamW of all masters, or Muon of the matrices in the layers and AdamW of the others."""
    named = list(zip(weights.names, weights.masters, strict=True))
    inner = [m for n, m in named if m.dim() == 2 and n.startswith("layers.")]
    outer = [m for n, m in named if not (m.dim() == 2 and n.startswith("layers."))]
    if args.optimizer == "adamw":
        return [adamw([*outer, *inner], args.lr, args.betas, args.weight_decay)]
    return [
        adamw(outer, args.lr, args.betas, args.weight_decay),
        torch.optim.Muon(inner, lr=args.muon_lr, weight_decay=args.weight_decay),
    ]


def open_model(args: TrainArgs, tokenizer: Tokenizer) -> Mistral7B:
    """Return the model to train: loaded from `init`, or initialized with the shape in `args`.

    Raises TrainingError if it is quantized.
    """
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    if args.init is not None:
        model = Mistral7B.from_pretrained(args.init, dtype=dtype, device=args.device)
        if not all(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError(
                f"{args.init} is quantized, and quantized weights cannot be trained",
                field="init",
                hint=f"train the original, or dequantize it: mistral-7b convert {args.init} OUT --to huggingface",
            )
        return model
    shared = {f.name for f in dataclasses.fields(ModelArgs)} & {f.name for f in dataclasses.fields(TrainArgs)}
    shape = {name: getattr(args, name) for name in shared}
    # Sampled in float32 and rounded: samples in bfloat16 are too coarse near zero.
    model = Mistral7B(ModelArgs(vocab_size=tokenizer.vocab_size, **shape), dtype=torch.float32, device=args.device)
    return model.to(dtype)


def train(args: TrainArgs, show: Callable[[Record], None] | None = None) -> Record:
    """Train as configured, or resume the run in `args.out`; return the last log record.

    `args.out` then holds `state.pt` to resume from, `log.jsonl`, `curve.png` (if matplotlib is installed) and
    `model/`, the trained model with its tokenizer. Files of `held_out` inside `data` are excluded from training; a
    line on stderr gives their number. Raises TrainingError for unusable data or a state with other arguments.
    """
    threads.use()
    out = Path(args.out)
    state_path = out / "state.pt"
    if (out / "model").exists() and not state_path.exists():
        raise TrainingError(
            f"{out / 'model'} exists already, and belongs to no run in {out}",
            field="out",
            hint="name another --out",
        )
    if not args.data:
        raise TrainingError("no training data", field="data", hint="name text files or folders with --data")
    files = split_files(args.data, args.held_out, args.suffixes)
    if files.left_out:
        print(f"held-out files of --data, excluded from training: {files.left_out}", file=sys.stderr)
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    data = PackedDocuments.from_files(files.training, tokenizer, args.seq_len, args.seed)
    held_out = [(tokens, size) for _, tokens, size in held_out_documents(files.held_out, tokenizer) if size]
    trainer = Trainer(args, open_model(args, tokenizer), data)
    trainer.resume(state_path, args.device)
    out.mkdir(parents=True, exist_ok=True)
    measure = (lambda: {MEASURED: bits_per_byte(trainer.model, held_out)}) if held_out else None
    trainer.evaluate(measure)
    try:
        trainer.run(state_path, show or ProgressLine(args), measure)
    except WriteError:
        with contextlib.suppress(OSError):
            out.rmdir()  # if it is empty
        raise
    last: Record = dict(trainer.log[-1])
    if measure and MEASURED not in last:
        trainer.log[-1] |= measure()
        last = dict(trainer.log[-1])
        trainer.save(state_path)
    with atomic_write(out / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in trainer.log), encoding="utf-8")
    save_model(trainer.model, tokenizer, out / "model")
    draw_curve(trainer.log, out / "curve.png")
    return last
