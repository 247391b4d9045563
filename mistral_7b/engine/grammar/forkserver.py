"""The process that worker processes are forked from: small, single-threaded, with the vocabulary loaded.

    engine's process -- b"f" --------------------------> a worker that was forked in advance
                     <------ its pid and control socket; then the next worker is forked
                     -- b"w", pid ---------------------> ask how a worker ended
                     <------------------ its wait status
                     -- b"s", b"c" or b"k", pid -------> suspend, resume or kill a worker

The engine's own process cannot be forked: it has threads and uses gigabytes. This process ends with its engine,
even if that is killed, and all workers end with this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import socket
import struct
import time
from collections import OrderedDict

from .vocabulary import Vocabulary
from .worker import serve, warm_up

MESSAGE = struct.Struct("<cq")  # the kind of request, and a pid
ALIVE = -1  # reply to b"w" for a worker that runs
SIGNALS = {b"s": signal.SIGSTOP, b"c": signal.SIGCONT, b"k": signal.SIGKILL}
PR_SET_PDEATHSIG = 1  # Linux prctl option
MAX_STATUSES = 1024  # wait statuses kept until the engine asks for them


def main(server_fd: int, vocabulary_fd: int) -> None:
    """Load the vocabulary, then serve requests from the socket until it is closed."""
    with open(vocabulary_fd, "rb") as file:
        vocabulary = pickle.load(file)
    server = socket.socket(fileno=server_fd)
    warm_up(vocabulary)
    gc.collect()
    gc.freeze()  # keeps the collector from writing to pages that are shared with the forks
    workers = Workers()
    try:
        spare, control = _fork(workers, server, vocabulary)
        while len(message := server.recv(MESSAGE.size, socket.MSG_WAITALL)) == MESSAGE.size:
            kind, pid = MESSAGE.unpack(message)
            if kind == b"f":
                with control:
                    socket.send_fds(server, [MESSAGE.pack(kind, spare)], [control.fileno()])
                workers.reap()
                spare, control = _fork(workers, server, vocabulary)
            else:
                value = workers.status(pid) if kind == b"w" else workers.send(pid, SIGNALS[kind])
                server.sendall(MESSAGE.pack(kind, value))
    except ConnectionError:  # the engine ended
        pass
    finally:
        workers.kill()


def _fork(workers: Workers, server: socket.socket, vocabulary: Vocabulary) -> tuple[int, socket.socket]:
    """The pid and control socket of a new worker, which waits for its grammar."""
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    if (pid := os.fork()) == 0:
        _die_with_parent(parent)
        server.close()
        ours.close()
        serve(vocabulary, theirs)
    theirs.close()
    workers.alive.add(pid)
    return pid, ours


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, even by SIGKILL. Linux only."""
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


class Workers:
    """The children of this process: those alive, and the wait statuses of others."""

    def __init__(self) -> None:
        self.alive: set[int] = set()
        self._statuses: OrderedDict[int, int] = OrderedDict()

    def status(self, pid: int) -> int:
        """A worker's wait status; waits up to a second for it to end, then returns ALIVE."""
        for _ in range(100):
            self.reap()
            if pid in self._statuses:
                return self._statuses.pop(pid)
            time.sleep(0.01)
        return ALIVE

    def send(self, pid: int, number: int) -> int:
        """Send a signal to a worker; 1 if it was sent, 0 if the worker has ended."""
        self.reap()
        if pid not in self.alive:
            return 0
        os.kill(pid, number)
        return 1

    def kill(self) -> None:
        """Kill all workers: one that compiles does not notice that its engine has ended."""
        for pid in self.alive:
            os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        """Record the wait statuses of workers that have ended."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self.alive.discard(found[0])
                self._statuses[found[0]] = found[1]
        while len(self._statuses) > MAX_STATUSES:
            self._statuses.popitem(last=False)
