"""The metrics of a run as files: JSON lines, and TensorBoard's where it is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import machine
from ..errors import WriteError
from ..files import ADVICE, atomic_write


class MetricsFile:
    """metrics.jsonl: one record a line, as soon as it is known.

    A resumed run writes the file anew up to the saved state, so that it has each update once.
    """

    def __init__(self, path: Path, log: Sequence[dict[str, Any]]) -> None:
        self.path = path
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in log), encoding="utf-8")

    def __call__(self, record: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise WriteError(
                f"cannot be written ({error.strerror})", place=self.path, hint=ADVICE.get(error.errno or 0)
            ) from error


class TensorBoard:
    """TensorBoard's event file, in a folder of its own. ImportError if TensorBoard is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __call__(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()


def tensorboard(folder: Path, step: int) -> TensorBoard | None:
    """Return TensorBoard's file, or None if TensorBoard is not installed."""
    return TensorBoard(folder, step) if machine.version("tensorboard") else None
