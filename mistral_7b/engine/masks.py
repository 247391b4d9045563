"""Grammar masks of a step: worker processes compute them while the model runs.

    step     request_masks --- forward --- collect_masks, sample --- take the tokens, mask_ready
    worker                masks                                                accept, masks of the next token

A step waits for masks up to a time limit. A sequence whose mask is late takes no part in the steps until it is
ready, so an expensive grammar delays no other request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from .containment import FailRequest
from .grammar.client import wait_for_any
from .in_flight import Pick
from .request import SequenceState

PATIENCE = 0.01  # seconds that a step waits for grammar masks
Masks = dict[SequenceState, list[np.ndarray]]


def request_masks(picks: Sequence[Pick], fail_request: FailRequest) -> list[SequenceState]:
    """Request masks for the sequences that have a grammar; return those whose masks are expected.

    `fail_request` ends a request whose grammar fails; so in all functions here.
    """
    expected = []
    for s in dict.fromkeys(pick.sequence for pick in picks if pick.sequence.grammar is not None):
        if s.grammar is None or s.grammar.late:
            continue
        try:
            if s.draft or s.grammar.answer is None:
                s.grammar.ask(s.draft)
            expected.append(s)
        except Exception as e:
            fail_request(s.request, "its grammar", e)
    return expected


def collect_masks(expected: Sequence[SequenceState], fail_request: FailRequest) -> Masks:
    """The masks of the `expected` sequences that are ready within PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    found: Masks = {}
    for s in expected:
        if mask_ready(s, fail_request, end) and s.grammar is not None and s.grammar.answer is not None:
            found[s] = s.grammar.answer.masks
    return found


def mask_ready(s: SequenceState, fail_request: FailRequest, end: float = 0.0) -> bool:
    """Wait until `end` (by time.monotonic) for a sequence's masks; return whether they are ready."""
    if s.ended or s.grammar is None:
        return False
    try:
        return s.grammar.wait(max(0.0, end - time.monotonic()))
    except Exception as e:
        fail_request(s.request, "its grammar", e)
        return False


def grammar_over(s: SequenceState, fail_request: FailRequest, end: float = 0.0) -> bool:
    """Whether a sequence's grammar allows no further token; waits for its masks as `mask_ready`."""
    return mask_ready(s, fail_request, end) and s.grammar is not None and s.grammar.over


def may_sample(s: SequenceState, masks: Masks) -> bool:
    """Whether every sequence that samples from this row has its mask, or needs none."""
    return all(each.grammar is None or each in masks for each in s.sampled_sequences)


def late_ones(running: Sequence[SequenceState]) -> list[SequenceState]:
    """The sequences whose masks are not ready."""
    return [s for each in running for s in each.sampled_sequences if s.grammar is not None and s.grammar.late]


def wait_any(running: Sequence[SequenceState]) -> None:
    """Wait up to PATIENCE seconds for a late mask, if there is one; for when nothing can be computed."""
    late = [s.grammar for s in late_ones(running) if s.grammar is not None]
    if late:
        wait_for_any(late, PATIENCE)
