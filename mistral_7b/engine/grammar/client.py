"""The engine's interface to grammars, each of which is followed in a process of its own (worker.py).

    grammars = Grammars(tokenizer, vocab_size)
    state = grammars.start(spec, prompt_ids)       compiled, or GrammarError
    state.ask(draft)                               requests masks, which are computed during the forward pass
    if state.wait(0.01):                           False if they are late; wait again later
        state.answer                               masks of the next tokens

Completions with equal specifications share a process. When a process crashes or exceeds a limit, all its states
are lost; each is rebuilt in a new process from its tokens, and yields the same masks. Only states with a pending
message are suspected of the failure: their requests get processes of their own, and a request whose own process
fails as well ends with the reason.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from typing import Any
from weakref import WeakSet

import numpy as np

from ...errors import EngineError, GrammarError, ProcessError
from ...sampling.params import StructuredOutputs
from ...text.tokenizer import Tokenizer
from ..config import GrammarLimits
from .compile_queue import POLL_INTERVAL, CompileQueue, Disconnected, raise_if_disconnected
from .processes import ForkServer, GrammarProcess, start_errors
from .spec import GrammarSpec
from .vocabulary import Vocabulary, import_llguidance

MAX_IDLE = 32  # processes kept for the next request with their grammar; 2 MB each, up to tens
MAX_PROCESSES = 96  # beyond it the least recently used process ends; its states restart in others when needed
ANSWER_TIMEOUT = 60.0  # wall-clock seconds until an answer counts as lost, even on a busy machine
_unnamed = itertools.count()


class Grammars:
    """The compiled grammars of one tokenizer, cached by specification in least-recently-used order.

    Thread-safe. `ends` are the ids that may end a text; None: those of the tokenizer. `vocab_size` is the model's,
    which may exceed the tokenizer's. `max_processes` must exceed `max_idle` plus the number of running
    completions. compile_queue.py limits how many compile at once. Raises GrammarError if llguidance is not
    installed, ProcessError if no process can be started.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, limits: GrammarLimits | None = None, max_idle: int = MAX_IDLE,
        max_processes: int = MAX_PROCESSES, ends: frozenset[int] | None = None,
    ) -> None:  # fmt: skip
        import_llguidance()
        self.limits, self._max_idle, self._max_processes = limits or GrammarLimits(), max_idle, max_processes
        self._vocabulary = Vocabulary(tokenizer, vocab_size, ends)
        self._server = ForkServer(self._vocabulary)
        self._processes: OrderedDict[tuple[str, str], GrammarProcess] = OrderedDict()
        self._alive: WeakSet[GrammarProcess] = WeakSet()
        self.compile_queue = CompileQueue(_cpus())

    def start(
        self,
        spec: GrammarSpec | StructuredOutputs,
        after: Sequence[int],
        begun: Sequence[int] = (),
        request: str = "",
        disconnected: Disconnected = None,
    ) -> GrammarState:
        """The state of a completion that follows the token ids `after` and already consists of `begun`.

        `request` is the id that CPU time is charged to. Raises GrammarError, with the reason, for a grammar that
        is malformed, too large, satisfied by no text, or rejects `begun`; QueueFullError if too many are being
        compiled; ProcessError if no process can be started; AbandonedError soon after `disconnected` is set.
        """
        if isinstance(spec, StructuredOutputs):
            spec = GrammarSpec(spec)
        at_start = not after or not self._vocabulary.has_text(after[-1])  # as Tokenizer.stream has it
        key = json.dumps([spec.to_json(), not at_start, asdict(self.limits)])
        return GrammarState(self, key, list(begun), request or f"unnamed {next(_unnamed)}", disconnected)

    def process(self, key: str, dedicated: str = "") -> GrammarProcess:
        """The process of a grammar that has compiled before; `dedicated` is the request it is reserved for."""
        with self.compile_queue.changed:
            return self._find(key, dedicated) or self._start_process(key, dedicated)

    def process_to_compile(
        self, key: str, dedicated: str, state: GrammarState, disconnected: Disconnected
    ) -> GrammarProcess:
        """As `process`, for a grammar that may have to be compiled: waits its turn. Call `release` afterwards."""
        with self.compile_queue.changed:
            process = self.compile_queue.wait_for_turn(lambda: self._find(key, dedicated), disconnected)
            if process is None:
                process = self._start_process(key, dedicated)
                self.compile_queue.add(process)
            process.waiting_states.add(state)
            return process

    def release(self, process: GrammarProcess, state: GrammarState, answered: bool) -> None:
        """Stop waiting for a process to compile. When the last waiting state gives up, the process ends."""
        with self.compile_queue.changed:
            process.waiting_states.discard(state)
            if not answered and not process.waiting_states and self.compile_queue.is_compiling(process):
                process.kill(EngineError("no request waits for the grammar any more"))
            if answered or process.terminated:
                self.compile_queue.remove(process)

    def enforce_turn(self, process: GrammarProcess) -> None:
        """Suspend or end a compiling process that has used up its turn."""
        with self.compile_queue.changed:
            self.compile_queue.enforce_turn(process)

    def _find(self, key: str, dedicated: str) -> GrammarProcess | None:
        process = self._processes.get((key, dedicated))
        if process is None or process.terminated:
            return None
        self._processes.move_to_end((key, dedicated))
        return process

    def _start_process(self, key: str, dedicated: str) -> GrammarProcess:
        self._evict()
        process = GrammarProcess(self._server, key)
        self._alive.add(process)
        self._processes.pop((key, dedicated), None)
        self._processes[key, dedicated] = process
        while len(self._processes) > self._max_idle:  # a closed process runs until its last completion ends
            self._processes.popitem(last=False)[1].close()
        return process

    def _evict(self) -> None:
        """End the least recently used processes above the limit, those without completions first."""
        compiling = self.compile_queue.is_compiling
        alive = [process for process in self._alive if not process.terminated and not compiling(process)]
        alive.sort(key=lambda process: (len(process.states) > 0, process.last_used))
        for process in alive[: max(0, len(alive) + 1 - self._max_processes)]:
            process.kill(EngineError("there were too many grammar processes"))

    @property
    def mask_words(self) -> int:
        """The number of 32-bit words in a mask."""
        return self._vocabulary.mask_words


def _cpus() -> int:
    """The number of CPUs available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_for_any(states: Sequence[GrammarState], timeout: float) -> None:
    """Return when any state has a reply to read, or after `timeout` seconds."""
    wait([state._connection for state in states], timeout)


@dataclass(frozen=True)
class Masks:
    """Masks of the next token and of the token after each accepted draft token.

    `masks`: one more than accepted draft tokens, each (mask_words,) int32. `over`: for each accepted draft token,
    whether the text is complete after it.
    """

    masks: list[np.ndarray]
    over: list[bool]


class GrammarState:
    """The state of one completion in its grammar. One message at a time: `ask` or `take`, then `wait`."""

    def __init__(
        self, grammars: Grammars, key: str, begun: list[int], request: str, disconnected: Disconnected = None
    ) -> None:
        self._grammars, self._key, self._request = grammars, key, request
        self._tokens = begun  # all tokens of the completion so far
        self._cpu_seconds = 0.0  # used by the whole request
        self._dedicated = False  # whether the process is reserved for this request
        self._message: dict[str, Any] = {}  # the last one sent after "start"
        self.late = True  # whether the answer is outstanding
        self.finished = False  # whether only EOS may follow
        self.over = False  # whether that was known at the last accepted token: the text ends without EOS
        self.answer: Masks | None = None
        self._asked_at = time.monotonic()
        self._compiling = True  # until the grammar is known to be compiled
        self._answered = False  # whether this process has answered at all
        self._disconnected = disconnected
        self._wait_until_compiled()

    def _wait_until_compiled(self) -> None:
        """Connect to a process and wait until it has compiled the grammar. Raises as Grammars.start."""
        self._start()
        try:
            while not self.wait(POLL_INTERVAL):
                raise_if_disconnected(self._disconnected)
                self._grammars.enforce_turn(self._process)
        finally:
            self._grammars.release(self._process, self, self._answered)
        self._compiling, self._disconnected = False, None

    def ask(self, draft: Sequence[int] = ()) -> None:
        """Request the masks of the next token and of the token after each draft token."""
        self._send_next({"masks": [int(token) for token in draft]})

    def take(self, tokens: Sequence[int]) -> None:
        """Append the next tokens, which must be allowed."""
        taken = [int(token) for token in tokens]  # json does not encode numpy integers
        self._tokens += taken
        self.answer = None
        self._send_next({"accept": taken})

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the answer arrives within `timeout` seconds. Raises GrammarError as `masks` and `accept`."""
        last = self._asked_at + ANSWER_TIMEOUT
        end = last if timeout is None else time.monotonic() + timeout
        while self.late:
            try:
                if not self._connection.poll(max(0.0, end - time.monotonic())):
                    if time.monotonic() >= last:
                        raise GrammarError(
                            f"structured_outputs: the grammar gave no answer in {ANSWER_TIMEOUT:g} s",
                            field="structured_outputs",
                        )
                    return False
                reply = self._connection.recv_bytes()
            except (EOFError, ConnectionError):
                self._restart(suspected=True)
            else:
                self._handle_reply(reply)
        return True

    def masks(self, draft: Sequence[int] = ()) -> tuple[list[np.ndarray], int]:
        """Call `ask` and wait: the masks, and how many draft tokens are allowed.

        Raises GrammarError if the grammar exceeds its limits or reaches a dead end.
        """
        self.ask(draft)
        self.wait()
        assert self.answer is not None
        return self.answer.masks, len(self.answer.over)

    def accept(self, token: int) -> None:
        """Call `take` with one token and wait. Raises GrammarError as `masks`, and for a token not allowed."""
        self.take([token])
        self.wait()

    # ------------------------------------------------------------------ the connection

    def _start(self) -> None:
        """Start, or restart, in an existing or a new process."""
        dedicated = self._request if self._dedicated else ""
        for attempt in range(2):
            with start_errors():
                if self._compiling:
                    self._process = self._grammars.process_to_compile(
                        self._key, dedicated, self, self._disconnected
                    )
                else:
                    self._process = self._grammars.process(self._key, dedicated)
            try:
                with start_errors():
                    self._connect()
                return
            except ConnectionError:  # the process ended in the meantime
                self._process.terminated = True
                if attempt:
                    raise self._process.failure(self._grammars.limits) from None
            except ProcessError:
                self._grammars.release(self._process, self, answered=False)
                raise

    def _connect(self) -> None:
        """Open a connection to the process and send it the tokens so far."""
        self._connection = self._process.connect(self._request)
        self._process.states.add(self)
        self._process.last_used = time.monotonic()
        if self._compiling:
            self._asked_at = self._process.last_used
        self._send({"start": self._tokens, "request": self._request, "cpu_seconds": self._cpu_seconds})
        self._started = self._answered = False

    def _restart(self, suspected: bool) -> None:
        """Restart in another process after this one ended, and repeat the unanswered message.

        `suspected`: the process was computing for this state, so the grammar may have caused the failure.
        """
        self._process.terminated = True
        if (why := self._process.end_reason) is not None:
            suspected = False
            if self._compiling:
                raise type(why).of(why)
        if suspected and (
            self._dedicated
            or (self._process.requests == {self._request} and self._process.exit_signal() == signal.SIGPROF)
        ):
            raise self._process.failure(self._grammars.limits)
        self._dedicated = self._dedicated or suspected
        if "accept" in self._message:
            self._message = {"accept": []}  # "start" already contains these tokens
        self._start()
        if self.late and self._message:
            self._connection.send_bytes(json.dumps(self._message).encode())

    def _send_next(self, message: dict[str, Any]) -> None:
        assert not self.late, "one message at a time"
        self._message, self.late, self._asked_at = message, True, time.monotonic()
        self._process.last_used = self._asked_at
        try:
            self._send(message)
        except ConnectionError:
            self._restart(suspected=False)

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def _handle_reply(self, reply: bytes) -> None:
        """Process a reply. Raises the GrammarError that it reports."""
        self._answered = True
        head, _, rest = reply.partition(b"\n")
        header = json.loads(head)
        if "error" in header:
            raise GrammarError(**header["error"])
        if "rejected" in header:
            raise GrammarError(
                "the beginning of the answer is not allowed by structured_outputs",
                field="structured_outputs",
                hint="change the beginning of the answer, or omit one of the two",
            )
        self._cpu_seconds, self.finished = header["cpu_seconds"], header["finished"]
        if not self._started:
            self._started = True
            if self._message:
                return
        else:
            table = np.frombuffer(rest, dtype=np.int32).reshape(-1, self._grammars.mask_words)
            self.answer = Masks(list(table), header["drafted"])
            self.over = header.get("over", self.over)
        self.late = False
