"""A disk that becomes full at the n-th write of a piece of work, for every n."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral_7b import WriteError
from mistral_7b.files import write_error_in

MODES = "wax+"


class Full:
    """`open`, whose files take `room` writes in all (their closing counts) and then no more."""

    def __init__(self, room: int, below: Path) -> None:
        self.room, self.below, self.open = room, below, builtins.open

    def __call__(self, file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        opened = self.open(file, mode, *rest, **named)
        writes = isinstance(file, (str, os.PathLike)) and set(mode) & set(MODES)
        inside = writes and Path(os.path.abspath(file)).is_relative_to(self.below)
        return Taking(opened, self) if inside else opened

    def take(self) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


class Taking:
    """A file that asks the disk before each write; what is no write goes to the file itself."""

    def __init__(self, file: Any, disk: Full) -> None:
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        self.disk.take()
        return int(self.file.write(data))

    def close(self) -> None:
        if not self.file.closed:
            self.file.close()
            self.disk.take()

    def fileno(self) -> int:
        raise io.UnsupportedOperation  # what is copied is written

    def __enter__(self) -> Taking:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def below(folder: Path) -> dict[str, bytes]:
    """Every file there is in a folder, hidden ones too, and its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def full_at_every_write(
    folder: Path, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch, named: str
) -> int:
    """Do the work with room for 0, 1, 2... writes: WriteError that names the place, and `folder` as it was.

    Returns how many writes there are: with room for all the work is done.
    """
    before = below(folder)
    for room in range(10_000):
        if (error := refusal(folder, work, monkeypatch, room)) is None:
            return room
        assert named in str(error.place)
        assert getattr(write_error_in(error), "errno", None) == errno.ENOSPC
        assert error.hint
        assert below(folder) == before, f"something was left with room for {room} writes"
    raise AssertionError("there is no end of writes")


def refusal(
    folder: Path, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch, room: int
) -> WriteError | None:
    """How the work ends with room for so many writes."""
    with monkeypatch.context() as patched:
        full = Full(room, folder)
        for module in (builtins, io):
            patched.setattr(module, "open", full)
        try:
            work()
        except WriteError as error:
            return error
    return None
