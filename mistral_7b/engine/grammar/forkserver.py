"""The process that worker processes are forked from: small, without threads, with the vocabulary ready.

    engine's process -- b"f" and the end of a socket --> fork: worker.serve at that socket
                     <------------------------- its pid
                     -- b"w", pid ---------------------> how did it end?
                     <------------------ its wait status

Forking the engine's own process is no choice: it has threads, and gigabytes. This one ends with its engine.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import struct
import time
from collections import OrderedDict

from .worker import serve

MESSAGE = struct.Struct("<cq")  # what is asked, and a pid
ALIVE = -1  # no wait status
REMEMBERED = 1024  # wait statuses kept for an engine that asks later


def main(server_fd: int, vocabulary_fd: int) -> None:
    """Read the vocabulary from a file, then fork as the socket says until that is closed."""
    with open(vocabulary_fd, "rb") as file:
        vocabulary = pickle.load(file)
    server = socket.socket(fileno=server_fd)
    vocabulary.entries  # noqa: B018  # made once, for all
    gc.collect()
    gc.freeze()  # what is shared with the forks is not written to
    ended: OrderedDict[int, int] = OrderedDict()
    while True:
        message, fds, _, _ = socket.recv_fds(server, MESSAGE.size, 1)
        if len(message) < MESSAGE.size:
            return
        kind, pid = MESSAGE.unpack(message)
        if kind == b"f":
            answer = os.fork()
            if answer == 0:
                server.close()
                serve(vocabulary, socket.socket(fileno=fds[0]))
            os.close(fds[0])
            _reap(ended)
        else:
            answer = _status(ended, pid)
        server.sendall(MESSAGE.pack(kind, answer))


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
