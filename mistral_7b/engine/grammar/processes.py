"""Starts, queries and ends the processes that follow grammars, from the engine's process.

ForkServer       the process that forks the workers (forkserver.py)
GrammarProcess   one worker (worker.py): a grammar, and the completions constrained by it
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

REPLY_TIMEOUT = 10.0  # seconds that the fork server has to reply
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from mistral_7b.engine.grammar.forkserver import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


@contextlib.contextmanager
def start_errors() -> Iterator[None]:
    """Turn OSError into ProcessError with the system's reason, such as no files or memory left.

    A ConnectionError means that a process has ended; it is raised unchanged.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as e:
        raise ProcessError(
            f"no process could be started to follow a grammar: {e.strerror or e}",
            hint="raise this process's limits (ulimit -n for files), or send fewer requests at once",
        ) from e


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


class ForkServer:
    """The process that forks the workers. Restarted if it was killed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        with start_errors():
            self._socket = self._open()

    def _open(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with _closed_on_error(ours), theirs, tempfile.TemporaryFile() as file:
            pickle.dump(self._vocabulary, file)
            file.seek(0)
            fds = (theirs.fileno(), file.fileno())
            # A session of its own: Ctrl-C in the terminal reaches the engine alone, and this process ends with it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), *map(str, fds)], pass_fds=fds,
                stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        ours.settimeout(REPLY_TIMEOUT)
        return ours

    def fork(self) -> tuple[socket.socket, int]:
        """A new worker: its control socket and pid. Raises ProcessError or OSError if there is none."""
        pid, fds = self._request(b"f", 0)
        if not fds:  # the kernel dropped the descriptor for want of a free one; the worker ends
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        control = socket.socket(fileno=fds[0])
        control.settimeout(REPLY_TIMEOUT)
        return control, pid

    def status(self, pid: int) -> int | None:
        """The wait status of a worker that has ended (os.waitpid); None if it is unknown or still runs."""
        try:
            status, _ = self._request(b"w", pid)
        except (EngineError, OSError):
            return None
        return None if status == ALIVE else status

    def signal(self, kind: bytes, pid: int) -> None:
        """Send a worker one of forkserver.SIGNALS; no effect if it has ended."""
        with contextlib.suppress(EngineError, OSError):
            self._request(kind, pid)

    def _request(self, kind: bytes, value: int) -> tuple[int, list[int]]:
        """The server's reply, a number and file descriptors. Raises ProcessError or OSError without a server."""
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
                if kind != b"f":  # the new server does not know the old one's workers
                    break
        raise ProcessError(
            "the fork server for grammar processes could not be started", hint="see its output on stderr"
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
    """A worker and its grammar. Raises OSError if the system has no files or processes left."""

    def __init__(self, server: ForkServer, key: str) -> None:
        self._server, self.terminated = server, False
        self._status: int | None = None
        self.requests: set[str] = set()  # that have used it; at most two are recorded
        self.states: WeakSet[GrammarState] = WeakSet()  # that use it
        self.waiting_states: WeakSet[GrammarState] = WeakSet()  # those that wait for it to compile
        self.turn_started = 0.0  # when it started to compile, or was suspended
        self.last_used = 0.0
        self.end_reason: EngineError | None = None  # set by `kill`; its states are not at fault
        self._control, self._pid = server.fork()
        data = key.encode()
        self._control.sendall(LENGTH.pack(len(data)) + data)

    def connect(self, request: str) -> Connection:
        """A connection for one completion. Raises ConnectionError if the process has ended."""
        if len(self.requests) < 2:
            self.requests.add(request)
        ours, theirs = socket.socketpair()
        with _closed_on_error(ours), theirs:
            socket.send_fds(self._control, [b"c"], [theirs.fileno()])
        return Connection(ours.detach())

    def suspend(self) -> None:
        """Suspend it (SIGSTOP)."""
        self._server.signal(b"s", self._pid)

    def resume(self) -> None:
        """Resume it (SIGCONT)."""
        self._server.signal(b"c", self._pid)

    def kill(self, why: EngineError) -> None:
        """End it at once (SIGKILL); `why` is raised for the states that wait for it to compile."""
        self.terminated, self.end_reason = True, why
        self._server.signal(b"k", self._pid)

    def close(self) -> None:
        """Accept no more completions; the process ends when its last completion does."""
        self._control.close()

    def exit_signal(self) -> int:
        """The number of the signal that ended it; 0 if none did, or it is unknown."""
        if self._status is None:
            self._status = self._server.status(self._pid)
        return os.WTERMSIG(self._status) if self._status is not None and os.WIFSIGNALED(self._status) else 0

    def failure(self, limits: GrammarLimits) -> GrammarError:
        """The error that tells the user why the process ended."""
        number = self.exit_signal()
        if number == signal.SIGPROF:
            return GrammarError(
                f"structured_outputs: the grammar takes more CPU time than allowed ({limits.compile_seconds:g} s "
                f"to compile, {limits.mask_seconds:g} s for a token, {limits.request_seconds:g} s for a request)",
                field="structured_outputs",
                hint="simplify the grammar, or make it less ambiguous",
            )
        name = signal.Signals(number).name if number else f"status {self._status}"
        return GrammarError(
            f"structured_outputs: the grammar is too deep or too large for its compiler, which failed ({name})",
            field="structured_outputs",
            hint="simplify the grammar",
        )
