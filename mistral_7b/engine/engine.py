"""The generation loop: plan, launch, read, emit; once for each step.

    plan      which sequence feeds which tokens            scheduler.py
    launch    packed tokens -> hidden (N, D)               forward.py, over a PagedBatch
              the last row of each sequence -> a token     by its own request's parameters and seed
    read      the tokens come back from the device         in_flight.py; where host and device overlap, those of
                                                           the step before
    emit      tokens to completions                        text, finish reasons; pages of ended sequences are freed

Nothing here runs in another thread: `step` does one step and returns. llm.py calls it until all requests have
ended, async_llm.py as long as the engine lives.

An error in one of a request's own objects (sampling parameters, grammar, stop strings, decoder, adapter, drafter,
callback) ends that request alone; see containment.py. A sequence whose grammar mask is late takes part in no step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..errors import AdapterError, EngineError, GenerationError, Mistral7BError
from ..lora.adapters import Adapters
from ..model import Mistral7B
from ..sampling.choice import to_device
from ..sampling.sampler import NOT_FINITE
from .completion import TextPiece
from .config import EngineConfig
from .containment import hidden_of, logits_of, logprobs_of, request_error, sample, use_hidden
from .counts import Counts
from .disk_cache import scheduler_for
from .drafts import Drafts
from .extras import TopLogprobs
from .forward import forward_for
from .in_flight import InFlightStep, Plan, feed, picks_of, waits
from .masks import PATIENCE, Masks, collect_masks, grammar_over, late_ones, may_sample, request_masks, wait_any
from .pages import PagePool
from .parallel import check_alone
from .queues import queue_full
from .request import Request, SequenceState


class Engine:
    """Runs many requests on one model, step by step. inputs.py makes and checks the requests."""

    def __init__(self, model: Mistral7B, pool: PagePool, config: EngineConfig) -> None:
        self.model, self.pool, self.config = model, pool, config
        self.adapters = Adapters(model)
        self.scheduler = scheduler_for(model, pool, config, self.adapters)
        self.requests: dict[str, Request] = {}  # unfinished ones, by id
        self.device = pool.layers[0][0].device
        self.drafts = Drafts(config, pool.page, self.device)
        self.forward = forward_for(self.adapters, pool, config)
        self._in_flight: InFlightStep | None = None  # launched, and not read yet
        self._arrivals = 0

    @property
    def counts(self) -> Counts:
        return self.scheduler.counts

    @property
    def idle(self) -> bool:
        """Whether there is no request."""
        return not self.requests

    def add(self, request: Request) -> None:
        """Queue a request. EngineError if it can never be scheduled or its id is in use, QueueFullError."""
        if request.id in self.requests:
            raise EngineError(f"a request with the id {request.id!r} is not finished", field="request_id")
        limit, queues = self.config.max_waiting, self.scheduler.queues
        if not self.can_queue(request.client):
            raise queue_full(queues.waiting)
        if limit is not None and queues.waiting >= limit and (last := queues.to_drop(request.client)) is not None:
            self.fail(last.request, queue_full(queues.waiting))
        request.order = self._arrivals
        self.scheduler.add(request)
        self.requests[request.id] = request
        self._arrivals += 1

    def can_queue(self, client: str = "") -> bool:
        """Whether the queue takes one more request of a client."""
        limit = self.config.max_waiting
        return limit is None or self.scheduler.queues.has_room(client, limit)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load a LoRA adapter. AdapterError or CheckpointError if it does not fit or its files are wrong."""
        check_alone("adapters")
        self.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter. AdapterError while requests use it."""
        users = sum(r.adapter == name for r in self.requests.values())
        if users:
            raise AdapterError(f"adapter {name!r} is in use by {users} requests", hint="wait for them")
        self.adapters.unload(name)

    def abort(self, request_id: str) -> None:
        """End a request with what it has produced; nothing happens if it has ended."""
        if (request := self.requests.get(request_id)) is not None:
            self._finish(request, "abort")

    def abort_request(self, request: Request) -> None:
        """Abort this request, and never another with its id; nothing happens if it has ended."""
        if self.requests.get(request.id) is request:
            self._finish(request, "abort")

    def fail(self, request: Request, error: Mistral7BError) -> None:
        """End a request with an error."""
        self._finish(request, "error", error=error)

    # ------------------------------------------------------------------ a step

    @torch.inference_mode()
    def step(self) -> None:
        """Compute one step for the sequences that can take part, if there are any.

        Where host and device overlap, step N's tokens are read after step N+1 is launched. A sequence finished by
        them still has a row in N+1, which is ignored.
        """
        began = time.perf_counter()
        self._end_late()
        self.drafts.propose(self.scheduler.running, self._fail_request)
        nothing_in_flight = self._in_flight is None
        plan = None if nothing_in_flight else self.scheduler.plan_without_preempting()
        if plan is None:  # a sequence with a token in flight is never preempted, and reading may free pages
            self._wait_for_step()
            plan = self.scheduler.plan()
        may_overlap = self.forward.overlaps and not any(waits(s) for s, _ in plan)
        timed = nothing_in_flight and not may_overlap and all(s.decoding for s, _ in plan)
        try:
            flight = self._launch(plan, began if timed else None) if plan else None
        except Exception as e:
            self._wait_for_step()
            self._fail_step(plan, e)
            return
        self._wait_for_step()
        self._in_flight = flight
        if not may_overlap or all(s.ended for s, _ in plan):
            self._wait_for_step()
        if not plan:
            wait_any(self.scheduler.running)

    def _launch(self, plan: Plan, began: float | None) -> InFlightStep:
        """Run the model on the plan's tokens and sample, without waiting for the result."""
        tokens = feed(plan, self._in_flight, self.device)  # (N,)
        rows, picks = picks_of(plan)
        expected = request_masks(picks, self._fail_request)
        hidden = hidden_of(self.forward, plan, tokens, self._fail_request)  # (N, D)
        use_hidden(plan, hidden, self.forward, self._fail_request)
        sampled, logits, masks = tokens[:0], hidden[:0], Masks()
        if rows:
            logits = logits_of(self.forward, hidden, rows, picks, self._fail_request)
            masks = collect_masks(expected, self._fail_request)
            picks = [pick for pick in picks if may_sample(pick.sequence, masks)]
            if [pick.row for pick in picks] != list(range(len(logits))):
                logits = logits[to_device([pick.row for pick in picks], self.device)]
            sampled = sample(logits, picks, masks, self._fail_request)
        flight = InFlightStep(plan, picks, sampled, logits, began)
        for s, n in plan:
            if s.ended:  # by an error of its own; its pages are freed
                continue
            if n >= s.uncomputed and not may_sample(s, masks):
                # Its newest token is fed again when its mask is ready.
                n, s.draft = n - 1 - len(s.draft), []
            self.scheduler.advance(s, n - len(s.draft))
        for s in flight.sampled:
            s.in_flight += 1
        self.counts.steps += 1
        self.counts.computed_tokens += len(tokens)
        return flight

    def _wait_for_step(self) -> None:
        """Read the tokens of the step in flight, if there is one, and emit them.

        A sequence that ends frees its pages at once, though the next step may already have a row of it. A sequence
        that reuses the pages is launched after that step, and the device keeps the order of launches, so it
        overwrites what the row wrote. The prefix cache never has the page of that row, because its token was not
        read when the step was launched.
        """
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return
        for s in flight.sampled:
            s.in_flight -= 1
        if all(s.ended for s, _ in flight.plan):
            return
        try:
            tokens = flight.tokens.tolist()
        except Exception as e:
            self._fail_step(flight.plan, e)
            self.pool.forget()  # cached pages may hold wrong values
            return
        if flight.began is not None:
            self.drafts.time.add(sum(n for _, n in flight.plan), time.perf_counter() - flight.began)
        self._process(flight, tokens, logprobs_of(flight, self._fail_request))

    # ------------------------------------------------------------------ after the forward

    def _process(self, flight: InFlightStep, tokens: Sequence[int], logprobs: Sequence[TopLogprobs]) -> None:
        """Append tokens to their completions, fork requests whose prompt is computed, and emit new pieces."""
        plan, picks = flight.plan, flight.picks
        for s, _ in plan:
            if not s.ended and s.uncomputed == 0 and not s.request.forked and s.request.pooling is None:
                self.scheduler.fork(s)
        pushed: list[_NewTokens] = []
        for s, places in groupby(range(len(picks)), lambda i: picks[i].sequence):
            chosen = list(places)
            try:
                own = [tokens[i] for i in chosen], [logprobs[i] for i in chosen]
                new = None if s.ended else self._push(s, *own)
            except Exception as e:
                self._fail_request(s.request, "its decoder, penalties or stop strings", e)
            else:
                pushed += [] if new is None else [new]
        pieces: dict[Request, list[TextPiece]] = {}
        end = time.monotonic() + PATIENCE
        for new in pushed:
            if accepted := self._accept(new, end):
                pieces.setdefault(new.sequence.request, []).extend(accepted)
        for s, _ in plan:
            if s.request.pooling and s.uncomputed == 0 and not s.ended:
                pieces.setdefault(s.request, [])
                self.scheduler.end(s)
        self._emit(pieces)

    def _end_late(self) -> None:
        """End the sequences whose late grammars allow no further token."""
        for s in late_ones(self.scheduler.running):
            if grammar_over(s, self._fail_request):
                try:
                    piece = self._piece(s, s.completion.end())
                except Exception as e:
                    self._fail_request(s.request, "its decoder", e)
                else:
                    self.scheduler.end(s)
                    self._emit({s.request: [piece]})

    def _push(self, s: SequenceState, tokens: Sequence[int], logprobs: Sequence[TopLogprobs]) -> _NewTokens | None:
        """Append the tokens sampled after the newest and after each accepted draft token; None on failure."""
        c, draft, new = s.completion, s.draft, _NewTokens(s, [], [])
        over = s.grammar.answer.over if s.grammar is not None and s.grammar.answer is not None else []
        for place, token in enumerate(tokens):
            if token < 0:
                self.fail(s.request, GenerationError(NOT_FINITE))
                return None
            text = c.push(token, logprobs[place])
            new.tokens.append(token)
            accepted = draft[place : place + 1] == [token]
            if accepted and place < len(over) and over[place] and not c.finished:
                text += c.end()
            new.pieces.append(self._piece(s, text, (token,), logprobs[place]))
            if c.finished or not accepted:
                break
        if s.grammar is not None and not c.finished:
            s.grammar.take(new.tokens)
        return new

    def _accept(self, new: _NewTokens, end: float) -> list[TextPiece]:
        """Add pushed tokens to their sequence; return a piece for each, none if its request failed."""
        s, c, drafted = new.sequence, new.sequence.completion, len(new.sequence.draft)
        try:
            if not c.finished and grammar_over(s, self._fail_request, end):
                new.pieces[-1] = TextPiece.joined([new.pieces[-1], self._piece(s, c.end())])
            if s.ended:
                return []
            s.append_tokens(new.tokens)
        except Exception as e:
            self._fail_request(s.request, "its decoder, drafter or tool calls", e)
            return []
        self.counts.generated_tokens += len(new.tokens)
        self.counts.drafted_tokens += drafted
        self.counts.accepted_tokens += len(new.tokens) - 1
        if s.request.metrics.first_token is None:
            s.request.metrics.first_token = time.perf_counter()
        if new.pieces[-1].finish_reason is not None:
            self.scheduler.end(s)
        else:
            self.scheduler.advance(s, len(new.tokens) - 1)
        return new.pieces

    def _piece(self, s: SequenceState, text: str, ids: tuple[int, ...] = (), top: TopLogprobs = None) -> TextPiece:
        """A piece of a sequence's new text and tokens."""
        c, logprobs = s.completion, () if top is None else (top,)
        return TextPiece(text, c.index, ids, c.finish_reason, c.stop_reason, logprobs, c.take_deltas())

    def _emit(self, pieces: Mapping[Request, list[TextPiece]]) -> None:
        """Pass pieces to the sinks, and finish requests whose completions are all finished."""
        for request, new in pieces.items():
            if not request.finished:
                if not request.pending:
                    self._finish(request, request.completions[0].finish_reason or "stop", new)
                else:
                    self._notify(request, new)

    def _finish(
        self, request: Request, reason: str, pieces: Iterable[TextPiece] = (), error: Mistral7BError | None = None
    ) -> None:
        """End a request and remove it."""
        for s in request.pending:
            s.completion.finish_reason = s.completion.finish_reason or reason  # "abort", "error"
            self.scheduler.end(s)
        request.sequences = []  # they refer to it: without this cycle it is freed at once
        request.finished, request.error = True, error
        request.metrics.finished = time.perf_counter()
        self.requests.pop(request.id, None)
        self.counts.finished[reason] = self.counts.finished.get(reason, 0) + 1
        self.counts.ended += 1
        self._notify(request, list(pieces))

    def _notify(self, request: Request, pieces: list[TextPiece]) -> None:
        """Call a request's sink. A sink that raises ends its own request."""
        if request.sink is None:
            return
        try:
            request.sink(request, pieces)
        except Exception as e:
            request.sink = None
            error = request_error(request, "its output callback", e)
            if request.finished:
                request.error = request.error or error
            else:
                self._finish(request, "error", error=error)

    def _fail_step(self, plan: Plan, cause: Exception) -> None:
        """End the requests of a failed step with its cause; all others continue."""
        for request in dict.fromkeys(s.request for s, _ in plan if not s.request.finished):
            self._fail_request(request, "the model's step", cause)

    def _fail_request(self, request: Request, what: str, cause: Exception) -> None:
        """End a request because `what` failed; nothing happens if it has ended."""
        if not request.finished:
            self.fail(request, request_error(request, what, cause))

    def check(self) -> None:
        """AssertionError unless every page is accounted for; when idle, none may be held."""
        self.scheduler.check_pages()
        assert not self.idle or self.pool.held == 0, "pages are held, and there is no request"


@dataclass
class _NewTokens:
    """The new tokens of a sequence in one step, with a piece for each."""

    sequence: SequenceState
    tokens: list[int]
    pieces: list[TextPiece]
