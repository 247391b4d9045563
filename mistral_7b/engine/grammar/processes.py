"""The processes that follow grammars, as the engine's process starts, asks and ends them.

ForkServer       the one that forks the others (forkserver.py)
GrammarProcess   one of these others (worker.py): a grammar, and the completions that must obey it
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING
from weakref import WeakSet

from ...errors import EngineError, GrammarError, ProcessError
from ..config import GrammarLimits
from .forkserver import ALIVE, MESSAGE
from .vocabulary import Vocabulary
from .worker import LENGTH

if TYPE_CHECKING:
    from .client import GrammarState

HURRY = 10.0  # seconds that the server of processes may take for a fork
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from mistral_7b.engine.grammar.forkserver import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """ProcessError, with the system's own reason, where it has no files, memory or processes left.

    A ConnectionError says something else, that a process has ended, and is left as it is.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as e:
        raise ProcessError(
            f"no process could be started to follow a grammar: {e.strerror or e}",
            hint="allow this process more (ulimit -n for files), or ask for less at once",
        ) from e


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


class ForkServer:
    """The process that forks the others. Started anew if it was ended from outside."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        with starting():
            self._socket = self._open()

    def _open(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with _closed_on_error(ours), theirs, tempfile.TemporaryFile() as file:
            pickle.dump(self._vocabulary, file)
            file.seek(0)
            fds = (theirs.fileno(), file.fileno())
            # A session of its own: Ctrl-C at the terminal is for the engine, which it ends with.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), *map(str, fds)], pass_fds=fds,
                stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        ours.settimeout(HURRY)
        return ours

    def fork(self) -> tuple[socket.socket, int]:
        """A new worker: the socket to its control, and its pid. ProcessError, or OSError, if there is none."""
        pid, fds = self._ask(b"f", 0)
        if not fds:  # the kernel has dropped it, and the worker ends
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        control = socket.socket(fileno=fds[0])
        control.settimeout(HURRY)
        return control, pid

    def status(self, pid: int) -> int | None:
        """How a worker that has ended did, as os.waitpid says; None: not known, or it has not."""
        try:
            status, _ = self._ask(b"w", pid)
        except (EngineError, OSError):
            return None
        return None if status == ALIVE else status

    def signal(self, kind: bytes, pid: int) -> None:
        """Send a worker one of forkserver.SIGNALS; nothing happens if it has ended."""
        with contextlib.suppress(EngineError, OSError):
            self._ask(kind, pid)

    def _ask(self, kind: bytes, value: int) -> tuple[int, list[int]]:
        """The server's answer, a number and file descriptors. ProcessError, or OSError, if there is no server."""
        with self._lock:
            for _ in range(2):
                try:
                    self._socket.sendall(MESSAGE.pack(kind, value))
                    answer, fds, _, _ = socket.recv_fds(self._socket, MESSAGE.size, 1)
                except OSError:
                    answer, fds = b"", []
                if len(answer) == MESSAGE.size:
                    return int(MESSAGE.unpack(answer)[1]), fds
                self._close()
                self._socket = self._open()
                if kind != b"f":  # the old one knew
                    break
        raise ProcessError(
            "the process that follows grammars could not be started", hint="see what it wrote to stderr"
        )

    def _close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._close()


class GrammarProcess:
    """A worker, and what it follows. OSError if the system has no more to give."""

    def __init__(self, server: ForkServer, key: str) -> None:
        self._server, self.over = server, False
        self._status: int | None = None
        self.requests: set[str] = set()  # that have used it; of many, some
        self.states: WeakSet[GrammarState] = WeakSet()  # that use it
        self.starting: WeakSet[GrammarState] = WeakSet()  # of these, those that wait for it to be compiled
        self.since = self.used = 0.0  # when it began to compile, or to stand still; and when it was asked last
        self.ended: EngineError | None = None  # why it was ended from here; its states are not to blame
        self._control, self._pid = server.fork()
        data = key.encode()
        self._control.sendall(LENGTH.pack(len(data)) + data)

    def connect(self, request: str) -> Connection:
        """A connection for one completion. ConnectionError if the process has ended."""
        if len(self.requests) < 2:
            self.requests.add(request)
        ours, theirs = socket.socketpair()
        with _closed_on_error(ours), theirs:
            socket.send_fds(self._control, [b"c"], [theirs.fileno()])
        return Connection(ours.detach())

    def stop(self) -> None:
        """Let it stand still."""
        self._server.signal(b"s", self._pid)

    def resume(self) -> None:
        """Let it run again."""
        self._server.signal(b"c", self._pid)

    def end(self, why: EngineError) -> None:
        """End it, whatever it does."""
        self.over, self.ended = True, why
        self._server.signal(b"k", self._pid)

    def close(self) -> None:
        """Take no more completions; the process ends with the last it has."""
        self._control.close()

    def ended_by(self) -> int:
        """The signal that it has ended by; 0: none, or not known."""
        if self._status is None:
            self._status = self._server.status(self._pid)
        return os.WTERMSIG(self._status) if self._status is not None and os.WIFSIGNALED(self._status) else 0

    def why(self, limits: GrammarLimits) -> GrammarError:
        """Why it has ended, for the user whose grammar it was."""
        number = self.ended_by()
        if number == signal.SIGPROF:
            return GrammarError(
                f"structured_outputs: the grammar takes more CPU time than it may ({limits.compile_seconds:g} s "
                f"to compile, {limits.mask_seconds:g} s for a token, {limits.request_seconds:g} s for a request)",
                field="structured_outputs",
                hint="make it simpler, or less ambiguous",
            )
        name = signal.Signals(number).name if number else f"status {self._status}"
        return GrammarError(
            f"structured_outputs: the grammar is too deep or too large for its compiler, which failed ({name})",
            field="structured_outputs",
            hint="make it simpler",
        )
