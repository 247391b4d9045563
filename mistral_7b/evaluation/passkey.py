"""Retrieval of a number from a long text, by the length of the text and the depth of the number in it.

    filler filler  The pass key is 48213. Remember it.  filler filler filler  What is the pass key? The pass key is
                   ^ depth: 0 at the beginning of the text, 1 at its end

A trial succeeds if the model would write the number greedily: each of its tokens is the most probable one after
those before it. With a window W, the number is seen directly if it lies among the last W tokens. Through L layers
a token can depend on W x L earlier ones, which is the limit in theory.
(Mohtashami and Jaggi, 2023, "Landmark Attention".)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import EvaluationError
from ..model import Mistral7B
from ..text.tokenizer import Tokenizer
from .scoring import score, scoring_engine

HEAD = "There is a pass key hidden in this text. Find it and remember it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is{key}. Remember it.{key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
DIGITS = 5


@dataclass(frozen=True)
class Cell:
    """The trials at one length and depth. `distance` in tokens is from the number to the end of the text."""

    length: int
    depth: float
    distance: int
    retrieved: float  # fraction of the trials
    probability: float  # geometric mean of the number's probability


@dataclass(frozen=True)
class PasskeyMap:
    """Retrieval by length and depth, with the window and its theoretical reach; None without a window."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    window: int | None
    reach: int | None
    cells: tuple[Cell, ...]  # all depths of the first length, then of the next

    def to_dict(self) -> dict[str, Any]:
        """Return all that it holds, for JSON."""
        return asdict(self)


def retrieve(
    model: Mistral7B,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    trials: int = 3,
    seed: int = 0,
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda n: None,
) -> PasskeyMap:
    """Measure retrieval at all lengths, in tokens, and depths in [0, 1]. EvaluationError for what does not fit."""
    args = model.args
    for depth in depths:
        if not 0 <= depth <= 1:
            raise EvaluationError(f"a depth lies between 0 and 1, not at {depth}", field="depths")
    draw = random.Random(seed)
    places = [(length, depth) for length in lengths for depth in depths]
    prompts, distances = [], []
    for length, depth in places:
        for _ in range(trials):
            context, key, distance = _prompt(tokenizer, length, depth, draw)
            if args.sliding_window is None and len(context) + len(key) - 1 > args.max_seq_len:
                raise EvaluationError(
                    f"a text of {length} tokens with its answer exceeds the context of {args.max_seq_len}",
                    field="lengths",
                )
            prompts.append((context, key))
            distances.append(distance)
    scores = score(scoring_engine(model, tokenizer, batch_size), prompts, advance)
    cells = []
    for i, (length, depth) in enumerate(places):
        own = scores[i * trials : (i + 1) * trials]
        nats = sum(s.logprob for each in own for s in each) / trials
        right = sum(all(s.greedy for s in each) for each in own)
        cells.append(Cell(length, depth, distances[i * trials], right / trials, math.exp(nats)))
    window = args.sliding_window
    reach = None if window is None else window * args.n_layers
    return PasskeyMap(tuple(lengths), tuple(depths), trials, window, reach, tuple(cells))


def _prompt(
    tokenizer: Tokenizer, length: int, depth: float, draw: random.Random
) -> tuple[list[int], list[int], int]:
    """A context of `length` tokens, the ids of its number, and the number's distance from the end."""
    text = f" {draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)}"
    needle = tokenizer.encode(NEEDLE.format(key=text), bos=False)
    before = tokenizer.encode(QUESTION, bos=False)
    key = tokenizer.encode(QUESTION + text, bos=False)[len(before) :]
    head = tokenizer.encode(HEAD)
    room = length - len(head) - len(needle) - len(before)
    if room < 0:
        least = length - room
        raise EvaluationError(f"a text has at least {least} tokens, not {length}", field="lengths")
    line = tokenizer.encode(FILLER, bos=False)
    filler = (line * (room // len(line) + 1))[:room]
    at = round(room * depth)
    at -= at % len(line) if at < room else 0  # between two lines
    context = [*head, *filler[:at], *needle, *filler[at:], *before]
    return context, key, length - len(head) - at
