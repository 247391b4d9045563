"""The arguments of a training run. Imports no torch: the command line reads this file."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ..errors import TrainingError


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Train on plain text files, from initial weights or a saved model.

    Raises TrainingError, naming the field, for invalid values.
    """

    out: str = "runs/train"
    """Output folder: state to resume from, log, loss curve and trained model."""
    data: tuple[str, ...] = ()
    """Text files, or folders that are searched for files with `suffixes`."""
    held_out: tuple[str, ...] = ()
    """Files or folders for evaluation only, in bits per byte; excluded from `data`."""
    suffixes: tuple[str, ...] = (".py", ".txt", ".md")
    """File suffixes to read in folders."""
    tokenizer: str = "demo"
    """Tokenizer: a folder, a file or a model name."""
    init: str | None = None
    """Model to start from; None: random weights with the shape below."""

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
    """Total number of updates; the learning rate schedule ends there."""
    seq_len: int = 2048
    """Tokens per row; documents are packed into rows without attention across them."""
    rows: int = 4
    """Rows per update."""
    accumulate: int = 1
    """Gradient accumulation: parts into which an update is split to save memory."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon (Newton-Schulz) for the matrices in the layers, AdamW for all other weights."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-2
    """Peak learning rate of Muon."""
    warmup: int = 100
    """Updates of linear warmup before cosine decay."""
    final_lr: float = 0.05
    """Final learning rate, as a fraction of the peak."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Maximum gradient norm."""
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and gradients; the master weights are float32."""
    device: str = "cpu"
    compile: bool = False
    """torch.compile each block: faster after one or two minutes of compilation."""

    save_every: int = 100
    """Updates between saved states; Ctrl-C also saves one."""
    eval_every: int = 0
    """Updates between evaluations on `held_out`; 0: only at the end."""
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
                f"TrainArgs.warmup must be in 0..steps ({self.steps}), not {self.warmup}",
                field="warmup",
            )

    def learning_rate(self, step: int) -> float:
        """Return the fraction of the peak rate at update `step` (from 0).

        Linear warmup, then cosine decay to `final_lr`.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
