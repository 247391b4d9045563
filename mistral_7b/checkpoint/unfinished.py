"""A folder in the making that outlives an interruption: the same job, run again, continues it.

The folder lies beside the output under the temporary name of files.py, which holds the id of the process that
writes it. Its state is one file, replaced atomically after each layer, once all that it describes is on disk.
After an error the folder is removed. After Ctrl-C, or if the process was killed, the next run of the same job
takes it over, and a run of another job removes it. It has no config.json until the end, so it cannot be opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import (
    abandoned,
    abandoned_name,
    check_room,
    partial_name,
    raise_write_error,
    remove_left_over,
)
from .writing import check_target

STATE = "state.safetensors"


class Unfinished:
    """A folder in the making, and the state from which its `job` continues."""

    def __init__(self, folder: pathlib.Path, job: Mapping[str, Any], done: int = 0) -> None:
        self.folder, self.done = folder, done
        self._job = json.dumps(job, sort_keys=True)

    def save(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Record that `done` layers are complete in the folder's files, and the tensors that the next needs."""
        for path in self.folder.iterdir():
            _flush(path)
        beside = self.folder / f".{STATE}"
        tensors = {name: value.contiguous() for name, value in state.items()}
        save_file(tensors, beside, {"job": self._job, "done": str(done)})
        _flush(beside)
        os.replace(beside, self.folder / STATE)
        self.done = done

    def load(self) -> dict[str, Tensor]:
        """The tensors of the last `save`."""
        with safe_open(self.folder / STATE, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def take_over(self, target: pathlib.Path) -> None:
        """Move a folder of the same job here, if an interrupted process has left one beside `target`."""
        for path in abandoned(target):
            with contextlib.suppress(OSError, SafetensorError, ValueError):
                with safe_open(path / STATE, "pt") as file:
                    metadata = file.metadata() or {}
                if metadata.get("job") == self._job:
                    done = int(metadata["done"])
                    path.rename(self.folder)  # fails if another process was faster
                    self.done = done
                    return


@contextlib.contextmanager
def resumable_folder(out: pathlib.Path, needed: int, job: Mapping[str, Any]) -> Iterator[Unfinished]:
    """`writing.new_folder` for a `job` that continues after an interruption; `done` is 0 for a new one.

    `job` is all that the result depends on, as JSON. It raises as `new_folder` does.
    """
    target = out.absolute()
    made = Unfinished(partial_name(target), job)
    check_target(out, 0)
    made.take_over(target)
    remove_left_over(target)
    try:
        if not made.done:
            check_room(out, needed)
            made.folder.mkdir(parents=True)
        yield made
        (made.folder / STATE).unlink(missing_ok=True)
        if out.exists():
            out.rmdir()  # empty, as checked; some systems cannot rename onto a folder
        os.replace(made.folder, out)
    except Exception as error:
        raise_write_error(error, out, made.folder)
        raise
    except BaseException:  # Ctrl-C
        if made.done:
            made.folder.rename(abandoned_name(target))
        raise
    finally:
        shutil.rmtree(made.folder, ignore_errors=True)


def _flush(path: pathlib.Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
