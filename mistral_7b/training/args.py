"""The knobs of a training run, each once. Imports no torch: the command line reads this file."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ..errors import TrainingError


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """A run of training on plain text files, from fresh weights or from a saved model.

    Raises TrainingError, naming the field, for values that cannot be.
    """

    out: str = "runs/train"
    """Folder for the checkpoint to resume from, the log, the curve and the finished model."""
    data: tuple[str, ...] = ()
    """Text files, or folders whose files of `suffixes` are read."""
    held_out: tuple[str, ...] = ()
    """Files or folders that are only measured on, in bits per byte; left out of `data`."""
    suffixes: tuple[str, ...] = (".py", ".txt", ".md")
    """Which files of a folder are text."""
    tokenizer: str = "demo"
    """A folder, a file or a name, as everywhere."""
    init: str | None = None
    """A model to start from; none: fresh weights of the shape below."""

    dim: int = 320
    n_layers: int = 6
    head_dim: int = 64
    hidden_dim: int = 896
    n_heads: int = 5
    n_kv_heads: int = 1
    sliding_window: int | None = 512
    rope_theta: float = 10_000.0
    max_seq_len: int = 32768
    tie_embeddings: bool = False

    steps: int = 1000
    """Updates in all; the learning rate's schedule ends there."""
    seq_len: int = 2048
    """Tokens a row; documents are packed into rows and do not see each other."""
    rows: int = 4
    """Rows an update."""
    accumulate: int = 1
    """Parts in which the rows of an update are computed, to save memory; gradients are the same."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: AdamW for embeddings, norms and the output; Muon (Newton-Schulz) for the matrices between."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-2
    """Peak learning rate of Muon."""
    warmup: int = 100
    """Updates of linear warm-up, before cosine decay."""
    final_lr: float = 0.05
    """Share of the peak at which the cosine ends."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Gradients are scaled down to this norm."""
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and gradients; the master weights are float32."""
    device: str = "cpu"
    compile: bool = False
    """torch.compile each block: faster after a minute or two of building."""

    save_every: int = 100
    """Updates between checkpoints; Ctrl-C saves one as well."""
    eval_every: int = 0
    """Updates between measurements on `held_out`; 0: at the end alone."""
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "rows", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"TrainArgs.{name} must be at least 1, not {getattr(self, name)}", field=name)
        for name in ("lr", "muon_lr", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TrainingError(f"TrainArgs.{name} must be a finite number above 0, not {value}", field=name)
        if self.rows % self.accumulate:
            raise TrainingError(
                f"TrainArgs.rows ({self.rows}) must be a multiple of accumulate ({self.accumulate})", field="rows"
            )
        if not 0 <= self.warmup <= self.steps:
            raise TrainingError(
                f"TrainArgs.warmup must lie in 0..steps ({self.steps}), not {self.warmup}",
                field="warmup",
            )

    def learning_rate(self, step: int) -> float:
        """Share of the peak rate at update `step` (from 0): linear warm-up, then cosine to `final_lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
