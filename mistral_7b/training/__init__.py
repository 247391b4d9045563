"""Training from plain text: data, loss, the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .args import TrainArgs

if TYPE_CHECKING:
    from .trainer import train as train

__all__ = ["TrainArgs", "train"]


def __getattr__(name: str) -> Any:  # torch is imported when training begins, not when --help is read
    if name == "train":
        from .trainer import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
