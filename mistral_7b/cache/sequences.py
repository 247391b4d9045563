"""Packed tokens of several sequences: positions and visibility from their sequence ids alone.

sequence ids   0 0 0 1 1 0
positions      0 1 2 0 1 3
"""

from __future__ import annotations

import torch
from torch import Tensor


def run_positions(sequence_ids: Tensor) -> Tensor:
    """For each token the number of earlier ones with its id: (..., T) ids to (..., T) positions."""
    sorted_ids, order = torch.sort(sequence_ids, dim=-1, stable=True)
    rank = torch.arange(sorted_ids.shape[-1], device=sorted_ids.device).expand_as(sorted_ids)
    starts = torch.searchsorted(sorted_ids, sorted_ids)  # where each id's run begins
    return torch.empty_like(rank).scatter(-1, order, rank - starts)


def interleaved(sequence_ids: Tensor) -> bool:
    """Whether the tokens of any id in (..., T) are not one consecutive run."""

    def runs(ids: Tensor) -> Tensor:
        return (ids[..., 1:] != ids[..., :-1]).sum(-1)

    return bool((runs(sequence_ids) != runs(sequence_ids.sort(-1).values)).any())


def still_visible(positions: Tensor, sequence_ids: Tensor, window: int) -> Tensor:
    """Indices, in order, of the keys (S,) that are among the last W of their own sequence."""
    ids, row = torch.unique(sequence_ids, return_inverse=True)
    last = torch.zeros_like(ids, dtype=positions.dtype).scatter_reduce(0, row, positions, "amax")
    return (positions > last[row] - window).nonzero().squeeze(1)
