"""The loop: plan, compute, sample, hand out; once for each step.

    scheduler   who feeds which tokens            scheduler.py
    forward     packed tokens -> hidden (N, D)    one call of the model over a PagedBatch
    sample      rows that are a sequence's last   -> tokens, each by its own request's parameters and seed
    take        tokens to completions             text, stops, pages of those that have ended

Nothing here runs in another thread or waits for anyone: `step` does one step and returns. llm.py calls it until
all is done, async_llm.py for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..completion import TextPiece
from ..errors import AdapterError, EngineError, GenerationError, Mistral7BError, QueueFullError
from ..model import Mistral7B
from ..sampling import Logprob, Row, logprobs, sample_rows
from ..speculation import Speculation, StepTime
from .adapters import Adapters
from .batch import PagedBatch
from .config import EngineConfig
from .grammar import GrammarState
from .pages import PagePool
from .request import Request, SequenceState
from .scheduler import Counts, Scheduler

Entry = dict[int, Logprob] | None
LOGPROB_ROWS = 64  # prompt tokens whose logits exist at once: 8 MB for 32768 tokens of vocabulary

Plan = Sequence[tuple[SequenceState, int]]


@dataclass(frozen=True)
class Pick:
    """A token to be sampled: for which sequence, from which row of the logits, after which guesses."""

    sequence: SequenceState
    row: int
    ahead: tuple[int, ...] = ()


class Engine:
    """Many requests over one model. Requests are made by llm.py, which checks them; see there."""

    def __init__(self, model: Mistral7B, pool: PagePool, config: EngineConfig) -> None:
        self.model, self.pool, self.config = model, pool, config
        self.scheduler = Scheduler(pool, model.args.sliding_window, config)
        self.adapters = Adapters(model)
        self.requests: dict[str, Request] = {}  # those that have not ended
        self.time = StepTime()  # of decoding, measured
        self.device = pool.layers[0][0].device
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

    # ------------------------------------------------------------------ a step

    @torch.inference_mode()
    def step(self) -> None:
        """One step for whoever can be computed, if there is any."""
        began = time.perf_counter()
        self._guess()
        plan = self.scheduler.plan()
        if not plan:
            return
        try:
            tokens, entries, picks = self._compute(plan)
        except Exception as e:
            self._fail(plan, e)
            return
        self.counts.steps += 1
        fed = sum(n for _, n in plan)
        self.counts.computed_tokens += fed
        if all(s.decoding for s, _ in plan):
            self.time.add(fed, time.perf_counter() - began)
        self._take(plan, picks, tokens, entries)

    def _compute(self, plan: Plan) -> tuple[list[int], list[Entry], list[Pick]]:
        """The plan's tokens through the model, and what is sampled after them."""
        fed = torch.tensor([t for s, n in plan for t in _fed(s, n)], device=self.device)  # (N,)
        rows, picks = self._picks(plan)
        masks = self._ask_for_masks(picks)
        with self.adapters.over([(s.request.adapter, n) for s, n in plan]) as model:
            hidden = model.hidden(fed, PagedBatch(self.pool, model.args.sliding_window, plan))  # (N, D)
        self._look(plan, hidden)
        if not rows:
            return [], [], []
        runs = groupby(rows, lambda row: row[1])
        with self.adapters.over([(adapter, len(list(run))) for adapter, run in runs]) as model:
            logits = model.logits(hidden if len(rows) == len(hidden) else hidden[[at for at, _ in rows]])  # (R, V)
        if any(pick.row != i for i, pick in enumerate(picks)):
            logits = logits[[pick.row for pick in picks]]
        found = {s: self._mask(s, mask) for s, mask in masks.items()}
        tokens = sample_rows(logits, [_row(pick, found.get(pick.sequence)) for pick in picks])
        return tokens.tolist(), self._logprobs(logits, tokens, picks), picks

    def _picks(self, plan: Plan) -> tuple[list[tuple[int, str | None]], list[Pick]]:
        """Rows of hidden states to be projected, with their adapters, and what is to be sampled from them."""
        rows: list[tuple[int, str | None]] = []
        picks: list[Pick] = []
        at = 0
        for s, n in plan:
            at += n
            if n < s.need or s.request.pooling:
                continue
            for i in range(1 + len(s.draft)):
                ahead = tuple(s.draft[:i])
                drawn = [s] if s.request.forked else s.request.sequences
                picks += [Pick(each, len(rows), ahead) for each in drawn]
                rows.append((at - 1 - len(s.draft) + i, s.request.adapter))
        return rows, picks

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

    def _logprobs(self, logits: Tensor, tokens: Tensor, picks: Sequence[Pick]) -> list[Entry]:
        """Log-probabilities for each pick that asks for them."""
        entries: list[Entry] = [None] * len(picks)
        asked = [i for i, pick in enumerate(picks) if pick.sequence.request.params.logprobs is not None]
        for k, group in groupby(sorted(asked, key=lambda i: _k(picks[i])), key=lambda i: _k(picks[i])):
            places = list(group)
            part, chosen = logits[places], tokens[places].clamp(min=0)
            found = logprobs(part, chosen, k, picks[places[0]].sequence.completion.piece)
            for place, entry in zip(places, found, strict=True):
                entries[place] = entry
        return entries

    def _look(self, plan: Plan, hidden: Tensor) -> None:
        """What requests want of their prompts' own hidden states (N, D)."""
        at = 0
        for s, n in plan:
            if s.request.pooling:
                s.request.pool(s.computed, hidden[at : at + n])
            elif s.request.params.prompt_logprobs is not None:
                self._prompt_logprobs(s, hidden[at : at + n])
            at += n

    def _prompt_logprobs(self, s: SequenceState, hidden: Tensor) -> None:
        """Log-probabilities of the tokens that follow those of hidden (T, D), if they are still wanted."""
        request, done = s.request, s.request.prompt_logprobs
        begin, end = len(done) - 1, min(s.computed + len(hidden), len(request.ids) - 1)
        for first in range(begin, end, LOGPROB_ROWS):
            last = min(first + LOGPROB_ROWS, end)
            part = hidden[first - s.computed : last - s.computed]
            with self.adapters.over([(request.adapter, len(part))]) as model:
                logits = model.logits(part)
            following = torch.tensor(request.ids[first + 1 : last + 1], device=self.device)
            assert request.params.prompt_logprobs is not None
            done += logprobs(logits, following, request.params.prompt_logprobs, s.completion.piece)

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

    def _take(
        self,
        plan: Plan,
        picks: Sequence[Pick],
        tokens: Sequence[int],
        entries: Sequence[dict[int, Logprob] | None],
    ) -> None:
        """Tokens to their completions, pages to whoever needs them, pieces to whoever waits for them."""
        for s, n in plan:
            if s.ended:  # its grammar failed: it has no pages any more
                continue
            self.scheduler.advance(s, n - len(s.draft))
            if s.need == 0 and not s.request.forked and s.request.pooling is None:
                self.scheduler.fork(s)
        pieces: dict[Request, list[TextPiece]] = {}
        drawn = groupby(range(len(picks)), lambda i: picks[i].sequence) if picks else ()
        for s, places in drawn:
            chosen = list(places)
            piece = self._push(s, [tokens[i] for i in chosen], [entries[i] for i in chosen])
            if piece is not None:
                pieces.setdefault(s.request, []).append(piece)
        for s, _ in plan:
            if s.request.pooling and s.need == 0:
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
        for s in request.sequences:
            self.scheduler.end(s)
        request.finished, request.error = True, error
        request.metrics.finished = time.perf_counter()
        self.requests.pop(request.id, None)
        self.counts.finished[reason] = self.counts.finished.get(reason, 0) + 1
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
        for request in dict.fromkeys(s.request for s, _ in plan):
            self.fail(request, _because(request, "the model's step", cause))

    def check(self) -> None:
        """AssertionError unless every page is accounted for; when idle, none may be held."""
        self.scheduler.check_pages()
        assert not self.idle or self.pool.held == 0, "pages are held, and nobody is there"


NOT_FINITE = "the model gives logits that are not finite (float16 overflows; try bfloat16)"


def _because(request: Request, what: str, cause: Exception) -> EngineError:
    """The error of a request for which something failed."""
    error = EngineError(f"request {request.id}: {what} failed: {cause!r}")
    error.__cause__ = cause
    return error


def _fed(s: SequenceState, n: int) -> list[int]:
    """The n tokens that a sequence feeds next."""
    return [s.tokens[-1], *s.draft] if s.draft else s.tokens[s.computed : s.computed + n]


def _masks(grammar: GrammarState, draft: Sequence[int]) -> list[np.ndarray]:
    """The mask of the next token and of that after each guess, up to the first that the grammar forbids."""
    return grammar.masks(draft)[0]


def _row(pick: Pick, masks: Sequence[np.ndarray] | None) -> Row:
    """How a pick's token is chosen."""
    row = pick.sequence.completion.row(pick.ahead)
    if masks is None:
        return row
    return replace(
        row, allowed=masks[min(len(pick.ahead), len(masks) - 1)]
    )  # past a forbidden guess all is in vain


def _k(pick: Pick) -> int:
    """How many log-probabilities are asked for."""
    return pick.sequence.request.params.logprobs or 0


def _seconds(time_of: StepTime, rows: int, n: int) -> float:
    """How long a step takes with n rows more."""
    return time_of(rows + n)
