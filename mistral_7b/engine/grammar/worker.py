"""A worker process: one grammar, compiled and followed for every completion that must obey it.

    engine's process                                   worker
    GrammarState --{"start": [], ...}----------------> compiles, if it is the first; a MatcherState
                 <-------------------{"spent": 0.003}
                 --{"masks": [draft tokens]}---------->
                 <--{"drafted": [...]} and their masks--
                 --{"accept": [tokens]}-------------->
                 <----{"over": ...} and the next mask--

A native crash, memory without bound and time without end cost this process, and no other. Time is the CPU's: the
kernel ends the process when one operation has used up what it may (SIGPROF), wherever that operation is stuck.
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

NICE = 19  # of a worker that is expensive, so that it does not slow down the model and the other grammars
EXPENSIVE = 0.03  # seconds of one operation
NEVER = 3600.0  # seconds, for a process whose priority is also that of those forked from it
QUIET = 0.02  # seconds without work after which a worker rehearses: those it was forked beside are busy
LENGTH = struct.Struct("<q")  # before the specification


@dataclass
class Account:
    """CPU seconds that a request has used here, over all its completions."""

    spent: float


class Worker:
    """Follows one grammar. `run` returns when no completion needs it any more."""

    def __init__(self, vocabulary: Vocabulary, control: socket.socket, expensive: float = EXPENSIVE) -> None:
        self.vocabulary, self.control, self.expensive = vocabulary, control, expensive
        (size,) = LENGTH.unpack(_exactly(control, LENGTH.size))
        text, self.spaced, limits = json.loads(_exactly(control, size))
        self.spec, self.limits = text, GrammarLimits(**limits)
        self._compiled: CompiledGrammar | GrammarError | None = None
        self._states: dict[Connection, tuple[MatcherState, Account]] = {}
        self._accounts: dict[str, Account] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def run(self) -> None:
        """Answer until the engine has closed `control` and every connection."""
        while self._selector.get_map():
            for key, _ in self._selector.select():
                if key.fileobj is self.control:
                    self._meet()
                else:
                    self._hear(key.data)

    def _meet(self) -> None:
        """Take a new connection; at the end of `control` there will be no more."""
        message, fds, _, _ = socket.recv_fds(self.control, 1, 1)
        for fd in fds:
            self._selector.register(fd, selectors.EVENT_READ, Connection(fd))
        if not message:
            self._selector.unregister(self.control)

    def _hear(self, connection: Connection) -> None:
        """Answer one message."""
        try:
            question = json.loads(connection.recv_bytes())
            connection.send_bytes(self._answer(connection, question))
        except (EOFError, OSError):  # the completion is over
            self._selector.unregister(connection.fileno())
            self._states.pop(connection, None)
            connection.close()
            held = {id(account) for _, account in self._states.values()}
            self._accounts = {name: a for name, a in self._accounts.items() if id(a) in held}

    def _answer(self, connection: Connection, question: dict[str, Any]) -> bytes:
        try:
            if "start" in question:
                return self._start(connection, question)
            if connection not in self._states:  # its start has failed, and that was said
                return _told(GrammarError("not started"))
            state, account = self._states[connection]
            with self._charged(account):
                header: dict[str, Any] = {}
                if "accept" in question:
                    for token in question["accept"]:
                        state.accept(token)
                    header["over"] = header["finished"] = state.finished
                masks, drafted = state.masks(question.get("masks", ()))
            header = {"finished": state.finished, **header, "drafted": drafted, "spent": account.spent}
            return json.dumps(header).encode() + b"\n" + b"".join(m.tobytes() for m in masks)
        except GrammarError as e:
            return _told(e)
        except (MemoryError, RecursionError) as e:
            return _told(
                GrammarError(f"structured_outputs: too deep or too large: {e!r}", field="structured_outputs")
            )

    def _start(self, connection: Connection, question: dict[str, Any]) -> bytes:
        """A state for a completion that has taken the tokens `start` already."""
        if self._compiled is None:
            try:
                with _limited(self.limits.compile_seconds), _lowered_after(self.expensive):
                    text = GrammarSpec.from_json(self.spec).lark(self.spaced)
                    self._compiled = CompiledGrammar(self.vocabulary, text)
            except GrammarError as e:
                self._compiled = e
        if isinstance(self._compiled, GrammarError):
            raise self._compiled
        account = self._accounts.setdefault(question["request"], Account(question["spent"]))
        state = self._compiled.start(at_start=not self.spaced)
        self._states[connection] = state, account
        with self._charged(account):
            for place, token in enumerate(question["start"]):
                if not state.allows(token):
                    return json.dumps({"refused": place}).encode()
                state.accept(token)
        return json.dumps({"finished": state.finished, "spent": account.spent}).encode()

    @contextlib.contextmanager
    def _charged(self, account: Account) -> Iterator[None]:
        """CPU time on the account of a request. GrammarError where nothing is left on it."""
        left = self.limits.request_seconds - account.spent
        if left <= 0:
            raise GrammarError(
                f"structured_outputs: the grammar has used up the {self.limits.request_seconds:g} s of CPU time "
                "that one request may take",
                field="structured_outputs",
                hint="make it simpler, or less ambiguous",
            )
        began = time.process_time()
        try:
            with _limited(min(left, self.limits.mask_seconds)):
                yield
        finally:
            took = time.process_time() - began
            account.spent += took
            if took > self.expensive:
                _lower()


def _told(error: GrammarError) -> bytes:
    """The answer that makes the engine's process raise this error."""
    return json.dumps({"error": error.data}).encode()


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """End the process (SIGPROF) if what is done here takes more CPU time than this."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _lower() -> None:
    """Let other processes go first from now on."""
    os.setpriority(os.PRIO_PROCESS, os.getpid(), NICE)


@contextlib.contextmanager
def _lowered_after(seconds: float) -> Iterator[None]:
    """`_lower` if what is done here takes longer: its native code runs without Python's lock."""
    timer = threading.Timer(seconds, _lower)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exactly(sock: socket.socket, n: int) -> bytes:
    """The next n bytes. EOFError if there are no more."""
    parts, left = [], n
    while left:
        part = sock.recv(min(left, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def rehearse(vocabulary: Vocabulary) -> None:
    """Follow a grammar for a moment: what a first use makes is made, and its memory is this process's own."""
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
            engine.send_bytes(json.dumps({"start": [], "request": "", "spent": 0.0}).encode())
            engine.send_bytes(json.dumps({"masks": []}).encode())
        ours.shutdown(socket.SHUT_WR)  # all that it will be asked waits for it: it returns when it has answered
        connection.shutdown(socket.SHUT_WR)
        Worker(vocabulary, control, expensive=NEVER).run()


def serve(vocabulary: Vocabulary, control: socket.socket) -> None:
    """What a forked process does: it never returns."""
    status = 1
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not select.select([control], [], [], QUIET)[0]:  # half of a first compilation is page faults
            rehearse(vocabulary)
        worker = Worker(vocabulary, control)
        resource.setrlimit(resource.RLIMIT_AS, (worker.limits.memory_bytes,) * 2)
        worker.run()
        status = 0
    except EOFError:  # the engine has gone before it said what it wants
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
