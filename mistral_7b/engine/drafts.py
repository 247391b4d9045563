"""Draft tokens of sequences that ask for speculation, as far as a step has space and they pay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..sampling.sampler import sample_rows
from .config import EngineConfig
from .containment import Blame
from .request import SequenceState
from .speculation import Speculation, StepTime


class Drafts:
    """Has sequences' drafters propose tokens, within a step's budget."""

    def __init__(self, config: EngineConfig, page: int, device: torch.device) -> None:
        self.time = StepTime()  # of decoding, measured by the engine
        self._config, self._page, self._device = config, page, device

    def guess(self, running: Sequence[SequenceState], blame: Blame) -> None:
        """Set the draft of every sequence that decodes; `blame` ends a request whose drafter fails."""
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
                blame(s.request, "its drafter", e)
            rows, spare = rows + len(s.draft), spare - len(s.draft)

    def _draft(self, s: SequenceState, speculation: Speculation, rows: int, spare: int) -> list[int]:
        """A draft of `spare` tokens at most, for a step that has so many rows without it."""
        c, guesser = s.completion, s.drafter()
        time_of = self.time if speculation.row_cost is None else StepTime(speculation.row_cost)
        if guesser is None or spare <= 0 or not time_of.known:
            return []
        left = c.max_tokens - len(c.token_ids) - 1
        return guesser.guess(min(left, spare), lambda n: time_of(rows + n), partial(self._choose, s))

    def _choose(self, s: SequenceState, logits: Tensor, ahead: Sequence[int]) -> int:
        """What a sequence's sampler would take from logits (1, V) if the tokens `ahead` had come first."""
        return max(0, int(sample_rows(logits.to(self._device), [s.completion.row(ahead)])))  # -1: not finite
