"""Grammars as the engine sees them: each is followed in a process of its own (worker.py).

    grammars = Grammars(tokenizer, vocab_size)
    state = grammars.start(spec, prompt_ids)       compiled and at its start, or GrammarError
    state.ask(draft)                               asked for, while the model computes
    if state.wait(0.01):                           or it is late, and asked again later
        state.answer                               masks of the next tokens

Completions with equal specifications share a process. One that ends by a crash or at a limit takes with it the
states of all of them; each begins again in a new process, from its tokens, to the same masks. Only those for which
something was being computed can be to blame: their requests get processes of their own, and the one whose process
ends again is ended with the reason.
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
from .processes import ForkServer, GrammarProcess, starting
from .spec import GrammarSpec
from .turns import LOOK, Gone, Turns, check
from .vocabulary import Vocabulary, library

KEPT = 32  # processes that wait for the next request with their grammar; some 2 MB each, up to tens
MOST = 96  # processes in all: beyond these the one longest unused ends, and what needs it begins again in another
PATIENCE = 60.0  # seconds that an answer may take by the clock, on however busy a machine
_unnamed = itertools.count()


class Grammars:
    """The grammars of one tokenizer, compiled once each and kept; the one longest unused leaves first.

    May be used from several threads. `vocab_size` is the model's, which may exceed the tokenizer's. There are
    `most` processes at once, which must be more than are `kept` and completions that run; turns.py says how many
    compile.
    Raises GrammarError if llguidance is not installed, ProcessError if no process can be started.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, limits: GrammarLimits | None = None, kept: int = KEPT,
        most: int = MOST,
    ) -> None:  # fmt: skip
        library()
        self.limits, self._kept, self._most = limits or GrammarLimits(), kept, most
        self._vocabulary = Vocabulary(tokenizer, vocab_size)
        self._server = ForkServer(self._vocabulary)
        self._processes: OrderedDict[tuple[str, str], GrammarProcess] = OrderedDict()
        self._alive: WeakSet[GrammarProcess] = WeakSet()
        self.turns = Turns(_cpus())

    def start(
        self,
        spec: GrammarSpec | StructuredOutputs,
        after: Sequence[int],
        begun: Sequence[int] = (),
        request: str = "",
        gone: Gone = None,
    ) -> GrammarState:
        """The state of a completion that follows upon the ids `after` and has taken `begun` already.

        `request` names what CPU time is charged to. Raises GrammarError, with the reason, for a grammar that is
        malformed, too large, obeyed by no text, or does not allow `begun`; QueueFullError where too many are being
        compiled; ProcessError where no process can be started; AbandonedError within a moment when `gone` is set.
        """
        if isinstance(spec, StructuredOutputs):
            spec = GrammarSpec(spec)
        at_start = not after or not self._vocabulary.has_text(after[-1])  # as Tokenizer.stream has it
        key = json.dumps([spec.to_json(), not at_start, asdict(self.limits)])
        return GrammarState(self, key, list(begun), request or f"unnamed {next(_unnamed)}", gone)

    def process(self, key: str, alone: str = "") -> GrammarProcess:
        """The process of a grammar that has been compiled before; with `alone`, a request's own."""
        with self.turns.changed:
            return self._known(key, alone) or self._begin(key, alone)

    def first_process(self, key: str, alone: str, state: GrammarState, gone: Gone) -> GrammarProcess:
        """The same for one that is perhaps yet to be compiled: in turn. Call `leave` afterwards."""
        with self.turns.changed:
            process = self.turns.wait(lambda: self._known(key, alone), gone)
            if process is None:
                process = self._begin(key, alone)
                self.turns.began(process)
            process.starting.add(state)
            return process

    def leave(self, process: GrammarProcess, state: GrammarState, answered: bool) -> None:
        """One of those that wait for it to be compiled has its answer, or gives up: the last such one ends it."""
        with self.turns.changed:
            process.starting.discard(state)
            if not answered and not process.starting and self.turns.compiles(process):
                process.end(EngineError("no request waits for it any more"))
            if answered or process.over:
                self.turns.done(process)

    def tend(self, process: GrammarProcess) -> None:
        """It compiles, and is waited for: let it do so in turn."""
        with self.turns.changed:
            self.turns.tend(process)

    def _known(self, key: str, alone: str) -> GrammarProcess | None:
        process = self._processes.get((key, alone))
        if process is None or process.over:
            return None
        self._processes.move_to_end((key, alone))  # used just now
        return process

    def _begin(self, key: str, alone: str) -> GrammarProcess:
        self._make_room()
        process = GrammarProcess(self._server, key)
        self._alive.add(process)
        self._processes.pop((key, alone), None)
        self._processes[key, alone] = process
        while len(self._processes) > self._kept:  # it runs until its last completion has ended
            self._processes.popitem(last=False)[1].close()
        return process

    def _make_room(self) -> None:
        """End those longest unused where there are too many; first those that no completion uses."""
        alive = [process for process in self._alive if not process.over and not self.turns.compiles(process)]
        alive.sort(key=lambda process: (len(process.states) > 0, process.used))
        for process in alive[: max(0, len(alive) + 1 - self._most)]:
            process.end(EngineError("there were too many processes that follow grammars"))

    @property
    def words(self) -> int:
        """Numbers of 32 bits in a mask."""
        return self._vocabulary.words


def _cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_for_any(states: Sequence[GrammarState], timeout: float) -> None:
    """Return when one of the answers is there that these wait for, or after so many seconds."""
    wait([state._connection for state in states], timeout)


@dataclass(frozen=True)
class Masks:
    """Masks of the next token and after each allowed draft token; `over`: whether the text is, after that one."""

    masks: list[np.ndarray]
    over: list[bool]


class GrammarState:
    """Where one completion stands in its grammar. One question at a time: `ask` or `take`, then `wait`."""

    def __init__(self, grammars: Grammars, key: str, begun: list[int], request: str, gone: Gone = None) -> None:
        self._grammars, self._key, self._request = grammars, key, request
        self._tokens = begun  # all that it has taken
        self._spent = 0.0  # CPU seconds, of its request
        self._alone = False  # whether the process is its request's own
        self._question: dict[str, Any] = {}  # the newest; the first is to start
        self.late = True  # whether it has no answer yet
        self.finished = False  # whether nothing may follow but EOS
        self.over = False  # whether that was known when it took its last token: the text ends without EOS
        self.answer: Masks | None = None  # what may come next, as far as it is known
        self._asked = time.monotonic()
        self._first = True  # whether its grammar may yet have to be compiled
        self._answered = False  # whether the process has answered at all
        self._gone = gone
        self._begin()

    def _begin(self) -> None:
        """Wait until the grammar is compiled. Raises as Grammars.start."""
        self._open()
        try:
            while not self.wait(LOOK):
                check(self._gone)
                self._grammars.tend(self._process)
        finally:
            self._grammars.leave(self._process, self, self._answered)
        self._first, self._gone = False, None

    def ask(self, draft: Sequence[int] = ()) -> None:
        """Ask for the masks of the next token and of those after each token of a draft."""
        self._put({"masks": [int(token) for token in draft]})

    def take(self, tokens: Sequence[int]) -> None:
        """Take the next tokens, which must be allowed."""
        taken = [int(token) for token in tokens]  # numpy's are no JSON
        self._tokens += taken
        self.answer = None
        self._put({"accept": taken})

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the answer is there, after so many seconds at most. GrammarError as `masks` and `accept`."""
        last = self._asked + PATIENCE
        end = last if timeout is None else time.monotonic() + timeout
        while self.late:
            try:
                if not self._connection.poll(max(0.0, end - time.monotonic())):
                    if time.monotonic() >= last:
                        raise GrammarError(
                            f"structured_outputs: the grammar gave no answer in {PATIENCE:g} s",
                            field="structured_outputs",
                        )
                    return False
                reply = self._connection.recv_bytes()
            except (EOFError, ConnectionError):
                self._begin_again(to_blame=True)
            else:
                self._read(reply)
        return True

    def masks(self, draft: Sequence[int] = ()) -> tuple[list[np.ndarray], int]:
        """`ask` and its answer: masks, and how many tokens of the draft are allowed.

        Raises GrammarError where the grammar exceeds its limits or comes to a dead end.
        """
        self.ask(draft)
        self.wait()
        assert self.answer is not None
        return self.answer.masks, len(self.answer.over)

    def accept(self, token: int) -> None:
        """`take` one token, and its answer. Raises GrammarError for one that is not allowed, and as `masks`."""
        self.take([token])
        self.wait()

    # ------------------------------------------------------------------ the connection

    def _open(self) -> None:
        """Begin, or begin again, in a process that is there or a new one."""
        alone = self._request if self._alone else ""
        for attempt in range(2):
            with starting():
                if self._first:
                    self._process = self._grammars.first_process(self._key, alone, self, self._gone)
                else:
                    self._process = self._grammars.process(self._key, alone)
            try:
                with starting():
                    self._connect()
                return
            except ConnectionError:  # it has ended just now
                self._process.over = True
                if attempt:
                    raise self._process.why(self._grammars.limits) from None
            except ProcessError:
                self._grammars.leave(self._process, self, answered=False)
                raise

    def _connect(self) -> None:
        """Begin in this process."""
        self._connection = self._process.connect(self._request)
        self._process.states.add(self)
        self._process.used = time.monotonic()
        if self._first:
            self._asked = self._process.used
        self._send({"start": self._tokens, "request": self._request, "spent": self._spent})
        self._started = self._answered = False

    def _begin_again(self, to_blame: bool) -> None:
        """The process has ended: begin in another, and ask again what has no answer."""
        self._process.over = True
        if (why := self._process.ended) is not None:
            to_blame = False
            if self._first:
                raise type(why).of(why)
        if to_blame and (
            self._alone
            or (self._process.requests == {self._request} and self._process.ended_by() == signal.SIGPROF)
        ):
            raise self._process.why(self._grammars.limits)
        self._alone = self._alone or to_blame
        if "accept" in self._question:
            self._question = {"accept": []}  # they are among those that it starts with
        self._open()
        if self.late and self._question:
            self._connection.send_bytes(json.dumps(self._question).encode())

    def _put(self, question: dict[str, Any]) -> None:
        assert not self.late, "one question at a time"
        self._question, self.late, self._asked = question, True, time.monotonic()
        self._process.used = self._asked
        try:
            self._send(question)
        except ConnectionError:
            self._begin_again(to_blame=False)

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def _read(self, reply: bytes) -> None:
        """Take a reply. GrammarError if that is what it says."""
        self._answered = True
        head, _, rest = reply.partition(b"\n")
        header = json.loads(head)
        if "error" in header:
            raise GrammarError(**header["error"])
        if "refused" in header:
            raise GrammarError(
                "the answer begins with what structured_outputs do not allow",
                field="structured_outputs",
                hint="change the beginning, or leave one of the two out",
            )
        self._spent, self.finished = header["spent"], header["finished"]
        if not self._started:
            self._started = True
            if self._question:
                return
        else:
            table = np.frombuffer(rest, dtype=np.int32).reshape(-1, self._grammars.words)
            self.answer = Masks(list(table), header["drafted"])
            self.over = header.get("over", self.over)
        self.late = False
