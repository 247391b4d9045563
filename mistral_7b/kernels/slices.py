"""Slices along the tokens whose backward pass takes time linear in their sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def cut(x: Tensor, slices: Sequence[slice]) -> list[Tensor]:
    """Slices of x (..., T, heads, K), which may overlap.

    For a backward pass they are joined from the pieces between all their ends: the gradient of a slice would be a
    tensor of the size of x, and all slices would take time quadratic in T.
    """
    if len(slices) == 1 or not (x.requires_grad and torch.is_grad_enabled()):
        return [x[..., s, :, :] for s in slices]
    ends = sorted({0, x.shape[-3], *(s.start for s in slices), *(s.stop for s in slices)})
    place = {end: i for i, end in enumerate(ends)}
    pieces = x.split([stop - start for start, stop in itertools.pairwise(ends)], dim=-3)
    runs = (pieces[place[s.start] : place[s.stop]] for s in slices)
    return [run[0] if len(run) == 1 else torch.cat(run, dim=-3) for run in runs]
