"""Ranks for tests: processes forked from the test's process, connected over loopback, one thread each."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(size: int, work: Callable[[], Any], folder: Path, timeout: float = 300) -> list[Any]:
    """Run `work` on `size` ranks; return what each returned, or the exception that ended it (None: killed).

    `timeout` is that of their collectives, in seconds.
    """
    port, pids = free_port(), []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _child(rank, size, port, work, folder / f"rank-{rank}", timeout)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    files = [folder / f"rank-{rank}" for rank in range(size)]
    found = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return found


def _child(rank: int, size: int, port: int, work: Callable[[], Any], out: Path, timeout: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    try:
        from mistral_7b.distributed import ranks

        ranks.start(timeout)
        result = work()
    except BaseException as error:
        traceback.print_exc()
        result = error
    out.with_suffix(".partial").write_bytes(pickle.dumps(result))
    out.with_suffix(".partial").rename(out)
    os._exit(0)
