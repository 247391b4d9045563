"""Training on plain text: data, loss and training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .args import TrainArgs

if TYPE_CHECKING:
    from .trainer import train as train

__all__ = ["TrainArgs", "train"]


def __getattr__(name: str) -> Any:  # lazy, so that --help does not import torch
    if name == "train":
        from .trainer import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
