"""The process that worker processes are forked from: small, without threads, with the vocabulary ready.

    engine's process -- b"f" --------------------------> a worker that was forked before, and waits
                     <---- its pid and its socket, then the next one is forked
                     -- b"w", pid ---------------------> how did it end?
                     <------------------ its wait status
                     -- b"s", b"c" or b"k", pid -------> stop it, continue it, kill it

Forking the engine's own process is no choice: it has threads, and gigabytes. This one ends with its engine,
however that ends, and all workers with this one.
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
from .worker import rehearse, serve

MESSAGE = struct.Struct("<cq")  # what is asked, and a pid
ALIVE = -1  # no wait status
SIGNALS = {b"s": signal.SIGSTOP, b"c": signal.SIGCONT, b"k": signal.SIGKILL}
PR_SET_PDEATHSIG = 1  # of Linux's prctl
REMEMBERED = 1024  # wait statuses kept for an engine that asks later


def main(server_fd: int, vocabulary_fd: int) -> None:
    """Read the vocabulary from a file, then hand out workers as the socket says until that is closed."""
    with open(vocabulary_fd, "rb") as file:
        vocabulary = pickle.load(file)
    server = socket.socket(fileno=server_fd)
    rehearse(vocabulary)
    gc.collect()
    gc.freeze()  # what is shared with the forks is not written to
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
    except ConnectionError:  # the engine has ended
        pass
    finally:
        workers.kill()


def _fork(workers: Workers, server: socket.socket, vocabulary: Vocabulary) -> tuple[int, socket.socket]:
    """A worker that waits for its grammar, and the socket to its control."""
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    if (pid := os.fork()) == 0:
        _end_with(parent)
        server.close()
        ours.close()
        serve(vocabulary, theirs)
    theirs.close()
    workers.alive.add(pid)
    return pid, ours


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends, if that is killed itself. Linux alone can do so."""
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


class Workers:
    """The children of this process: those that are alive, and how some others have ended."""

    def __init__(self) -> None:
        self.alive: set[int] = set()
        self._ended: OrderedDict[int, int] = OrderedDict()

    def status(self, pid: int) -> int:
        """How one has ended, or is about to; ALIVE after a second."""
        for _ in range(100):
            self.reap()
            if pid in self._ended:
                return self._ended.pop(pid)
            time.sleep(0.01)
        return ALIVE

    def send(self, pid: int, number: int) -> int:
        """Send a signal to one that has not ended: 1; or 0, it has."""
        self.reap()
        if pid not in self.alive:
            return 0
        os.kill(pid, number)
        return 1

    def kill(self) -> None:
        """End them all: no other process would, where they compile."""
        for pid in self.alive:
            os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        """Note how those have ended that did."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self.alive.discard(found[0])
                self._ended[found[0]] = found[1]
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
