"""The process that worker processes are forked from: small, without threads, with the vocabulary ready.

    engine's process -- b"f" --------------------------> a worker that was forked before, and waits
                     <---- its pid and its socket, then the next one is forked
                     -- b"w", pid ---------------------> how did it end?
                     <------------------ its wait status

Forking the engine's own process is no choice: it has threads, and gigabytes. This one ends with its engine.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import socket
import struct
import time
from collections import OrderedDict

from .vocabulary import Vocabulary
from .worker import rehearse, serve

MESSAGE = struct.Struct("<cq")  # what is asked, and a pid
ALIVE = -1  # no wait status
REMEMBERED = 1024  # wait statuses kept for an engine that asks later


def main(server_fd: int, vocabulary_fd: int) -> None:
    """Read the vocabulary from a file, then hand out workers as the socket says until that is closed."""
    with open(vocabulary_fd, "rb") as file:
        vocabulary = pickle.load(file)
    server = socket.socket(fileno=server_fd)
    rehearse(vocabulary)
    gc.collect()
    gc.freeze()  # what is shared with the forks is not written to
    ended: OrderedDict[int, int] = OrderedDict()
    spare, control = _fork(server, vocabulary)
    with contextlib.suppress(ConnectionError):  # the engine has ended
        while len(message := server.recv(MESSAGE.size, socket.MSG_WAITALL)) == MESSAGE.size:
            kind, pid = MESSAGE.unpack(message)
            if kind == b"w":
                server.sendall(MESSAGE.pack(kind, _status(ended, pid)))
                continue
            with control:
                socket.send_fds(server, [MESSAGE.pack(kind, spare)], [control.fileno()])
            _reap(ended)
            spare, control = _fork(server, vocabulary)


def _fork(server: socket.socket, vocabulary: Vocabulary) -> tuple[int, socket.socket]:
    """A worker that waits for its grammar, and the socket to its control."""
    ours, theirs = socket.socketpair()
    if (pid := os.fork()) == 0:
        server.close()
        ours.close()
        serve(vocabulary, theirs)
    theirs.close()
    return pid, ours


def _status(ended: OrderedDict[int, int], pid: int) -> int:
    """How a process has ended, or is about to; ALIVE after a second."""
    for _ in range(100):
        _reap(ended)
        if pid in ended:
            return ended.pop(pid)
        time.sleep(0.01)
    return ALIVE


def _reap(ended: OrderedDict[int, int]) -> None:
    """Note how processes have ended that did."""
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    except ChildProcessError:
        pass
    while len(ended) > REMEMBERED:
        ended.popitem(last=False)
