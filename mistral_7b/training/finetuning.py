"""Fine-tuning: a model and examples -> an adapter or a model.

    data -> items -> method (what is learned)  \\
    checkpoint -> model -> trained part         }  Loop -> adapter or model, states, log
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .. import machine
from ..distributed import ranks
from ..errors import TrainingError
from ..kernels import threads
from ..model import FeedForward, Mistral7B, ModelArgs
from ..text.tokenizer import Tokenizer
from .estimate import Estimate, blocks_to_recompute, estimate
from .exact import prepare
from .finetune_args import FinetuneArgs
from .held_out import Examples, read_examples
from .loop import Loop, Method, Record
from .measures import Forgetting, Measures, answers, prompt_of
from .metrics import MetricsFile, tensorboard
from .progress import ProgressLine
from .recomputing import recompute
from .report import Sample, write_report
from .trained import Trained, TrainedAdapter, TrainedModel
from .weights import adamw

STATE, METRICS, REPORT = "state.pt", "metrics.jsonl", "report.html"


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


def open_trained(
    args: FinetuneArgs, model: Mistral7B, tokenizer: Tokenizer, share: ranks.Share | None = None
) -> Trained:
    """Make the model ready for training: all of it, or an adapter of it.

    GRPO samples from it, and its base then has the products that the engine samples with.
    """
    if args.method == "grpo":
        prepare(model)
    share = share or ranks.Share()
    full = args.method == "full"
    made = TrainedModel(model, tokenizer, args, share) if full else TrainedAdapter(model, args, share)
    made.weights.optimize(adamw(made.weights.masters, args.peak, args.betas, args.weight_decay))
    return made


def finetune(
    model: str | os.PathLike[str] | None = None,
    data: str | Sequence[str] | None = None,
    args: FinetuneArgs | None = None,
    show: Callable[[Record], None] | None = None,
) -> Record:
    """Fine-tune a model as configured, or resume the run in `args.out`; return the last record of its log.

    model   the base model, in place of `args.model`: a folder, a file, a hub id, "starter" or "demo"
    data    files of examples, in place of `args.data`
    show    called with each record of the log; None shows a line of progress on stderr

    `args.out` then holds `adapter/` or `model/`, `state.pt` to resume from, `metrics.jsonl` and `report.html`.
    Raises TrainingError for arguments or data that cannot be used, or a state of another run.
    """
    args = args or FinetuneArgs()
    if model is not None:
        args = dataclasses.replace(args, model=os.fspath(model))
    if data is not None:
        args = dataclasses.replace(args, data=(data,) if isinstance(data, str) else tuple(data))
    threads.use(args.threads)
    machine.return_large_blocks()
    check_out(args)
    tokenizer = Tokenizer.from_pretrained(args.model, args.chat_template)
    examples = read_examples(args, tokenizer)
    return Run(args, open_base(args, tokenizer), tokenizer, examples).train(show)


def estimate_run(args: FinetuneArgs, shape: ModelArgs, weights: int) -> Estimate:
    """Estimate a run, as `estimate`, with all in memory that it has before its weights."""
    threads.use(args.threads)
    machine.return_large_blocks()
    tokenizer = Tokenizer.from_pretrained(args.model, args.chat_template)
    _data = read_examples(args, tokenizer) if args.data else None  # while the memory of the program is measured
    return estimate(args, shape, weights)


def check_out(args: FinetuneArgs) -> None:
    """Raise TrainingError if the output folder cannot be, or holds a model or adapter of no run there."""
    out = Path(args.out)
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise TrainingError(
            "is a file, and the output is a folder", field="out", place=existing, hint="name another --out"
        )
    made = out / ("model" if args.method == "full" else "adapter")
    if made.exists() and not (out / METRICS).exists():
        raise TrainingError(
            f"{made} exists already, and belongs to no run in {out}", field="out", hint="name another --out"
        )


def open_base(args: FinetuneArgs, tokenizer: Tokenizer) -> Mistral7B:
    """Load the base model; TrainingError if it has not all tokens of the tokenizer."""
    model = Mistral7B.from_pretrained(
        args.model, dtype=args.dtype, device=args.device, quantization=args.base_quantization
    )
    if tokenizer.vocab_size > model.args.vocab_size:
        raise TrainingError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the vocabulary of the model {args.model} "
            f"{model.args.vocab_size}: it belongs to another model",
            field="model",
            place=tokenizer.path,
        )
    return model


class Run:
    """One run: the loop with the evaluations, files and samples around it."""

    def __init__(self, args: FinetuneArgs, model: Mistral7B, tokenizer: Tokenizer, examples: Examples) -> None:
        """Take a loaded model, which is trained in place."""
        self.out = Path(args.out)
        self.model, self.tokenizer, self.examples = model, tokenizer, examples
        share = ranks.Share()
        if ranks.launched() or args.tensor_parallel > 1:
            from .distributed import share_of

            share = share_of(args)
        self.trained = open_trained(args, model, tokenizer, share)
        self.method = build_method(Setting(args, model, tokenizer, examples.items, examples.copies))
        # After the method, which may have taken the base: that runs without gradients.
        recompute(model, -ranks.least(-blocks_to_recompute(args, model.args, unread_bytes(model))))
        self.args = dataclasses.replace(args, steps=args.steps or self.method.updates(args.epochs))
        self.loop = Loop(self.args, self.method, self.trained.weights, examples.fingerprint(), share)
        if args.compile:
            compile_blocks(model)

    def train(self, show: Callable[[Record], None] | None = None) -> Record:
        """Train to the end, or from the saved state to the end; return the last record of the log."""
        args, loop = self.args, self.loop
        # The engine's inference mode and the shards of FSDP exclude each other.
        count = 0 if self.trained.in_shards else args.samples
        prompts = [prompt_of(item) for item in (self.examples.held_out or self.examples.items)[:count]]
        measures = Measures(self.method.evaluate, self.examples.held_out, Forgetting(self.model, self.tokenizer))
        before = self._answers(prompts)
        loop.resume(self.out / STATE, args.device)
        loop.evaluate(lambda: self._measured(measures))
        self.out.mkdir(parents=True, exist_ok=True)
        sinks = self._sinks(show) if ranks.rank() == 0 else []

        def shown(record: Record) -> None:
            for sink in sinks:
                sink(record)

        with loop.share.interrupted_between_updates():
            loop.run(self.out / STATE, shown, lambda: self._measured(measures), self._stops)
        if "kl_from_base" not in loop.log[-1]:
            loop.log[-1] |= self._measured(measures)
            loop.save(self.out / STATE)
            if ranks.rank() == 0:
                MetricsFile(self.out / METRICS, loop.log)
        if not args.patience:
            self.trained.save(self.out)
        after = self._answers(prompts)
        if ranks.rank():
            return dict(loop.log[-1])
        samples = [
            Sample(self.tokenizer.decode(prompt), old, new)
            for prompt, old, new in zip(prompts, before, after, strict=True)
        ]
        write_report(self.out / REPORT, args, loop.log, [str(s) for s in self.examples.report], samples)
        return dict(loop.log[-1])

    def _sinks(self, show: Callable[[Record], None] | None) -> list[Callable[[Record], None]]:
        """Return what is called with each record."""
        sinks: list[Callable[[Record], None]] = [
            show or ProgressLine(self.args),
            MetricsFile(self.out / METRICS, self.loop.log),
        ]
        if (board := tensorboard(self.out / "tensorboard", self.loop.step)) is not None:
            sinks.append(board)
        return sinks

    def _answers(self, prompts: Sequence[list[int]]) -> list[str]:
        return answers(self.model, prompts, self.tokenizer, self.args.max_tokens)

    def _measured(self, measures: Measures) -> Record:
        """Evaluate; with `patience`, write what is trained if it is the best so far."""
        found = measures()
        if self.args.patience and found["eval_loss"] < min(evaluations(self.loop.log), default=math.inf):
            self.trained.save(self.out)
        return found

    def _stops(self, log: Sequence[Record]) -> bool:
        """Whether the last `patience` evaluations were not below the best before them."""
        losses, patience = evaluations(log), self.args.patience
        return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def unread_bytes(model: Mistral7B) -> int:
    """Return about how many bytes of a model's weights are in no memory yet: mapped files are read when used."""
    tensors = [*model.parameters(), *model.buffers()]
    return max(0, sum(t.nbytes for t in tensors if t.device.type == "cpu") - machine.resident_memory())


def evaluations(log: Sequence[Record]) -> list[float]:
    """Return the held-out losses in a log."""
    return [record["eval_loss"] for record in log if "eval_loss" in record]


def compile_blocks(model: Mistral7B) -> None:
    """Compile the feed-forward of each block, for packed batches of any length."""
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.compile(dynamic=True)
