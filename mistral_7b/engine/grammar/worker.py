"""A worker process: compiles one grammar, and follows it for every completion constrained by it.

    engine's process                                   worker
    GrammarState --{"start": [], ...}----------------> compiles, if it is the first; creates a MatcherState
                 <-------------------{"cpu_seconds": 0.003}
                 --{"masks": [draft tokens]}---------->
                 <--{"drafted": [...]} and their masks--
                 --{"accept": [tokens]}-------------->
                 <----{"over": ...} and the next mask--

A native crash, unbounded memory or an endless loop affects this process only. Time is CPU time: the kernel ends
the process (SIGPROF) when one operation exceeds its limit, wherever that operation is stuck.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import selectors
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from ...errors import GrammarError
from ...sampling.params import StructuredOutputs
from ..config import GrammarLimits
from .matcher import CompiledGrammar, MatcherState
from .spec import GrammarSpec
from .vocabulary import Vocabulary

NICE = 19  # priority of an expensive worker, which must not slow down the model and other grammars
EXPENSIVE_SECONDS = 0.03  # CPU seconds of one operation from which a worker is expensive
NEVER_EXPENSIVE = 3600.0  # for the fork server, whose children would inherit the lowered priority
IDLE_DELAY = 0.02  # seconds without work before a worker warms up, so as not to compete with busy ones
LENGTH = struct.Struct("<q")  # length prefix of the specification


@dataclass
class CpuUsage:
    """The CPU seconds that a request has used, over all its completions."""

    cpu_seconds: float


class Worker:
    """Compiles and follows one grammar. `run` returns when no completion needs it any more."""

    def __init__(
        self, vocabulary: Vocabulary, control: socket.socket, expensive: float = EXPENSIVE_SECONDS
    ) -> None:
        self.vocabulary, self.control, self.expensive = vocabulary, control, expensive
        (size,) = LENGTH.unpack(_recv_exactly(control, LENGTH.size))
        text, self.leading_space, limits = json.loads(_recv_exactly(control, size))
        self.spec, self.limits = text, GrammarLimits(**limits)
        self._compiled: CompiledGrammar | GrammarError | None = None
        self._states: dict[Connection, tuple[MatcherState, CpuUsage]] = {}
        self._usages: dict[str, CpuUsage] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the engine has closed `control` and every connection."""
        while self._selector.get_map():
            for key, _ in self._selector.select():
                if key.fileobj is self.control:
                    self._accept_connection()
                else:
                    self._handle_message(key.data)

    def _accept_connection(self) -> None:
        """Accept a new connection, or unregister `control` at its end."""
        message, fds, _, _ = socket.recv_fds(self.control, 1, 1)
        for fd in fds:
            self._selector.register(fd, selectors.EVENT_READ, Connection(fd))
        if not message:
            self._selector.unregister(self.control)

    def _handle_message(self, connection: Connection) -> None:
        """Reply to one message."""
        try:
            message = json.loads(connection.recv_bytes())
            connection.send_bytes(self._answer(connection, message))
        except (EOFError, OSError):  # the completion ended
            self._selector.unregister(connection.fileno())
            self._states.pop(connection, None)
            connection.close()
            held = {id(usage) for _, usage in self._states.values()}
            self._usages = {name: a for name, a in self._usages.items() if id(a) in held}

    def _answer(self, connection: Connection, message: dict[str, Any]) -> bytes:
        try:
            if "start" in message:
                return self._start(connection, message)
            if connection not in self._states:  # "start" failed, and the error was sent
                return _error_reply(GrammarError("not started"))
            state, usage = self._states[connection]
            with self._charge(usage):
                header: dict[str, Any] = {}
                if "accept" in message:
                    for token in message["accept"]:
                        state.accept(token)
                    header["over"] = header["finished"] = state.finished
                masks, drafted = state.masks(message.get("masks", ()))
            header = {"finished": state.finished, **header, "drafted": drafted, "cpu_seconds": usage.cpu_seconds}
            return json.dumps(header).encode() + b"\n" + b"".join(m.tobytes() for m in masks)
        except GrammarError as e:
            return _error_reply(e)
        except (MemoryError, RecursionError) as e:
            return _error_reply(
                GrammarError(f"structured_outputs: too deep or too large: {e!r}", field="structured_outputs")
            )

    def _start(self, connection: Connection, message: dict[str, Any]) -> bytes:
        """Create the state of a completion that already consists of the tokens in "start"."""
        if self._compiled is None:
            try:
                with _cpu_limit(self.limits.compile_seconds), _lower_priority_after(self.expensive):
                    text = GrammarSpec.from_json(self.spec).lark(self.leading_space)
                    self._compiled = CompiledGrammar(self.vocabulary, text)
            except GrammarError as e:
                self._compiled = e
        if isinstance(self._compiled, GrammarError):
            raise self._compiled
        usage = self._usages.setdefault(message["request"], CpuUsage(message["cpu_seconds"]))
        state = self._compiled.start(at_start=not self.leading_space)
        self._states[connection] = state, usage
        with self._charge(usage):
            for place, token in enumerate(message["start"]):
                if not state.allows(token):
                    return json.dumps({"rejected": place}).encode()
                state.accept(token)
        return json.dumps({"finished": state.finished, "cpu_seconds": usage.cpu_seconds}).encode()

    @contextlib.contextmanager
    def _charge(self, usage: CpuUsage) -> Iterator[None]:
        """Charge CPU time to a request. Raises GrammarError if its limit is used up."""
        left = self.limits.request_seconds - usage.cpu_seconds
        if left <= 0:
            raise GrammarError(
                f"structured_outputs: the grammar has used up the {self.limits.request_seconds:g} s of CPU time "
                "that one request is allowed",
                field="structured_outputs",
                hint="simplify the grammar, or make it less ambiguous",
            )
        began = time.process_time()
        try:
            with _cpu_limit(min(left, self.limits.mask_seconds)):
                yield
        finally:
            took = time.process_time() - began
            usage.cpu_seconds += took
            if took > self.expensive:
                _lower_priority()


def _error_reply(error: GrammarError) -> bytes:
    """The reply that makes the engine's process raise this error."""
    return json.dumps({"error": error.data}).encode()


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Have the kernel end the process (SIGPROF) if the body takes more CPU time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _lower_priority() -> None:
    """Lower this process's priority for good."""
    os.setpriority(os.PRIO_PROCESS, os.getpid(), NICE)


@contextlib.contextmanager
def _lower_priority_after(seconds: float) -> Iterator[None]:
    """Lower the priority if the body takes longer; a thread can, as llguidance releases the GIL."""
    timer = threading.Timer(seconds, _lower_priority)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _recv_exactly(sock: socket.socket, n: int) -> bytes:
    """The next n bytes. Raises EOFError at the end of the stream."""
    parts, left = [], n
    while left:
        part = sock.recv(min(left, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def warm_up(vocabulary: Vocabulary) -> None:
    """Compile and follow a small grammar, so that first-use costs and page faults are paid in advance."""
    schema = {"properties": {"a": {"type": "integer"}, "b": {"enum": ["c"]}}}
    key = json.dumps(
        [GrammarSpec(StructuredOutputs(json=schema)).to_json(), True, asdict(GrammarLimits())]
    ).encode()
    (control, ours), (its, connection) = socket.socketpair(), socket.socketpair()
    with control, ours, connection:
        ours.sendall(LENGTH.pack(len(key)) + key)
        with its:
            socket.send_fds(ours, [b"c"], [its.fileno()])
        with Connection(os.dup(connection.fileno())) as engine:
            engine.send_bytes(json.dumps({"start": [], "request": "", "cpu_seconds": 0.0}).encode())
            engine.send_bytes(json.dumps({"masks": []}).encode())
        ours.shutdown(socket.SHUT_WR)  # all messages are queued; `run` returns after the replies
        connection.shutdown(socket.SHUT_WR)
        Worker(vocabulary, control, expensive=NEVER_EXPENSIVE).run()


def serve(vocabulary: Vocabulary, control: socket.socket) -> None:
    """Run a worker in a forked process; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not select.select([control], [], [], IDLE_DELAY)[
            0
        ]:  # half of the first compilation's time is page faults
            warm_up(vocabulary)
        worker = Worker(vocabulary, control)
        resource.setrlimit(resource.RLIMIT_AS, (worker.limits.memory_bytes,) * 2)
        worker.run()
        status = 0
    except EOFError:  # the engine ended before it sent a specification
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
