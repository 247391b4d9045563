"""SIGTERM as Ctrl-C: training that is ended saves its state."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[list[int]]:
    """Let SIGTERM raise KeyboardInterrupt; its number is then in the list, which is empty after Ctrl-C."""
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
