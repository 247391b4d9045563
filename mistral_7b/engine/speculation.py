"""Guessing ahead: several tokens are proposed cheaply, and one forward tells which of them are right.

    drafter   d1 d2 d3                  from a repetition in the text, or from a smaller model
    model     t  d1 d2 d3  ->  logits   after t, after t d1, after t d1 d2, after t d1 d2 d3
    sampler   s1 s2 ...                 as ever, from each of the logits: while s_i = d_i the
                                        next logits hold; the first s_i that differs is itself the token

Nothing of sampling is replaced: every token is the one that the ordinary sampler draws from the model's
logits, with the random number of its own place (sampling.uniforms). So greedy or sampled, with any
parameters, the tokens are those without speculation, where the logits do not depend on how many rows are
computed together. Rejection sampling (Leviathan et al., arXiv:2211.17192) has the same distribution but
other tokens; here a drafter that samples gets the same random number, and so often draws the same token.

Knows nothing of loops or batches: a Guesser is for one sequence.
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

DRAFT_CHUNK = 512  # tokens that a draft model reads per forward
MEMORY = 0.8  # of an earlier guess's weight, what is left of it at the next
HOPE = (3.0, 1.0)  # right and wrong guesses that a text begins with
TRIAL = 2  # tokens guessed to see whether guessing has come to pay again
REST = (8, 64)  # steps without a guess before the first trial, and at most
ROW_COST = 0.03  # what one more row adds to a step, in steps of one, until it is measured
MEASURED = 5  # the latest times of a step that are kept, for their median

Choose = Callable[[Tensor, Sequence[int]], int]  # logits (1, V), tokens guessed before -> the sampler's choice


@dataclass
class Tally:
    """What came of guessing, summed over all sequences."""

    steps: int = 0  # forwards that gave a sequence tokens
    tokens: int = 0  # tokens that came of them
    drafted: int = 0  # tokens guessed
    accepted: int = 0  # of these, right

    @property
    def acceptance(self) -> float:
        """Which part of the guesses was right."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Speculation:
    """Whether and how to guess ahead. A value out of its range raises GenerationError naming the field.

    Attributes:
        draft_model: a smaller model of the same vocabulary that guesses; None looks the text up in itself
        max_draft: most tokens guessed at once
        ngram: prompt lookup takes the longest repetition of so many tokens at most
        min_ngram: and of so many at least
        row_cost: what each guessed token adds to a step's time, as a part of a step without any; None
            measures it. With a number, what is guessed depends on the tokens alone and not on the clock.
        tally: counts what came of it, over all that is generated with this object
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
        """GenerationError if the draft model speaks another vocabulary."""
        if self.draft_model is not None and self.draft_model.args.vocab_size != vocab_size:
            raise GenerationError(
                f"the draft model knows {self.draft_model.args.vocab_size} tokens and the model {vocab_size}: "
                "they must share one vocabulary",
                field="draft_model",
            )

    def guesser(self, prompt: Sequence[int], room: int) -> Guesser:
        """A guesser for a sequence that begins with `prompt` and will have `room` tokens at most."""
        drafter: Drafter
        if self.draft_model is None:
            drafter = PromptLookup(self.ngram, self.min_ngram)
        else:
            drafter = DraftModel(self.draft_model, room, self.max_draft)
        drafter.extend(prompt)
        return Guesser(drafter, Pace(self.max_draft), self.tally)


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class Drafter(Protocol):
    """Guesses how one sequence goes on. Right or wrong, it only ever costs time."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The sequence has gone on with these tokens, whatever was guessed."""
        ...

    def propose(self, n: int, choose: Choose) -> list[int]:
        """At most n tokens that may come next. `choose` samples from logits as the model's own will be."""
        ...


class PromptLookup:
    """What followed the last time that the text ended as it does now: the longest repetition counts.

    An n-gram's entry is the place after its latest occurrence. A token is entered in constant time when
    it comes, and nothing is searched (prompt lookup decoding, Saxena 2023, without its scan).
    """

    def __init__(self, ngram: int = 4, min_ngram: int = 2) -> None:
        self.tokens: list[int] = []
        self.sizes = range(ngram, min_ngram - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            place = len(self.tokens)
            for n in self.sizes:  # the n-grams that end before it have now been followed
                if n <= place:
                    self._after[tuple(self.tokens[place - n :])] = place
            self.tokens.append(token)

    def propose(self, n: int, choose: Choose) -> list[int]:
        held = len(self.tokens)
        for size in self.sizes:
            start = self._after.get(tuple(self.tokens[held - size :])) if size <= held else None
            if start is not None:
                # Past its end the text goes on with the guess itself, so that a short period is guessed at length.
                period = held - start
                return [self.tokens[start + i % period] for i in range(n)]
        return []


class DraftModel:
    """A smaller model's own continuation, one token after another, in a ring that takes wrong ones back."""

    def __init__(self, model: Mistral7B, room: int, max_draft: int) -> None:
        self.model = model
        self.cache = model.rolling_cache(1, room, slack=max_draft)
        self.unread: list[int] = []  # tokens of the sequence that the cache has not seen
        self.ahead: list[int] = []  # guessed tokens that it has seen

    def extend(self, tokens: Sequence[int]) -> None:
        right = agreeing(tokens[:-1], self.ahead)  # the newest is read in any case: the next guess comes of it
        if right < len(self.ahead):
            self.cache.rollback(len(self.ahead) - right)
        self.ahead = []
        self.unread += tokens[right:]

    def propose(self, n: int, choose: Choose) -> list[int]:
        device = self.cache.length.device
        for part in torch.tensor([self.unread], device=device).split(DRAFT_CHUNK, dim=1):
            hidden = self.model.hidden(part, self.cache)  # (1, T, D)
        self.unread = []
        draft: list[int] = []
        while True:
            draft.append(choose(self.model.logits(hidden[:, -1]), draft))
            if len(draft) == n:
                return draft
            self.ahead.append(draft[-1])
            hidden = self.model.hidden(torch.tensor([draft[-1:]], device=device), self.cache)


class Pace:
    """How many tokens to guess: the most tokens per second to be expected, if each is right as often as lately.

    With a probability a of a right guess, n guesses give 1 + a + ... + a^n tokens a step. When even one
    guess does not pay, none is made for a while, then a trial; each trial in vain doubles the while.
    """

    def __init__(self, max_draft: int) -> None:
        self.max_draft = max_draft
        self.right, self.wrong = HOPE
        self._rest, self._wait, self._trial = REST[0], 0, False

    def length(self, seconds: Callable[[int], float]) -> int:
        """Tokens to guess in the next step, of which `seconds` tells how long it takes by that number."""
        a = self.right / (self.right + self.wrong)
        best, most, tokens = 0, 1 / seconds(0), 1.0
        for n in range(1, self.max_draft + 1):
            tokens += a**n
            if tokens / seconds(n) > most:
                best, most = n, tokens / seconds(n)
        self._trial = best == 0
        if best:
            self._rest = REST[0]
            return best
        if self._wait:
            self._wait -= 1
            return 0
        return min(TRIAL, self.max_draft)

    def learn(self, right: int, wrong: int) -> None:
        """So many guesses were right, and so many (0 or 1) were then wrong."""
        self.right = MEMORY * self.right + right
        self.wrong = MEMORY * self.wrong + wrong
        if self._trial:  # only now: a drafter may have had nothing to propose
            self._wait = self._rest
            self._rest = min(2 * self._rest, REST[1])


class StepTime:
    """Seconds of a step by the rows computed in it: measured, or 1 + row_cost for each beyond the first.

    The first step of a size is not counted, for it may compile or pack something. Between sizes that
    were measured time is interpolated; beyond them each row is taken to add ROW_COST of a step.
    """

    def __init__(self, row_cost: float | None = None) -> None:
        self.row_cost = row_cost
        self._times: dict[int, deque[float]] = {}
        self._known: list[tuple[int, float]] = []  # rows and their median, in order

    @property
    def known(self) -> bool:
        """Whether there is anything yet to judge by."""
        return self.row_cost is not None or bool(self._known)

    def add(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if rows not in self._times:
            self._times[rows] = deque(maxlen=MEASURED)
        else:
            self._times[rows].append(seconds)
            self._known = sorted((r, median(t)) for r, t in self._times.items() if t)

    def __call__(self, rows: int) -> float:
        if self.row_cost is not None:
            return 1 + self.row_cost * (rows - 1)
        below = [known for known in self._known if known[0] <= rows]
        above = [known for known in self._known if known[0] >= rows]
        if below and above:
            (r0, t0), (r1, t1) = below[-1], above[0]
            return t0 if r0 == r1 else t0 + (t1 - t0) * (rows - r0) / (r1 - r0)
        nearest, seconds = below[-1] if below else above[0]
        return seconds * (1 + ROW_COST * (rows - 1)) / (1 + ROW_COST * (nearest - 1))


class Guesser:
    """One sequence's drafter and pace."""

    def __init__(self, drafter: Drafter, pace: Pace, tally: Tally) -> None:
        self.drafter, self.pace, self.tally = drafter, pace, tally
        self.draft: list[int] = []

    def guess(self, most: int, seconds: Callable[[int], float], choose: Choose) -> list[int]:
        """Tokens that may come next, `most` at most; `seconds` and `choose` as in Pace and Drafter."""
        n = min(most, self.pace.length(seconds))
        self.draft = self.drafter.propose(n, choose) if n > 0 else []
        return self.draft

    def take(self, tokens: Sequence[int]) -> None:
        """These tokens came of the step after `guess`: the right guesses, then one more unless the text ended."""
        right = agreeing(tokens, self.draft)
        if self.draft:
            self.pace.learn(right, int(right < min(len(tokens), len(self.draft))))
        self.tally.steps += 1
        self.tally.tokens += len(tokens)
        self.tally.drafted += len(self.draft)
        self.tally.accepted += right
        self.draft = []
        self.drafter.extend(tokens)
