"""The training loop of every method, with saved states from which a run resumes bit-identically.

    update n:  for batch in method.micro_batches(n): method.backward(batch)      gradients add up
               clip, AdamW, next update

What an update does depends on the weights and (seed, n) alone: n is the one counter of the run, by which the
method finds its data and dropout is seeded.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .. import machine
from ..distributed.ranks import Share, connected
from ..errors import TrainingError, WriteError
from .args import RunArgs
from .weights import Weights

Record = dict[str, Any]  # one entry of the log


class Method(Protocol):
    """What is learned: the data of each update, and the gradients of a loss on it."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return the parts of update `step` (from 0). They depend on the seed, the step and the weights alone."""
        ...

    def backward(self, batch: Any) -> dict[str, float]:
        """Add a part's gradients, normalised over the whole update; return its shares of what is logged.

        The shares are summed over the parts. "loss" must be among them, and "tokens", the number processed.
        """
        ...


class Loop:
    """Weights in training, with the progress of the run."""

    def __init__(
        self, args: RunArgs, method: Method, weights: Weights, data: str = "", share: Share | None = None
    ) -> None:
        """`data` is a fingerprint of what is trained on, to resume on the same alone.

        `share` says which parts of an update this process computes.
        """
        self.args, self.method, self.weights, self.data = args, method, weights, data
        self.share = share or Share()
        self.step, self.saved, self.seconds = 0, 0, 0.0
        self.measured = 0  # the last update after which the model was evaluated
        self.log: list[Record] = []
        self.torn = False  # while an update changes weights, step and log: interrupted then, they are not saved

    def update(self) -> Record:
        """Run one optimizer step; return what the method logs, the gradient norm and the learning rate."""
        self._seed()
        counts: Counter[str] = Counter()
        parts = self.method.micro_batches(self.step)
        for part in range(self.share.replica, len(parts), self.share.replicas):
            self._seed(part)  # of dropout: whichever process computes it
            counts.update(self.method.backward(parts[part]))
        sums = self.share.total(counts)
        machine.return_free_blocks()  # of activations; gradients in float32 and the next update do not fit there
        norm = float(self.weights.collect(self.args.clip))
        if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
            raise TrainingError(
                f"update {self.step}: loss {sums['loss']}, gradient norm {norm}; the last saved state is valid",
                field="lr",
                hint="lower the learning rate and resume from it",
            )
        share = self.args.learning_rate(self.step)
        self.torn = True
        self.weights.update(share)
        self.step += 1
        return {"step": self.step, **sums, "norm": norm, "lr": self.weights.peaks[0] * share}

    def _seed(self, *part: int) -> None:
        """Seed torch for this update, or a part of it."""
        sequence = np.random.SeedSequence((self.args.seed, self.step, *part))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def facts(self) -> dict[str, Any]:
        """What a saved state says of the run, besides its weights."""
        return {
            "step": self.step,
            "measured": self.measured,
            "seconds": self.seconds,
            "log": json.dumps(self.log),
            "args": json.dumps(self.args.as_json()),
            "data": self.data,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.weights.load_state(state)
        self.step, self.seconds, self.log = state["step"], state["seconds"], json.loads(state["log"])
        self.saved, self.measured = self.step, state.get("measured", self.step)

    def resume(self, path: Path, device: torch.device | str) -> bool:
        """Load the state in `path`, if there is one; TrainingError if it is of another run."""
        if (state := self.weights.read(path, device)) is None:
            return False
        path = Path(state.get("folder", path))  # a folder, of a run that torchrun started
        self.args.check_same_run(json.loads(state["args"]), path)
        if state.get("data", self.data) != self.data:
            raise TrainingError(
                "is of a run on other data: the rows of --data have changed, or the share that is held out",
                field="data",
                place=path,
                hint="give the same data to resume, or another --out to start again",
            )
        self.load_state(state)
        return True

    def save(self, path: Path) -> None:
        """Save the state atomically: a killed run or a full disk keeps the previous state.

        WriteError names the update of that state.
        """
        try:
            self.weights.save(self.facts(), path, self.args.keep)
        except WriteError as error:
            last = f"the same command resumes at update {self.saved}" if self.saved else "there is no saved state"
            raise WriteError.of(
                error, message=f"{error.message}. Update {self.step} is not saved; {last}"
            ) from error
        self.saved = self.step

    def run(
        self,
        state_path: Path,
        show: Callable[[Record], None],
        measure: Callable[[], Record] | None = None,
        stops: Callable[[Sequence[Record]], bool] = lambda log: False,
    ) -> None:
        """Train to the last update, saving states; after Ctrl-C save, then re-raise.

        measure   evaluates the model every `eval_every` updates; its results join the log
        stops     whether the log says that training is over before the last update
        Raises WriteError if a state cannot be saved; the save is not retried.
        """
        args = self.args
        try:
            while self.step < args.total_steps and not stops(self.log):
                self._advance(measure, show)
                if self.share.interrupted:
                    raise KeyboardInterrupt
                if self.step % args.save_every == 0:
                    self.save(state_path)
        except WriteError:
            raise
        except BaseException as error:
            if self.share.interrupted or not connected():  # else other ranks may be elsewhere, or nowhere
                self._save_new(state_path)
            if isinstance(error, KeyboardInterrupt):
                place = state_path.parent if connected() else state_path
                saved = f"update {self.saved} of {args.total_steps} is saved in {place}"
                saved += "; the same command resumes there"
                print(f"\nstopped: {saved if self.saved else 'no update was done'}", file=sys.stderr)
            raise
        self._save_new(state_path)

    def _advance(self, measure: Callable[[], Record] | None, show: Callable[[Record], None]) -> None:
        began = time.perf_counter()
        record = self.update()
        took = time.perf_counter() - began
        self.seconds += took
        record |= {"tokens_per_s": round(record.pop("tokens") / took), "seconds": round(took, 4)}
        self.log.append(record)
        self.torn = False
        self.evaluate(measure)
        show(record)

    def evaluate(self, measure: Callable[[], Record] | None) -> None:
        """Add to the last record what is measured every `eval_every` updates, unless it is there.

        It is not, after `resume`, if the run was interrupted in it.
        """
        every = self.args.eval_every
        if measure and every and self.step % every == 0 and self.measured < self.step:
            self.log[-1] |= measure()
            self.measured = self.step

    def _save_new(self, path: Path) -> None:
        if self.saved < self.step and not self.torn:
            self.save(path)
