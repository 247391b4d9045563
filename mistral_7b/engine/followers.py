"""One engine over K processes, of which it starts K - 1: rank 0 decides, the others follow each step.

    rank 0    requests, plan   -- pages and tokens -->   rank 1: hidden, logits
              hidden, logits   <--- sums, gathered -->
              samples, emits

A follower gets calls of `Forward` through its stdin, and computes them on its part of the model. What is decided
by time or drawn at random stays on rank 0. The end of stdin ends a follower, so none outlives rank 0; the end of a
follower, or a step that fails on one rank alone, ends the engine (LostRank).
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import ranks
from ..errors import DistributedError, Mistral7BError
from ..sampling.choice import to_device
from .engine import Engine
from .forward import Forward
from .in_flight import Plan, Rows
from .inputs import InputProcessor

HOST = "127.0.0.1"
PATIENCE = 5.0  # seconds in which a follower ends by itself
NOTICE = 1.0  # seconds until its end, which its connections tell first, is known


class LostRank(BaseException):  # not an Exception: those end single requests
    """Ranks that no longer take the same steps."""


@dataclass
class Part:
    """What a follower needs of a SequenceState: its pages. Its request has neither adapter nor watchers."""

    pages: np.ndarray
    first: int
    stop: int
    computed: int
    adapter: ClassVar[None] = None
    watching: ClassVar[None] = None

    @property
    def request(self) -> Part:
        return self


def lead(size: int, opened: Callable[[], InputProcessor]) -> InputProcessor:
    """Call `opened`, which is pickled, in `size` processes: in this one, and in followers that it starts.

    This process is rank 0 from then on, as under torchrun. DistributedError if a follower ends meanwhile.
    """
    if size == 1:
        return opened()
    followers = Followers(size, opened)
    with ExitStack() as failed:
        failed.callback(followers.close)
        try:
            followers.wait_started()
            ranks.start()
            inputs = opened()
        except Mistral7BError:
            raise
        except RuntimeError as e:  # of gloo
            raise DistributedError(f"the model could not be divided: {followers.reason(e)}") from e
        failed.pop_all()
    engine = inputs.engine
    engine.forward = LeadingForward(engine.forward, followers)
    engine.pool.copies = []
    return inputs


class Followers:
    """The processes of ranks 1 to K - 1. `told` is what the first one that failed has raised."""

    def __init__(self, size: int, opened: Callable[[], InputProcessor]) -> None:
        self.told, self.closing = "", False
        self.on_loss: Callable[[], None] = lambda: None  # called by another thread when a follower has ended
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "")
        os.environ |= {
            "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "RANK": "0", "LOCAL_RANK": "0",
            "MASTER_ADDR": HOST, "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": loopback, ranks.LEADS: "1",
        }  # fmt: skip
        path = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        self.processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            )
            for rank in range(1, size)
        ]  # fmt: skip
        self._started: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._lost = threading.Event()
        for process in self.processes:
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        with suppress(OSError):  # one that has ended: wait_started says why
            self._write(pickle.dumps(opened))

    def wait_started(self) -> None:
        """Wait until all have imported what they need. DistributedError if one ends."""
        for _ in self.processes:
            if not self._started.get():
                raise DistributedError(f"the model could not be divided: {self.told}")

    def send(self, call: tuple[Any, ...]) -> None:
        """Send a call to all. LostRank if one has ended."""
        try:
            self._write(pickle.dumps(call))
        except OSError as e:
            raise LostRank(self.reason(e)) from e

    def reason(self, error: Exception) -> str:
        """What a follower has told that has ended, also if only just; else the error that rank 0 has."""
        self._lost.wait(NOTICE)
        return self.told or repr(error)

    def _write(self, data: bytes) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(data)
            process.stdin.flush()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Read a line when a follower has started, another if it fails; then it ends."""
        assert process.stdout is not None
        if process.stdout.readline():
            self._started.put(True)
        why = process.stdout.readline().decode(errors="replace").strip()
        code = process.wait()
        self.told = self.told or why or f"process {process.pid} of a rank ended with status {code}"
        self._lost.set()
        self._started.put(False)
        if not self.closing:
            self.on_loss()

    def watched(self, on_loss: Callable[[], None]) -> None:
        """Call `on_loss`, from another thread, when a follower ends, or now if one has ended."""
        self.on_loss = on_loss
        if self.told:
            on_loss()

    def close(self, steps: threading.Thread | None = None) -> None:
        """End the processes, after the thread of the steps; but that may wait for one that hangs."""
        if steps is not None:
            steps.join(PATIENCE)
        self.closing = True
        for process in self.processes:
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        for process in self.processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class LeadingForward(Forward):
    """The Forward of rank 0: all ranks compute each call."""

    def __init__(self, forward: Forward, followers: Followers) -> None:
        super().__init__(forward.adapters, forward.pool)
        self.forward, self.followers = forward, followers
        self._hidden: Tensor | None = None  # that of the last call, which followers have, too

    def hidden(self, plan: Plan, tokens: Tensor) -> Tensor:
        parts = [(Part(s.pages[: s.stop], s.first, s.stop, s.computed), n) for s, n in plan]
        copies, self.pool.copies = self.pool.copies, []
        call = "hidden", copies, parts, tokens.tolist()
        self._hidden = self._together(call, lambda: self.forward.hidden(plan, tokens))
        return self._hidden

    def logits(self, hidden: Tensor, rows: Rows) -> Tensor:
        sent = None if hidden is self._hidden else hidden.cpu()
        return self._together(("logits", sent, rows), lambda: self.forward.logits(hidden, rows))

    def _together(self, call: tuple[Any, ...], own: Callable[[], Tensor]) -> Tensor:
        self.followers.send(call)
        try:
            return own()
        except Exception as e:  # the others may have passed this collective, or wait in it
            raise LostRank(self.followers.reason(e)) from e


def followers_of(forward: Forward) -> Followers | None:
    """The processes that compute what `forward` does; None if there are none."""
    return forward.followers if isinstance(forward, LeadingForward) else None


# ---------------------------------------------------------------------- in a follower


def main() -> None:
    """Follow rank 0: on stdin the function that opens an engine, then calls; on stdout the error that ends it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # rank 0 drains first
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, calls), daemon=True).start()
    try:
        opened = calls.get()
        print("started", file=out, flush=True)
        ranks.start()
        _follow(opened().engine, calls)
    except BaseException as e:
        print(f"rank {ranks.rank()}: {e!r}".replace("\n", " "), file=out, flush=True)
    os._exit(1)


def _read(stdin: BinaryIO, calls: queue.SimpleQueue[Any]) -> NoReturn:
    """Queue what arrives; the end of rank 0 ends this process, also if it is waiting for the others."""
    with suppress(EOFError, pickle.UnpicklingError):
        while True:
            calls.put(pickle.load(stdin))
    os._exit(0)


@torch.inference_mode()
def _follow(engine: Engine, calls: queue.SimpleQueue[Any]) -> NoReturn:
    hidden = torch.empty(0)
    while True:
        name, *given = calls.get()
        if name == "hidden":
            copies, parts, tokens = given
            for copy in copies:
                engine.pool.copy_contents(*copy)
            hidden = engine.forward.hidden(parts, to_device(tokens, engine.device))
        else:
            sent, rows = given
            engine.forward.logits(hidden if sent is None else sent.to(engine.device), rows)
