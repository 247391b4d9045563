"""The training loop, with saved states from which a run resumes bit-identically."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..cache import Stateless
from ..errors import TrainingError, WriteError
from ..files import atomic_write, check_room
from ..kernels import threads
from ..model import Mistral7B, ModelArgs
from ..text.tokenizer import Tokenizer
from .args import TrainArgs
from .curve import draw_curve
from .data import IGNORE, PackedDocuments, held_out_documents, split_files
from .loss import bits_per_byte, loss_backward
from .progress import ProgressLine

Record = dict[str, Any]  # one entry of the log


class Trainer:
    """A model with float32 master weights, optimizers and training progress.

    The model computes in `args.dtype`. The master weights accumulate updates below bfloat16's resolution.
    """

    def __init__(self, args: TrainArgs, model: Mistral7B, data: PackedDocuments) -> None:
        self.args, self.model, self.data = args, model, data
        self.step, self.saved, self.seconds = 0, 0, 0.0
        self.log: list[Record] = []
        self.weights = list(model.parameters())  # a tied weight appears once
        self.masters = [p.detach().float().clone() for p in self.weights]
        self.optimizers = self._optimizers()
        if args.compile:
            for layer in model.layers:
                layer.compile()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        args = self.args
        names = [name for name, _ in self.model.named_parameters()]
        inner = [m for n, m in zip(names, self.masters, strict=True) if m.dim() == 2 and n.startswith("layers.")]
        outer = [
            m for n, m in zip(names, self.masters, strict=True) if m.dim() == 2 and not n.startswith("layers.")
        ]
        norms = [m for m in self.masters if m.dim() == 1]
        adamw = [
            {"params": outer + (inner if args.optimizer == "adamw" else []), "weight_decay": args.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        found: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw, lr=args.lr, betas=args.betas, fused=True)]
        if args.optimizer == "muon":
            found.append(torch.optim.Muon(inner, lr=args.muon_lr, weight_decay=args.weight_decay))
        return found

    def update(self) -> Record:
        """Run one optimizer step on the next rows; return loss, gradient norm and learning rate."""
        args = self.args
        rows = self.data.rows(self.step * args.rows, args.rows)
        n_targets = int((rows.targets != IGNORE).sum())
        loss = torch.zeros(())
        parts = (t.to(args.device).chunk(args.accumulate) for t in rows)
        for tokens, targets, ids in zip(*parts, strict=True):
            hidden = self.model.hidden(tokens, Stateless(self.model.args.sliding_window), ids)
            loss += loss_backward(self.model, hidden, targets, n_targets).cpu()
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, args.clip)
        if not math.isfinite(float(loss)) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"update {self.step}: loss {float(loss)}, gradient norm {float(norm)}; the last saved state is "
                "valid",
                field="lr",
                hint="lower the learning rate and resume from it",
            )
        share = args.learning_rate(self.step)
        for optimizer, peak in zip(self.optimizers, (args.lr, args.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        self._publish()
        self.step += 1
        return {"step": self.step, "loss": float(loss), "norm": float(norm), "lr": args.lr * share}

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the master weights into the model's weights."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "masters": self.masters,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "log": json.dumps(self.log),
            "args": json.dumps(dataclasses.asdict(self.args)),
        }

    def state_bytes(self) -> int:
        """The bytes of the tensors in `state`."""
        kept = [value for o in self.optimizers for held in o.state.values() for value in held.values()]
        return sum(t.nbytes for t in [*self.masters, *kept] if isinstance(t, torch.Tensor))

    def load_state(self, state: dict[str, Any]) -> None:
        for mine, theirs in zip(self.masters, state["masters"], strict=True):
            mine.copy_(theirs)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.log = state["step"], state["seconds"], json.loads(state["log"])
        self.saved = self.step
        self._publish()

    def save(self, path: Path) -> None:
        """Save the state atomically: a killed run or a full disk keeps the previous state.

        WriteError names the update of that state.
        """
        try:
            check_room(path, self.state_bytes())
            with (
                atomic_write(path) as temporary,
                temporary.open("wb") as file,
            ):  # given a path, torch would hide the OSError
                torch.save(self.state(), file)
        except WriteError as error:
            last = f"the same command resumes at update {self.saved}" if self.saved else "there is no saved state"
            raise WriteError.of(
                error, message=f"{error.message}. Update {self.step} is not saved; {last}"
            ) from error
        self.saved = self.step

    def run(self, state_path: Path, show: Callable[[Record], None], measure: Callable[[], float] | None) -> None:
        """Train to the last update, saving states; after Ctrl-C save, then re-raise.

        Raises WriteError if a state cannot be saved; the save is not retried.
        """
        args = self.args
        try:
            while self.step < args.steps:
                began = time.perf_counter()
                record = self.update()
                took = time.perf_counter() - began
                self.seconds += took
                record["tokens_per_s"] = round(args.rows * args.seq_len / took)
                if measure and args.eval_every and self.step % args.eval_every == 0:
                    record["held_out_bits_per_byte"] = measure()
                self.log.append(record)
                show(record)
                if self.step % args.save_every == 0:
                    self.save(state_path)
        except WriteError:
            raise
        except BaseException as error:
            self._save_new(state_path)
            if isinstance(error, KeyboardInterrupt):
                saved = (
                    f"update {self.saved} of {args.steps} is saved in {state_path}; the same command resumes there"
                )
                print(f"\nstopped: {saved if self.saved else 'no update was done'}", file=sys.stderr)
            raise
        self._save_new(state_path)

    def _save_new(self, path: Path) -> None:
        if self.saved < self.step:
            self.save(path)


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
    if state_path.exists():
        state = torch.load(state_path, map_location=args.device, weights_only=True)
        _check_same_run(json.loads(state["args"]), args, state_path)
        trainer.load_state(state)
    out.mkdir(parents=True, exist_ok=True)
    measure = (lambda: bits_per_byte(trainer.model, held_out)) if held_out else None
    try:
        trainer.run(state_path, show or ProgressLine(args), measure)
    except WriteError:
        with contextlib.suppress(OSError):
            out.rmdir()  # if it is empty
        raise
    last: Record = dict(trainer.log[-1])
    if measure and "held_out_bits_per_byte" not in last:
        last["held_out_bits_per_byte"] = trainer.log[-1]["held_out_bits_per_byte"] = measure()
        trainer.save(state_path)
    with atomic_write(out / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in trainer.log), encoding="utf-8")
    _save_model(trainer.model, tokenizer, out / "model")
    draw_curve(trainer.log, out / "curve.png")
    return last


# Arguments that may change on resume. With other `steps`, the schedule is that of the new number.
FREE = (
    "steps",
    "out",
    "data",
    "held_out",
    "save_every",
    "eval_every",
    "log_every",
    "compile",
    "device",
    "accumulate",
)


def _check_same_run(saved: Record, args: TrainArgs, path: Path) -> None:
    now = json.loads(json.dumps(dataclasses.asdict(args)))
    for name, value in now.items():
        if name not in FREE and saved.get(name) != value:
            raise TrainingError(
                f"is of a run with {name}={saved.get(name)!r}, not {value!r}",
                field=name,
                place=path,
                hint="give the same arguments to resume, or another --out to start again",
            )


def _save_model(model: Mistral7B, tokenizer: Tokenizer, path: Path) -> None:
    """Write the model, then replace that of an earlier end of the same run."""
    model.source = tokenizer.path.parent  # the tokenizer file is copied from here
    temporary = path.with_name(f".next.{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run killed at this point
    model.save_pretrained(temporary)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
