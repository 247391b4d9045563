"""The visibility rule and the attention under it, against masks counted by hand and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import refused
from tiny import TINY, close, tiny_args, tiny_model, tokens_of, truth
from torch import Tensor

from mistral_7b import attention as rooms
from mistral_7b.attention import attention, banded_attention, bands, visible
from mistral_7b.cache import GrowingCache, RollingCache, Stateless
from mistral_7b.cache.sequences import run_positions
from mistral_7b.errors import CacheError, ConfigError
from mistral_7b.kernels.slices import cut
from mistral_7b.model import ModelArgs


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: list[list[bool]]) -> Tensor:
    """Attention of q (T, H, K) over k, v (S, G, K), one number at a time."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = [j for j in range(k.shape[0]) if mask[i][j]]
            scores = [float(q[i, h] @ k[j, h // group]) / math.sqrt(q.shape[2]) for j in seen]
            parts = [math.exp(s - max(scores)) for s in scores]
            for part, j in zip(parts, seen, strict=True):
                out[i, h] += part / sum(parts) * v[j, h // group]
    return out


def qkv(T: int, S: int, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((*batch, T, 6, 10), (*batch, S, 3, 10), (*batch, S, 3, 10))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q, k, v


def test_trap_01_row_sums_of_the_mask() -> None:
    p = torch.arange(11)
    mask = visible(p, p, 4)
    assert mask.sum(-1).tolist() == [min(i + 1, 4) for i in range(11)]
    assert mask[9].nonzero().flatten().tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("cache", ["stateless", "growing", "rolling"])
@pytest.mark.parametrize("block", [3, 1024])
def test_trap_01_the_window_counts_the_querys_own_key(
    cache: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "BLOCK", block)
    W, T, i = 4, 14, 11
    model = tiny_model(tiny_args(n_layers=1, sliding_window=W), torch.float64)

    def at_i(changed: int | None) -> Tensor:
        tokens = tokens_of((1, T))
        if changed is not None:
            tokens[0, changed] = (tokens[0, changed] + 1) % TINY.vocab_size
        memory = {"stateless": Stateless(W), "growing": None, "rolling": model.rolling_cache()}[cache]
        return model(tokens, memory)[0][0, i]

    assert torch.equal(at_i(i - W), at_i(None))  # just out of the window
    for inside in (i - W + 1, i - 1, i):
        assert (at_i(inside) - at_i(None)).abs().max() > 1e-3
    assert torch.equal(at_i(i + 1), at_i(None))  # the future


def test_trap_02_the_window_changes_the_answer() -> None:
    """The negative control of every test of the window: on these prompts full attention differs."""
    windowed, full = tiny_model(dtype=torch.float64), tiny_model(tiny_args(sliding_window=None), torch.float64)
    off_by_one = tiny_model(tiny_args(sliding_window=9), torch.float64)
    tokens = tokens_of((1, 29))
    assert tokens.shape[1] > 2 * TINY.sliding_window  # type: ignore[operator]
    a, b, c = (m(tokens)[0][0] for m in (windowed, full, off_by_one))
    close(a[:8], b[:8])
    assert (a[8:] - b[8:]).abs().amax(-1).min() > 1e-3
    assert (a[8:] - c[8:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("length", [7, 8, 9, 29])
def test_trap_07_no_window_and_a_wide_one_are_full_attention(length: int) -> None:
    tokens = tokens_of((1, length))
    full = tiny_model(tiny_args(sliding_window=None), torch.float64)
    wanted = truth(full, tokens)
    close(full(tokens)[0], wanted)
    for window in (length, length + 1, 2**31):
        close(tiny_model(tiny_args(sliding_window=window), torch.float64)(tokens)[0], wanted)


def test_trap_07_a_window_of_zero_is_refused() -> None:
    for window in (0, -1):
        with refused(ConfigError, field="sliding_window"):
            ModelArgs(sliding_window=window)
        for make in (
            lambda w: Stateless(w),
            lambda w: GrowingCache(2, w),
            lambda w: RollingCache(2, 3, 10, w),
        ):
            with refused(CacheError, field="window"):
                make(window)


def test_rule_goes_by_position_and_never_by_order() -> None:
    p_q, p_k = torch.tensor([5, 9]), torch.tensor([8, 3, 6, 9, 5, 2])
    assert visible(p_q, p_k, 4).tolist() == [
        [False, True, False, False, True, True],
        [True, False, True, True, False, False],
    ]
    q, k, v = qkv(2, 6)
    shuffle = torch.randperm(6)
    close(
        attention(q, k[shuffle], v[shuffle], visible(p_q, p_k[shuffle], 4)),
        attention(q, k, v, visible(p_q, p_k, 4)),
    )


def test_rule_separates_sequences() -> None:
    s, p = torch.tensor([7, 7, 2, 2, 7]), torch.tensor([0, 1, 0, 1, 2])
    mask = visible(p, p, 2, s, s)
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]


def test_run_positions_counts_within_each_id() -> None:
    ids = torch.tensor([[5, 5, 2, 5, 2, 9], [1, 1, 1, 1, 1, 1]])
    assert run_positions(ids).tolist() == [[0, 1, 0, 2, 1, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_grouped_attention_is_the_sum_by_hand(batch: tuple[int, ...]) -> None:
    q, k, v = qkv(5, 5, batch)
    p = torch.arange(5)
    mask = visible(p, p, 3)
    wanted = torch.stack([
        by_loops(a, b, c, mask.tolist())
        for a, b, c in zip(q.reshape(-1, 5, 6, 10), k.reshape(-1, 5, 3, 10), v.reshape(-1, 5, 3, 10), strict=True)
    ]).reshape(q.shape)  # fmt: skip
    close(attention(q, k, v, mask.expand(*batch, 5, 5)), wanted)
    close(attention(q, k, v, visible(p, p, None).expand(*batch, 5, 5)), attention(q, k, v, causal=True))


@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("block", [1, 3, 5, 1024])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (17, 17), (6, 13), (1, 9)])
def test_bands_are_the_whole_mask(
    T: int, S: int, block: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut or whole, ordered or consecutive: the promises may save work and never change the answer."""
    monkeypatch.setattr(rooms, "BLOCK", block)
    q, k, v = qkv(T, S)
    p = torch.arange(20, 20 + S)
    p_q = p[S - T :]
    wanted = by_loops(q, k, v, visible(p_q, p, window).tolist())
    for ordered in (True, False):
        plan = bands(p_q, p, window, ordered=ordered)
        assert len(plan) == math.ceil(T / block)
        close(banded_attention(q, k, v, plan), wanted)
    close(banded_attention(q, k, v, bands(p_q, p, window, consecutive=True)), wanted)


def test_a_long_prompt_never_makes_the_whole_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "BLOCK", 64)
    p = torch.arange(1000)
    for band in bands(p, p, 8, consecutive=True):
        assert band.keys.stop - band.keys.start <= 64 + 8 - 1
        assert band.mask is not None
        assert band.mask.numel() <= 64 * (64 + 8)


def test_a_row_always_sees_itself_so_nothing_is_nan() -> None:
    q, k, v = qkv(9, 9)
    ids = torch.arange(9)
    mask = visible(torch.zeros(9, dtype=torch.long), torch.zeros(9, dtype=torch.long), 1, ids, ids)
    out = attention(q, k, v, mask)
    close(out, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("slices", [[slice(0, 3), slice(3, 7)], [slice(0, 4), slice(1, 6), slice(3, 7)]])
def test_cut_pieces_and_their_gradients_are_those_of_slices(slices):
    x = torch.randn(7, 2, 4, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(s.stop - s.start, 2, 4, dtype=torch.float64) for s in slices]
    gradients = []
    for pieces in (cut(x, slices), [x[s] for s in slices]):
        total = sum((piece * w).sum() for piece, w in zip(pieces, weights, strict=True))
        gradients.append(torch.autograd.grad(total, x)[0])
    for piece, s in zip(cut(x, slices), slices, strict=True):
        assert torch.equal(piece, x[s])
    close(*gradients)
