"""Hypothesis looks for a configuration, chunking or mixture in which a cache is not the reference."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from example_counts import SOME
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import close, tiny_model, tokens_of, truth

from mistral_7b import attention as rooms
from mistral_7b.attention import attention, banded_attention, bands, visible
from mistral_7b.cache import GrowingCache, RollingCache, Stateless
from mistral_7b.cache.rolling import EMPTY
from mistral_7b.cache.sequences import run_positions
from mistral_7b.errors import CacheError
from mistral_7b.model import ModelArgs

# Examples are drawn the same every run: a failure found once is found again.
checked = settings(SOME, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def configs(draw: st.DrawFn) -> ModelArgs:
    kv_heads = draw(st.integers(1, 3))
    return ModelArgs(
        dim=draw(st.sampled_from([3, 8, 11])),
        n_layers=draw(st.integers(1, 3)),
        head_dim=2 * draw(st.integers(1, 4)),
        hidden_dim=draw(st.integers(1, 13)),
        n_heads=kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=kv_heads,
        vocab_size=19,
        rope_theta=draw(st.sampled_from([10.0, 1e4, 1e6])),
        sliding_window=draw(st.one_of(st.none(), st.integers(1, 12))),
        max_seq_len=64,
        tie_embeddings=draw(st.booleans()),
    )


chunkings = st.lists(st.integers(1, 14), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) <= 30)
blocks = st.sampled_from([1, 3, 7, 1024])


def with_block(block: int) -> Any:
    """Attention cut into bands of so many queries, for the length of a `with`."""
    return mock.patch.object(rooms, "BLOCK", block)


@checked
@given(configs(), chunkings, blocks, st.sampled_from(["growing", "rolling", "static"]), st.integers(1, 3))
def test_any_chunking_of_any_model_is_the_reference(
    args: ModelArgs, sizes: list[int], block: int, kind: str, batch: int
) -> None:
    model = tiny_model(args, torch.float64)
    tokens = tokens_of((batch, sum(sizes)), args)
    cache: Any = None if kind == "growing" else model.rolling_cache(batch, static=kind == "static")
    out = []
    with with_block(block):
        for part in tokens.split(sizes, dim=1):
            logits, cache = model(part, cache)
            out.append(logits)
        wanted = truth(model, tokens)
        close(torch.cat(out, dim=1), wanted)
        close(model(tokens, Stateless(args.sliding_window))[0], wanted)


@checked
@given(configs(), chunkings, blocks, st.data())
def test_any_mixture_of_packed_sequences_is_the_reference(
    args: ModelArgs, sizes: list[int], block: int, data: st.DataObject
) -> None:
    n = sum(sizes)
    ids = torch.tensor(data.draw(st.lists(st.sampled_from([0, 3, -7, 2**40]), min_size=n, max_size=n)))
    model = tiny_model(args, torch.float64)
    tokens = tokens_of((n,), args)
    cache, out = None, []
    with with_block(block):
        for part, part_ids in zip(tokens.split(sizes), ids.split(sizes), strict=True):
            logits, cache = model(part, cache, part_ids)
            out.append(logits)
        close(torch.cat(out), truth(model, tokens, ids))
        runs = ids.sort().values
        close(model(tokens, Stateless(args.sliding_window), runs)[0], truth(model, tokens, runs))


@checked
@given(configs(), st.lists(st.integers(1, 13), min_size=2, max_size=4), st.integers(1, 12), st.data())
def test_any_ragged_batch_is_each_row_alone(
    args: ModelArgs, starts: list[int], steps: int, data: st.DataObject
) -> None:
    model = tiny_model(args, torch.float64)
    rows = [tokens_of((n + steps,), args, seed=i) for i, n in enumerate(starts)]
    ring = model.rolling_cache(len(starts), static=data.draw(st.booleans()))
    for i in data.draw(st.permutations(range(len(starts)))):
        cut = data.draw(st.integers(0, starts[i] - 1))
        for part in (rows[i][None, :cut], rows[i][None, cut : starts[i]]):
            if part.shape[1]:
                model(part, ring.rows(i, i + 1))
    done = 0
    while done < steps:
        T = data.draw(st.integers(1, min(3, steps - done)))
        together = torch.stack([row[n + done : n + done + T] for row, n in zip(rows, starts, strict=True)])
        logits, _ = model(together, ring)
        for got, row, n in zip(logits, rows, starts, strict=True):
            close(got, truth(model, row[: n + done + T])[n + done :])
        done += T


@checked
@given(st.integers(1, 20), st.lists(st.integers(1, 25), min_size=1, max_size=8))
def test_trap_04_a_ring_always_holds_its_last_positions(slots: int, sizes: list[int]) -> None:
    ring = RollingCache(1, 1, 2, slots, dtype=torch.float64)
    n = 0
    for T in sizes:
        ring.extend(torch.zeros(1, T, dtype=torch.long))
        keys = torch.arange(n, n + T, dtype=torch.float64)[None, :, None, None].expand(1, T, 1, 2)
        ring.layers[0].attend(torch.zeros(1, T, 1, 2, dtype=torch.float64), keys, keys)
        n += T
    wanted = [max((p for p in range(n) if p % slots == s), default=EMPTY) for s in range(slots)]
    assert ring.positions[0].tolist() == wanted
    held = [s for s in range(slots) if wanted[s] != EMPTY]
    assert ring.layers[0].k[0, held, 0, 0].tolist() == [wanted[s] for s in held]


@checked
@given(st.integers(1, 12), st.integers(0, 14), st.integers(0, 14), st.booleans())
def test_trap_05_a_rollback_is_exact_or_refused(window: int, length: int, n: int, rolling: bool) -> None:
    args = ModelArgs(dim=8, n_layers=2, head_dim=4, hidden_dim=6, n_heads=2, n_kv_heads=1, vocab_size=19,
                     sliding_window=window)  # fmt: skip
    model = tiny_model(args, torch.float64)
    tokens = tokens_of((1, length + 3), args)
    cache: Any = model.rolling_cache() if rolling else GrowingCache(2, window)
    if length:
        cache = model(tokens[:, :length], cache)[1]
    try:
        cache.rollback(n)
    except CacheError:
        assert n > length or (n and length > window)
        return
    assert n <= length
    other = tokens_of((1, 2 * window + 3), args, seed=2)
    got, _ = model(other, cache)
    close(got, truth(model, torch.cat([tokens[:, : length - n], other], dim=1))[:, length - n :])


@checked
@given(st.integers(1, 9), st.integers(0, 6), st.booleans(), st.booleans(), st.data())
def test_trap_05_any_course_of_a_ring_with_slack_is_exact_or_refused(
    window: int, slack: int, windowed: bool, static: bool, data: st.DataObject
) -> None:
    """Two rows go on together and are taken back apart; each always sees what it would alone."""
    args = ModelArgs(dim=8, n_layers=2, head_dim=4, hidden_dim=6, n_heads=2, n_kv_heads=1, vocab_size=19,
                     sliding_window=window if windowed else None, max_seq_len=400)  # fmt: skip
    model = tiny_model(args, torch.float64)
    ring = model.rolling_cache(2, static=static, slack=slack)
    rows: list[list[int]] = [[], []]
    furthest = [0, 0]
    for step in range(data.draw(st.integers(1, 8))):
        fed = tokens_of((2, data.draw(st.integers(1, 2 * window + slack))), args, seed=step)
        got, _ = model(fed, ring)
        for i, row in enumerate(rows):
            row += fed[i].tolist()
            close(got[i], truth(model, torch.tensor(row))[-fed.shape[1] :])
            furthest[i] = max(furthest[i], len(row))
        counts = [data.draw(st.integers(0, min(len(row), slack + 2))) for row in rows]
        possible = not windowed or all(
            n == 0 or end <= ring.slots or len(row) - n >= end - slack
            for n, row, end in zip(counts, rows, furthest, strict=True)
        )
        try:
            ring.rollback(torch.tensor(counts))
        except CacheError:
            assert not possible
            continue
        assert possible
        rows = [row[: len(row) - n] for n, row in zip(counts, rows, strict=True)]


@checked
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40))
def test_run_positions_is_the_count_of_earlier_equals(ids: list[int]) -> None:
    assert run_positions(torch.tensor(ids)).tolist() == [ids[:i].count(ids[i]) for i in range(len(ids))]


@checked
@given(st.integers(1, 30), st.integers(0, 30), st.one_of(st.none(), st.integers(1, 40)), blocks, st.booleans())
def test_bands_never_change_the_answer(
    T: int, before: int, window: int | None, block: int, consecutive: bool
) -> None:
    S = before + T
    draw = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(n, h, 4, generator=draw, dtype=torch.float64) for n, h in ((T, 4), (S, 2), (S, 2)))
    p = torch.arange(100, 100 + S)
    with with_block(block):
        got = banded_attention(q, k, v, bands(p[before:], p, window, consecutive=consecutive))
    close(got, attention(q, k, v, visible(p[before:], p, window)))
