"""The loop: plan, launch, read, hand out; once for each step.

    scheduler   who feeds which tokens            scheduler.py
    forward     packed tokens -> hidden (N, D)    forward.py, over a PagedBatch
    sample      rows that are a sequence's last   -> tokens, each by its own request's parameters and seed
    land        the tokens are read               flight.py; where the device works aside, those of the step before
    take        tokens to completions             text, stops, pages of those that have ended

Nothing here runs in another thread or waits for anyone: `step` does one step and returns. llm.py calls it until
all is done, async_llm.py for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..completion import TextPiece
from ..errors import AdapterError, EngineError, GenerationError, Mistral7BError, QueueFullError
from ..model import Mistral7B
from ..sampling import NOT_FINITE, put, sample_rows
from ..speculation import Speculation, StepTime
from .adapters import Adapters
from .config import EngineConfig
from .extras import Entry, entries_of, look
from .flight import Flight, Pick, Plan, feed, picks_of, row_of, waits
from .forward import forward_for
from .grammar.matcher import GrammarState
from .pages import PagePool
from .request import Request, SequenceState
from .scheduler import Counts, Scheduler


class Engine:
    """Many requests over one model. Requests are made by llm.py, which checks them; see there."""

    def __init__(self, model: Mistral7B, pool: PagePool, config: EngineConfig) -> None:
        self.model, self.pool, self.config = model, pool, config
        self.scheduler = Scheduler(pool, model.args.sliding_window, config)
        self.adapters = Adapters(model)
        self.requests: dict[str, Request] = {}  # those that have not ended
        self.time = StepTime()  # of decoding, measured
        self.device = pool.layers[0][0].device
        self.forward = forward_for(self.adapters, pool, config)
        self._flight: Flight | None = None  # launched, and not yet read
        self._arrivals = 0
        self._grammars = ThreadPoolExecutor(1, "grammar")  # masks are made while the model computes

    @property
    def counts(self) -> Counts:
        return self.scheduler.counts

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.requests

    def add(self, request: Request) -> None:
        """Let a request wait its turn. EngineError, and nothing changed, if it cannot ever be served."""
        if request.id in self.requests:
            raise EngineError(f"a request called {request.id!r} is running already: give each its own id")
        if not self.has_room:
            raise QueueFullError(
                f"{self.scheduler.waiting} requests are waiting, and no more may: try again later"
            )
        request.order = self._arrivals
        self.scheduler.add(request)
        self.requests[request.id] = request
        self._arrivals += 1

    @property
    def has_room(self) -> bool:
        """Whether one more request may wait."""
        most = self.config.max_waiting
        return most is None or self.scheduler.waiting < most

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Make a LoRA adapter known; AdapterError or CheckpointError says what is wrong with it."""
        self.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. AdapterError while requests use it."""
        users = sum(r.adapter == name for r in self.requests.values())
        if users:
            raise AdapterError(f"adapter {name!r} is in use by {users} requests: wait for them, or end them")
        self.adapters.unload(name)

    def abort(self, request_id: str) -> None:
        """End a request as it stands; nothing happens if it has ended."""
        if (request := self.requests.get(request_id)) is not None:
            self._finish(request, "abort")

    def give_up(self, request: Request) -> None:
        """End this request as it stands, and never another of its name; nothing happens if it is not here."""
        if self.requests.get(request.id) is request:
            self._finish(request, "abort")

    def fail(self, request: Request, error: Mistral7BError) -> None:
        """End a request with an error."""
        self._finish(request, "error", error=error)

    def close(self) -> None:
        """Let go of the thread that makes masks; nothing can be computed any more."""
        self._grammars.shutdown(wait=False)

    # ------------------------------------------------------------------ a step

    @torch.inference_mode()
    def step(self) -> None:
        """One step for whoever can be computed, if there is any.

        Where the device works aside its tokens are read in the next step, after that was launched: whoever ends
        by them is in the next one in vain.
        """
        began = time.perf_counter()
        self._guess()
        alone = self._flight is None
        plan = None if alone else self.scheduler.plan_without_loss()
        if plan is None:  # nobody loses his pages while a token of his is in flight; and some may give theirs back
            self._land()
            plan = self.scheduler.plan()
        ahead = self.forward.aside and not any(waits(s) for s, _ in plan)
        timed = alone and not ahead and all(s.decoding for s, _ in plan)
        try:
            flight = self._launch(plan, began if timed else None) if plan else None
        except Exception as e:
            self._land()
            self._fail(plan, e)
            return
        self._land()
        self._flight = flight
        if not ahead or all(s.ended for s, _ in plan):
            self._land()

    def _launch(self, plan: Plan, began: float | None) -> Flight:
        """The plan's tokens through the model, and what is sampled after them; nobody waits for it."""
        tokens = feed(plan, self._flight, self.device)  # (N,)
        rows, picks = picks_of(plan)
        masks = self._ask_for_masks(picks)
        hidden = self.forward.hidden(plan, tokens)  # (N, D)
        look(plan, hidden, self.forward)
        sampled, logits = tokens[:0], hidden[:0]
        if rows:
            logits = self.forward.logits(hidden, rows)
            if any(pick.row != i for i, pick in enumerate(picks)):
                logits = logits[put([pick.row for pick in picks], self.device)]
            found = {s: self._mask(s, mask) for s, mask in masks.items()}
            sampled = sample_rows(logits, [row_of(pick, found.get(pick.sequence)) for pick in picks])
        flight = Flight(plan, picks, sampled, logits, began)
        for s, n in plan:
            if not s.ended:  # or its grammar failed, and it has no pages any more
                self.scheduler.advance(s, n - len(s.draft))
        for s in flight.sampled:
            s.flying += 1
        self.counts.steps += 1
        self.counts.computed_tokens += len(tokens)
        return flight

    def _land(self) -> None:
        """Read the tokens of the step in flight, if there is one, and hand them out.

        Who ends by them, or has ended since the launch, gives his pages back at once, though a later flight may
        have a row of his. Whoever takes them is launched later still, and the device works in the order of
        launches: he overwrites what that row writes, and it reads what it should. No page of it can be found by a
        key, as one that it fills has a token that was not read.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        for s in flight.sampled:
            s.flying -= 1
        if all(s.ended for s, _ in flight.plan):
            return
        try:
            tokens, entries = flight.tokens.tolist(), entries_of(flight)
        except Exception as e:
            self._fail(flight.plan, e)
            self.pool.forget()  # what they computed may be known, and is not to be trusted
            return
        if flight.began is not None:
            self.time.add(sum(n for _, n in flight.plan), time.perf_counter() - flight.began)
        self._take(flight, tokens, entries)

    def _ask_for_masks(self, picks: Sequence[Pick]) -> dict[SequenceState, Future[list[np.ndarray]]]:
        """Which tokens grammars allow next, computed aside."""
        return {
            s: self._grammars.submit(_masks, s.grammar, tuple(s.draft))
            for s in dict.fromkeys(pick.sequence for pick in picks)
            if s.grammar is not None
        }

    def _mask(self, s: SequenceState, mask: Future[list[np.ndarray]]) -> list[np.ndarray] | None:
        """What was computed aside; if that failed, the request has ended."""
        try:
            return mask.result()
        except Mistral7BError as e:
            self.fail(s.request, e)
            return None

    # ------------------------------------------------------------------ guesses

    def _guess(self) -> None:
        """Tokens that sequences may go on with, as far as there is use and room for them."""
        decoding = [s for s in self.scheduler.running if s.decoding]
        spare = self.config.max_batch_tokens - len(decoding) - self.pool.page
        rows = len(decoding)
        for s in decoding:
            s.draft = []
            if s.request.speculation is None or s.ended:
                continue
            try:
                s.draft = self._draft(s, s.request.speculation, rows, spare)
            except Exception as e:
                self.fail(s.request, _because(s.request, "guessing ahead", e))
            rows, spare = rows + len(s.draft), spare - len(s.draft)

    def _draft(self, s: SequenceState, speculation: Speculation, rows: int, spare: int) -> list[int]:
        """A guess of `spare` tokens at most, for a step that has so many rows without it."""
        c = s.completion
        if s.guesser is None:
            s.guesser = speculation.guesser(s.tokens, len(c.prompt) + c.max_tokens)
        time_of = self.time if speculation.row_cost is None else StepTime(speculation.row_cost)
        if spare <= 0 or not time_of.known:
            return []
        left = c.max_tokens - len(c.token_ids) - 1
        return s.guesser.guess(min(left, spare), partial(_seconds, time_of, rows), partial(self._choose, s))

    def _choose(self, s: SequenceState, logits: Tensor, ahead: Sequence[int]) -> int:
        """What a sequence's sampler would take from logits (1, V) if the tokens `ahead` had come first."""
        return max(0, int(sample_rows(logits.to(self.device), [s.completion.row(ahead)])))  # -1: not finite

    # ------------------------------------------------------------------ after the forward

    def _take(self, flight: Flight, tokens: Sequence[int], entries: Sequence[Entry]) -> None:
        """Tokens to their completions, pages to whoever needs them, pieces to whoever waits for them."""
        plan, picks = flight.plan, flight.picks
        for s, _ in plan:
            if not s.ended and s.need == 0 and not s.request.forked and s.request.pooling is None:
                self.scheduler.fork(s)
        pieces: dict[Request, list[TextPiece]] = {}
        drawn = groupby(range(len(picks)), lambda i: picks[i].sequence) if picks else ()
        for s, places in drawn:
            chosen = list(places)
            piece = self._push(s, [tokens[i] for i in chosen], [entries[i] for i in chosen])
            if piece is not None:
                pieces.setdefault(s.request, []).append(piece)
        for s, _ in plan:
            if s.request.pooling and s.need == 0 and not s.ended:
                pieces.setdefault(s.request, [])
                self.scheduler.end(s)
        for request, new in pieces.items():
            if not request.finished:
                if not request.pending:
                    self._finish(request, request.completions[0].finish_reason or "stop", new)
                else:
                    self._tell(request, new)

    def _push(self, s: SequenceState, tokens: Sequence[int], entries: Sequence[Entry]) -> TextPiece | None:
        """Tokens sampled after a sequence's newest and after each guess: those that hold, as one piece."""
        c, draft, taken, text = s.completion, s.draft, [], ""
        if s.ended:  # with its request, a moment ago
            return None
        for place, token in enumerate(tokens):
            if token < 0:
                self.fail(s.request, GenerationError(NOT_FINITE))
                return None
            text += c.push(token, entries[place])
            taken.append(token)
            if s.grammar is not None:
                s.grammar.accept(token)
                if s.grammar.finished and not c.finished:
                    text += c.end()
            if c.finished or draft[place : place + 1] != [token]:
                break
        s.take(taken)
        self.counts.generated_tokens += len(taken)
        self.counts.drafted_tokens += len(draft)
        self.counts.accepted_tokens += len(taken) - 1
        if s.request.metrics.first_token is None:
            s.request.metrics.first_token = time.perf_counter()
        if c.finished:
            self.scheduler.end(s)
        else:
            self.scheduler.advance(s, len(taken) - 1)
        own = tuple(e for e in entries[: len(taken)] if e is not None)
        return TextPiece(text, c.index, tuple(taken), c.finish_reason, c.stop_reason, own, c.take_deltas())

    def _finish(
        self, request: Request, reason: str, pieces: Iterable[TextPiece] = (), error: Mistral7BError | None = None
    ) -> None:
        """A request has ended: nothing of it is left here."""
        for s in request.pending:
            s.completion.finish_reason = s.completion.finish_reason or reason  # "abort", "error"
            self.scheduler.end(s)
        request.sequences = []  # which have it: nothing of it is left for the collector
        request.finished, request.error = True, error
        request.metrics.finished = time.perf_counter()
        self.requests.pop(request.id, None)
        self.counts.finished[reason] = self.counts.finished.get(reason, 0) + 1
        self.counts.ended += 1
        self._tell(request, list(pieces))

    def _tell(self, request: Request, pieces: list[TextPiece]) -> None:
        """Hand out what has come. Whoever fails to take it loses the request, and nobody else."""
        if request.sink is None:
            return
        try:
            request.sink(request, pieces)
        except Exception as e:
            request.sink = None
            error = _because(request, "what was to take its output", e)
            if request.finished:
                request.error = request.error or error
            else:
                self._finish(request, "error", error=error)

    def _fail(self, plan: Plan, cause: Exception) -> None:
        """The step did not come about: its requests end, with the cause; all others go on."""
        for request in dict.fromkeys(s.request for s, _ in plan if not s.request.finished):
            self.fail(request, _because(request, "the model's step", cause))

    def check(self) -> None:
        """AssertionError unless every page is accounted for; when idle, none may be held."""
        self.scheduler.check_pages()
        assert not self.idle or self.pool.held == 0, "pages are held, and nobody is there"


def _because(request: Request, what: str, cause: Exception) -> EngineError:
    """The error of a request for which something failed."""
    error = EngineError(f"request {request.id}: {what} failed: {cause!r}")
    error.__cause__ = cause
    return error


def _masks(grammar: GrammarState, draft: Sequence[int]) -> list[np.ndarray]:
    """The mask of the next token and of that after each guess, up to the first that the grammar forbids."""
    return grammar.masks(draft)[0]


def _seconds(time_of: StepTime, rows: int, n: int) -> float:
    """How long a step takes with n rows more."""
    return time_of(rows + n)
