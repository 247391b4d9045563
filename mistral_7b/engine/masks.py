"""Grammars and the engine's steps: masks are computed by other processes while the model computes here.

    step    ask ----- forward ----- collect, sample ----- take, settle
    worker      masks                                           accept, masks of the next token

A step waits a moment for its grammars, not more. A sequence whose answer is `late` is left out of the steps until
it is there: an expensive grammar costs its own request time, and no other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from .containment import Blame
from .grammar.client import wait_for_any
from .in_flight import Pick
from .request import SequenceState

PATIENCE = 0.01  # seconds that a step waits for its grammars
Masks = dict[SequenceState, list[np.ndarray]]


def ask(picks: Sequence[Pick], blame: Blame) -> list[SequenceState]:
    """Ask which tokens may come next in the sequences that have a grammar; those that will answer.

    `blame` ends a request whose grammar fails, here as below.
    """
    asked = []
    for s in dict.fromkeys(pick.sequence for pick in picks if pick.sequence.grammar is not None):
        if s.grammar is None or s.grammar.late:
            continue
        try:
            if s.draft or s.grammar.answer is None:
                s.grammar.ask(s.draft)
            asked.append(s)
        except Exception as e:
            blame(s.request, "its grammar", e)
    return asked


def collect(asked: Sequence[SequenceState], blame: Blame) -> Masks:
    """The masks that are there within a moment."""
    end = time.monotonic() + PATIENCE
    found: Masks = {}
    for s in asked:
        if settle(s, blame, end) and s.grammar is not None and s.grammar.answer is not None:
            found[s] = s.grammar.answer.masks
    return found


def settle(s: SequenceState, blame: Blame, end: float = 0.0) -> bool:
    """Whether a sequence's grammar has answered, at the time `end` (time.monotonic) at the latest."""
    if s.ended or s.grammar is None:
        return False
    try:
        return s.grammar.wait(max(0.0, end - time.monotonic()))
    except Exception as e:
        blame(s.request, "its grammar", e)
        return False


def may_sample(s: SequenceState, masks: Masks) -> bool:
    """Whether the masks are there of all that a sequence's next row is for."""
    return all(each.grammar is None or each in masks for each in s.sampled_sequences)


def late_ones(running: Sequence[SequenceState]) -> list[SequenceState]:
    """The sequences whose grammars have not answered yet."""
    return [s for each in running for s in each.sampled_sequences if s.grammar is not None and s.grammar.late]


def wait_for_one(running: Sequence[SequenceState]) -> None:
    """Nothing can be computed: wait a moment for a grammar, if any is late."""
    late = [s.grammar for s in late_ones(running) if s.grammar is not None]
    if late:
        wait_for_any(late, PATIENCE)
