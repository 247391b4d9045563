"""Speculative decoding: draft tokens are proposed cheaply and verified by one forward of the model.

    drafter   d1 d2 d3                  by prompt lookup, or from a draft model
    model     t  d1 d2 d3  ->  logits   after t, after t d1, after t d1 d2, after t d1 d2 d3
    sampler   s1 s2 ...                 from each row of logits: d_i is accepted while s_i = d_i; the first
                                        s_i that differs is the next token, and the later drafts are rejected

Sampling is unchanged: every token is drawn by the ordinary sampler from the model's logits, with the random number
of its position (sampling.choice.uniforms). Greedy or sampled, with any parameters, the tokens are those without
speculation, provided that logits do not depend on how many rows are computed together. Rejection sampling
(Leviathan et al., arXiv:2211.17192) has the same distribution but gives other tokens. A draft model's tokens are
sampled with the same random numbers, which raises the acceptance rate.

This module knows nothing of the loop or of batches: a Speculator serves one sequence.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from ..errors import GenerationError
from ..model import Mistral7B

DRAFT_CHUNK = 512  # tokens per forward of a draft model's prefill
DECAY = 0.8  # factor on the weight of earlier draft tokens at each update of the acceptance rate
PRIOR = (3.0, 1.0)  # accepted and rejected draft tokens that a sequence is assumed to start with
PROBE_TOKENS = 2  # draft tokens of a probe, which tests whether drafting pays again
BACKOFF = (8, 64)  # steps without a draft before the first probe, and the most before a later one
ROW_COST = 0.03  # time that one more row adds to a step of one row, relative to it, until it is measured
TIMES_KEPT = 5  # latest durations per number of rows, of which the median counts

Choose = Callable[[Tensor, Sequence[int]], int]  # (logits (1, V), draft tokens so far) -> the sampler's token


@dataclass
class Tally:
    """Counts of draft and accepted tokens, over all sequences."""

    steps: int = 0  # steps that produced tokens, counted for each sequence
    tokens: int = 0  # tokens that they produced
    drafted: int = 0  # draft tokens proposed
    accepted: int = 0  # draft tokens accepted

    @property
    def acceptance(self) -> float:
        """The fraction of draft tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Speculation:
    """Settings of speculative decoding. GenerationError names a field whose value is out of range.

    Attributes:
        draft_model: a smaller model with the same vocabulary; None uses prompt lookup
        max_draft: the largest number of draft tokens in a step
        ngram: the longest n-gram that prompt lookup matches
        min_ngram: the shortest n-gram that it matches
        row_cost: time that each draft token adds to a step, relative to a step without drafts; None measures it.
            With a number, drafts depend on the tokens alone and not on the clock.
        tally: counts over everything that is generated with this object
    """

    draft_model: Mistral7B | None = None
    max_draft: int = 10
    ngram: int = 4
    min_ngram: int = 2
    row_cost: float | None = None
    tally: Tally = field(default_factory=Tally, compare=False)

    def __post_init__(self) -> None:
        for name, low in (("max_draft", 1), ("min_ngram", 1), ("ngram", self.min_ngram)):
            if getattr(self, name) < low:
                raise GenerationError(f"{name} must be at least {low}, not {getattr(self, name)}", field=name)
        if self.row_cost is not None and not self.row_cost >= 0:
            raise GenerationError(
                f"row_cost must be a number of at least 0, not {self.row_cost}", field="row_cost"
            )

    def check(self, vocab_size: int) -> None:
        """GenerationError if the draft model has another vocabulary size."""
        if self.draft_model is not None and self.draft_model.args.vocab_size != vocab_size:
            raise GenerationError(
                f"the draft model has a vocabulary of {self.draft_model.args.vocab_size} tokens and the model one "
                f"of {vocab_size}: they must share a vocabulary",
                field="draft_model",
            )

    def speculator(self, prompt: Sequence[int], max_length: int) -> Speculator:
        """The speculator of a sequence that starts with `prompt` and has at most `max_length` tokens in all."""
        drafter: Drafter
        if self.draft_model is None:
            drafter = PromptLookup(self.ngram, self.min_ngram)
        else:
            drafter = DraftModel(self.draft_model, max_length, self.max_draft)
        drafter.extend(prompt)
        return Speculator(drafter, DraftLength(self.max_draft), self.tally)


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two token sequences."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class Drafter(Protocol):
    """Proposes the next tokens of one sequence. A wrong proposal costs time and changes no output."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append the sequence's next tokens, whether or not they were proposed."""
        ...

    def propose(self, n: int, choose: Choose) -> list[int]:
        """Propose at most n next tokens. `choose` samples from logits as the sequence's own sampler would."""
        ...


class PromptLookup:
    """Proposes what followed the latest earlier occurrence of the longest n-gram that ends the sequence.

    An index maps each n-gram to the position after its latest occurrence. It is updated in constant time for each
    token, so nothing is searched (prompt lookup decoding, Saxena 2023, without its scan).
    """

    def __init__(self, ngram: int = 4, min_ngram: int = 2) -> None:
        self.tokens: list[int] = []
        self.sizes = range(ngram, min_ngram - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            position = len(self.tokens)
            for n in self.sizes:  # the n-grams that end before this token are followed by it
                if n <= position:
                    self._after[tuple(self.tokens[position - n :])] = position
            self.tokens.append(token)

    def propose(self, n: int, choose: Choose) -> list[int]:
        length = len(self.tokens)
        for size in self.sizes:
            start = self._after.get(tuple(self.tokens[length - size :])) if size <= length else None
            if start is not None:
                # Beyond the end of the sequence the draft repeats, so a short period still gives n tokens.
                period = length - start
                return [self.tokens[start + i % period] for i in range(n)]
        return []


class DraftModel:
    """Proposes a smaller model's continuation; its rolling cache is rolled back over rejected tokens."""

    def __init__(self, model: Mistral7B, max_length: int, max_draft: int) -> None:
        self.model = model
        self.cache = model.rolling_cache(1, max_length, slack=max_draft)
        self.pending: list[int] = []  # tokens of the sequence that are not in the cache yet
        self.drafted: list[int] = []  # draft tokens that are in the cache

    def extend(self, tokens: Sequence[int]) -> None:
        # The newest token is fed in any case, because the next draft starts from its logits.
        accepted = common_prefix_length(tokens[:-1], self.drafted)
        if accepted < len(self.drafted):
            self.cache.rollback(len(self.drafted) - accepted)
        self.drafted = []
        self.pending += tokens[accepted:]

    def propose(self, n: int, choose: Choose) -> list[int]:
        device = self.cache.length.device
        for chunk in torch.tensor([self.pending], device=device).split(DRAFT_CHUNK, dim=1):
            hidden = self.model.hidden(chunk, self.cache)  # (1, T, D)
        self.pending = []
        draft: list[int] = []
        while True:
            draft.append(choose(self.model.logits(hidden[:, -1]), draft))
            if len(draft) == n:
                return draft
            self.drafted.append(draft[-1])
            hidden = self.model.hidden(torch.tensor([draft[-1:]], device=device), self.cache)


class DraftLength:
    """Chooses how many tokens to draft: the number that maximizes the expected tokens per second.

    With acceptance probability a, estimated from recent drafts, n draft tokens give 1 + a + ... + a^n tokens a
    step. When no draft pays, drafting pauses, then a probe tests it; each failed probe doubles the pause.
    """

    def __init__(self, max_draft: int) -> None:
        self.max_draft = max_draft
        self.accepted, self.rejected = PRIOR
        self._pause, self._paused_steps, self._probing = BACKOFF[0], 0, False

    def choose(self, seconds: Callable[[int], float]) -> int:
        """The number of tokens to draft in the next step; `seconds` gives its duration by that number."""
        a = self.accepted / (self.accepted + self.rejected)
        best, fastest, tokens = 0, 1 / seconds(0), 1.0
        for n in range(1, self.max_draft + 1):
            tokens += a**n
            if tokens / seconds(n) > fastest:
                best, fastest = n, tokens / seconds(n)
        self._probing = best == 0
        if best:
            self._pause = BACKOFF[0]
            return best
        if self._paused_steps:
            self._paused_steps -= 1
            return 0
        return min(PROBE_TOKENS, self.max_draft)

    def update(self, accepted: int, rejected: int) -> None:
        """Count the accepted draft tokens of a step and, as 0 or 1, the one rejected after them."""
        self.accepted = DECAY * self.accepted + accepted
        self.rejected = DECAY * self.rejected + rejected
        if self._probing:  # only now: a drafter may have had nothing to propose
            self._paused_steps = self._pause
            self._pause = min(2 * self._pause, BACKOFF[1])


class StepTime:
    """Duration of a step by its number of rows: measured in seconds, or 1 + row_cost for each row after the first.

    The first step of a size is not counted, because it may compile or pack something. Between measured sizes the
    duration is interpolated; beyond them each row adds ROW_COST of a step of one row.
    """

    def __init__(self, row_cost: float | None = None) -> None:
        self.row_cost = row_cost
        self._times: dict[int, deque[float]] = {}
        self._known: list[tuple[int, float]] = []  # (rows, median duration), in order of rows

    @property
    def known(self) -> bool:
        """Whether there is a duration to estimate from."""
        return self.row_cost is not None or bool(self._known)

    def add(self, rows: int, seconds: float) -> None:
        """Record the duration of a step of `rows` rows."""
        if rows not in self._times:
            self._times[rows] = deque(maxlen=TIMES_KEPT)
        else:
            self._times[rows].append(seconds)
            self._known = sorted((r, median(t)) for r, t in self._times.items() if t)

    def __call__(self, rows: int) -> float:
        if self.row_cost is not None:
            return 1 + self.row_cost * (rows - 1)
        below = [entry for entry in self._known if entry[0] <= rows]
        above = [entry for entry in self._known if entry[0] >= rows]
        if below and above:
            (r0, t0), (r1, t1) = below[-1], above[0]
            return t0 if r0 == r1 else t0 + (t1 - t0) * (rows - r0) / (r1 - r0)
        nearest, seconds = below[-1] if below else above[0]
        return seconds * (1 + ROW_COST * (rows - 1)) / (1 + ROW_COST * (nearest - 1))


class Speculator:
    """Drafts tokens for one sequence: a drafter and its draft length."""

    def __init__(self, drafter: Drafter, length: DraftLength, tally: Tally) -> None:
        self.drafter, self.length, self.tally = drafter, length, tally
        self.draft: list[int] = []

    def propose(self, limit: int, seconds: Callable[[int], float], choose: Choose) -> list[int]:
        """At most `limit` draft tokens; `seconds` as in DraftLength, `choose` as in Drafter."""
        n = min(limit, self.length.choose(seconds))
        self.draft = self.drafter.propose(n, choose) if n > 0 else []
        return self.draft

    def update(self, tokens: Sequence[int]) -> None:
        """Take the tokens of the step after `propose`: accepted drafts, then one more unless it finished."""
        accepted = common_prefix_length(tokens, self.draft)
        if self.draft:
            self.length.update(accepted, int(accepted < min(len(tokens), len(self.draft))))
        self.tally.steps += 1
        self.tally.tokens += len(tokens)
        self.tally.drafted += len(self.draft)
        self.tally.accepted += accepted
        self.draft = []
        self.drafter.extend(tokens)
