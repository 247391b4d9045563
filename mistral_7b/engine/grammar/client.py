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
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from ...errors import GrammarError
from ...sampling_params import StructuredOutputs
from ...tokenizer import Tokenizer
from ..config import GrammarLimits
from .processes import ForkServer, GrammarProcess
from .spec import GrammarSpec
from .vocabulary import Vocabulary, library

KEPT = 32  # processes that wait for the next request with their grammar; some 2 MB each, up to tens
PATIENCE = 60.0  # seconds that an answer may take by the clock, on however busy a machine
_unnamed = itertools.count()


class Grammars:
    """The grammars of one tokenizer, compiled once each and kept; the one longest unused leaves first.

    May be used from several threads. `vocab_size` is the model's, which may exceed the tokenizer's.
    Raises GrammarError if llguidance is not installed.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, limits: GrammarLimits | None = None, kept: int = KEPT
    ) -> None:
        library()
        self.limits, self._kept = limits or GrammarLimits(), kept
        self._vocabulary = Vocabulary(tokenizer, vocab_size)
        self._server = ForkServer(self._vocabulary)
        self._processes: OrderedDict[tuple[str, str], GrammarProcess] = OrderedDict()
        self._lock = threading.Lock()

    def start(
        self,
        spec: GrammarSpec | StructuredOutputs,
        after: Sequence[int],
        begun: Sequence[int] = (),
        request: str = "",
    ) -> GrammarState:
        """The state of a completion that follows upon the ids `after` and has taken `begun` already.

        `request` names what CPU time is charged to. Raises GrammarError, with the reason, for a grammar that is
        malformed, too large, obeyed by no text, or does not allow `begun`.
        """
        if isinstance(spec, StructuredOutputs):
            spec = GrammarSpec(spec)
        at_start = not after or not self._vocabulary.has_text(after[-1])  # as Tokenizer.stream has it
        key = json.dumps([spec.to_json(), not at_start, asdict(self.limits)])
        return GrammarState(self, key, list(begun), request or f"unnamed {next(_unnamed)}")

    def process(self, key: str, alone: str = "") -> GrammarProcess:
        """The process of a grammar; with `alone`, a request's own."""
        with self._lock:
            process = self._processes.pop((key, alone), None)
            if process is None or process.over:
                process = GrammarProcess(self._server, key)
            self._processes[key, alone] = process  # the last one: used just now
            while len(self._processes) > self._kept:  # it runs until its last completion has ended
                self._processes.popitem(last=False)[1].close()
            return process

    @property
    def words(self) -> int:
        """Numbers of 32 bits in a mask."""
        return self._vocabulary.words


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

    def __init__(self, grammars: Grammars, key: str, begun: list[int], request: str) -> None:
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
        self._open()
        self.wait()

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
        for attempt in range(2):
            self._process = self._grammars.process(self._key, self._request if self._alone else "")
            try:
                self._connection = self._process.connect(self._request)
                self._send({"start": self._tokens, "request": self._request, "spent": self._spent})
            except ConnectionError:  # it has ended just now
                self._process.over = True
                if attempt:
                    raise self._process.why(self._grammars.limits) from None
            else:
                self._started = False
                return

    def _begin_again(self, to_blame: bool) -> None:
        """The process has ended: begin in another, and ask again what has no answer."""
        self._process.over = True
        sole = self._alone or (
            self._process.requests == {self._request} and self._process.ended_by() == signal.SIGPROF
        )
        if to_blame and sole:
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
        try:
            self._send(question)
        except ConnectionError:
            self._begin_again(to_blame=False)

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def _read(self, reply: bytes) -> None:
        """Take a reply. GrammarError if that is what it says."""
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
