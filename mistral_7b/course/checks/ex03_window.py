"""The visibility rule: by position, never by order."""

from __future__ import annotations

from typing import Any

import torch

from mistral_7b.course.compare import same, same_mask

OWN = "the window counts the query's own key"


def check(ex: Any) -> None:
    W, p = 4, torch.arange(10)
    d = p[:, None] - p[None, :]
    causal = d >= 0
    right = causal & (d < W)
    guesses = {
        f"{OWN}: 0 <= p_i - p_j < W, here W + 1 keys are seen": causal & (d <= W),
        f"{OWN}: here it sees only W - 1 keys": causal & (d < W - 1),
        "a query sees its own key: p_i - p_j = 0 is allowed": (d > 0) & (d < W),
        "a query sees its own key: p_i - p_j = 0 is allowed, and W keys with it": (d > 0) & (d <= W),
        "the window is ignored": causal,
        "later keys are visible: p_i - p_j must not be negative": d < W,
        "keys at a distance of W or more on both sides are hidden, but later keys must be hidden too": d.abs() < W,
        "rows are queries and columns are keys; here they are swapped": right.T,
        "True means visible; here it means hidden": ~right,
    }
    same_mask(ex.visible(p, p, W), right, "visible(0..9, 0..9, window=4)", guesses)
    same_mask(
        ex.visible(p, p, None),
        causal,
        "visible(0..9, 0..9, window=None)",
        {"window None means full causal attention, without a window": right},
    )
    same_mask(
        ex.visible(p[6:], p, W),
        right[6:],
        "the last 4 queries of 10 keys",
        {"rows are counted from 0; the rule is about positions": right[:4]},
    )
    ring = torch.tensor([8, 9, 2, 3, 4, 5, 6, 7])  # a ring of eight slots after ten tokens
    same_mask(
        ex.visible(p[9:], ring, W),
        ((9 - ring >= 0) & (9 - ring < W))[None],
        "keys in a ring, in the order 8 9 2 3 4 5 6 7",
        {"the order of the keys in memory is used; the rule is about positions alone": right[9:, :8]},
    )
    ids = torch.tensor([0, 0, 0, 1, 1, 0])
    at = torch.tensor([0, 1, 2, 0, 1, 3])
    e = at[:, None] - at[None, :]
    together = (e >= 0) & (e < W)
    same_mask(
        ex.visible(at, at, W, ids, ids),
        together & (ids[:, None] == ids[None, :]),
        "two sequences in one batch, ids 0 0 0 1 1 0",
        {"sequence ids are ignored: a query sees keys of its own sequence only": together},
    )
    rows = torch.stack([p, p + 5])
    same(
        ex.visible(rows, rows, W),
        right.expand(2, 10, 10),
        "visible of positions (2, 10)",
        {"leading dimensions are kept: (..., T) and (..., S) give (..., T, S)": right},
    )
