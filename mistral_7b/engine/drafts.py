"""Draft tokens of the sequences that use speculative decoding, within a step's token budget."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..sampling.sampler import sample_rows
from .config import EngineConfig
from .containment import FailRequest
from .request import SequenceState
from .speculation import Speculation, StepTime


class Drafts:
    """Collects the draft tokens of a step."""

    def __init__(self, config: EngineConfig, page: int, device: torch.device) -> None:
        self.time = StepTime()  # of decoding steps, recorded by the engine
        self._config, self._page, self._device = config, page, device

    def propose(self, running: Sequence[SequenceState], fail_request: FailRequest) -> None:
        """Set the draft of every sequence that decodes; `fail_request` ends a request whose drafter fails."""
        decoding = [s for s in running if s.decoding]
        spare = self._config.max_batch_tokens - len(decoding) - self._page
        rows = len(decoding)
        for s in decoding:
            s.draft = []
            if s.request.speculation is None or s.ended or s.late:
                continue
            try:
                s.draft = self._draft(s, s.request.speculation, rows, spare)
            except Exception as e:
                fail_request(s.request, "its drafter", e)
            rows, spare = rows + len(s.draft), spare - len(s.draft)

    def _draft(self, s: SequenceState, speculation: Speculation, rows: int, spare: int) -> list[int]:
        """A draft of at most `spare` tokens, for a step that has `rows` rows without it."""
        c, speculator = s.completion, s.make_speculator()
        time_of = self.time if speculation.row_cost is None else StepTime(speculation.row_cost)
        if speculator is None or spare <= 0 or not time_of.known:
            return []
        left = c.max_tokens - len(c.token_ids) - 1
        return speculator.propose(min(left, spare), lambda n: time_of(rows + n), partial(self._choose, s))

    def _choose(self, s: SequenceState, logits: Tensor, ahead: Sequence[int]) -> int:
        """The token that a sequence's sampler would draw from logits (1, V) after the draft tokens `ahead`."""
        return max(0, int(sample_rows(logits.to(self._device), [s.completion.row(ahead)])))  # -1: not finite
