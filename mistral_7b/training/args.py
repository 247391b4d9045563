"""The arguments of a pretraining run, and what those of every run share. Imports no torch, for `--help`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import TrainingError

HIGHEST_RATE = 10.0  # learning rate: AdamW and Muon move a weight by about as much in an update


class RunArgs:
    """What the loop reads of a run's arguments; TrainArgs and FinetuneArgs declare the fields."""

    steps: int | None
    warmup: int
    final_lr: float
    clip: float
    seed: int
    save_every: int
    eval_every: int
    log_every: int
    device: str
    keep: int = 1  # saved states
    FREE: Collection[str] = ()  # fields that may change when a run is resumed

    @property
    def total_steps(self) -> int:
        """The number of updates, once it is known."""
        assert self.steps is not None
        return self.steps

    def learning_rate(self, step: int) -> float:
        """Return the fraction of the peak rate at update `step` (from 0).

        Linear warmup, for all of a run that is shorter, then cosine decay to `final_lr`.
        """
        warmup = min(self.warmup, self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.total_steps - warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON would give them back: tuples as lists."""
        given = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    def check_same_run(self, saved: Mapping[str, Any], path: Path) -> None:
        """Raise TrainingError if the state in `path` is of a run with other arguments `saved`."""
        for name, value in self.as_json().items():
            if name not in self.FREE and saved.get(name) != value:
                raise TrainingError(
                    f"is of a run with {name}={saved.get(name)!r}, not {value!r}",
                    field=name,
                    place=path,
                    hint="give the same arguments to resume, or another --out to start again",
                )

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise TrainingError(f"{self._of(name)} must be at least {least}, not {value}", field=name)

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise TrainingError(f"{self._of(name)} must be a finite number above 0, not {value}", field=name)

    def _check_rates(self, *names: str) -> None:
        self._check_positive(*names)
        for name in names:
            value = getattr(self, name)
            if value is not None and value > HIGHEST_RATE:
                raise TrainingError(
                    f"{self._of(name)} must be at most {HIGHEST_RATE:g}, not {value:g}",
                    field=name,
                    hint="usual learning rates are from 1e-6 to 1e-2",
                )

    def _check_rows(self, rows: int, accumulate: int) -> None:
        if rows % accumulate:
            raise TrainingError(
                f"{self._of('rows')} ({rows}) must be a multiple of accumulate ({accumulate})",
                field="rows",
                hint="set accumulate to 1" + (f" or {rows}" if rows > 1 else ""),
            )

    def _of(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"


@dataclasses.dataclass(frozen=True)
class TrainArgs(RunArgs):
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

    FREE = (  # with other `steps`, the schedule is that of the new number
        "steps", "out", "data", "held_out", "save_every", "eval_every", "log_every", "compile", "device",
        "accumulate",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self._check_at_least(1, "steps", "seq_len", "rows", "accumulate", "save_every", "log_every")
        self._check_positive("clip")
        self._check_rates("lr", "muon_lr")
        self._check_rows(self.rows, self.accumulate)
        if not 0 <= self.warmup <= self.steps:
            raise TrainingError(
                f"TrainArgs.warmup must be in 0..steps ({self.steps}), not {self.warmup}", field="warmup"
            )
