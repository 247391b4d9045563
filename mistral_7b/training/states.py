"""Saved states of a run: the latest, from which it resumes, and the ones kept before it.

state.pt            the latest
state-000200.pt     that after update 200, if more than the latest are kept; copied to state.pt, it is resumed
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_write, check_room


def save_state(state: dict[str, Any], path: Path, nbytes: int, keep: int = 1) -> None:
    """Write the state to `path` atomically, and keep the last `keep` states by their numbers.

    `nbytes` is the size of its tensors, for which the disk must have room. Raises WriteError.
    """
    check_room(path, nbytes)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)  # given a path, torch would hide the OSError
    if keep > 1:
        numbered = path.with_stem(f"{path.stem}-{state['step']:06d}")
        with atomic_write(numbered) as temporary:
            _same_file(path, temporary)
    for old in sorted(path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}"))[: -keep if keep > 1 else None]:
        old.unlink(missing_ok=True)


def _same_file(path: Path, other: Path) -> None:
    """Give a file another name, or copy it where the file system has no hard links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
