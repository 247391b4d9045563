"""Saved states of a run: the latest, from which it resumes, and the ones kept before it.

state.pt            the latest
state-000200.pt     that after update 200, if more than the latest are kept; copied to state.pt, it is resumed
shards-000200/      that of a run over several processes: distributed.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError
from ..files import atomic_write, check_room

SHARDS = "shards"  # the beginning of the names of folders


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


def read_state(path: Path, device: torch.device | str) -> dict[str, Any] | None:
    """Return the state in `path`, or None; TrainingError if there is only one of several processes."""
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    if shards := sorted(path.parent.glob(f"{SHARDS}-[0-9]*")):
        raise TrainingError(
            "is the state of a run that torchrun started",
            field="out",
            place=shards[-1],
            hint="resume with torchrun --nproc-per-node N (N may be 1), or give another --out to start again",
        )
    return None


def _same_file(path: Path, other: Path) -> None:
    """Give a file another name, or copy it where the file system has no hard links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
