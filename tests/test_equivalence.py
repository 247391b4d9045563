"""Every cache, chunking, packing and batch-mate gives the logits of the uncached forward.

The uncached forward is the reference's: float64 to 1e-10, float32 to 1e-5. Each case runs with
attention cut into bands of five queries and again uncut.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from tiny import TINY, close, tiny_args, tiny_model, tokens_of, truth
from torch import Tensor

from mistral_7b import attention as rooms
from mistral_7b.cache import Cache, Stateless
from mistral_7b.model import Mistral7B

W = 8
LENGTHS = (W - 1, W, W + 1, 2 * W + 3, 3 * W + 5)  # the last two are longer than two windows
CHUNKS: dict[str, tuple[int, ...]] = {
    "one": (1,), "W-1": (W - 1,), "W": (W,), "W+1": (W + 1,), "3W": (3 * W,),
    "mixed": (3, 1, W + 1, 1, 1, 2, W, 5, 1), "long-then-one": (2 * W + 1, 1),
}  # fmt: skip
WINDOWS = (None, W, 64)  # 64 is longer than any prompt here
DTYPES = (torch.float64, torch.float32)
CACHES = ("growing", "rolling", "static")


@pytest.fixture(params=[5, 1024], ids=["bands", "whole"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(rooms, "BLOCK", request.param)
    return request.param


@functools.cache
def model_of(window: int | None, dtype: torch.dtype) -> Mistral7B:
    return tiny_model(tiny_args(sliding_window=window), dtype)


@functools.cache
def once(window: int | None, dtype: torch.dtype, tokens: tuple[int, ...], ids: tuple[int, ...] | None) -> Tensor:
    s = None if ids is None else torch.tensor(ids)
    return truth(model_of(window, dtype), torch.tensor(tokens), s)


def wanted_of(model: Mistral7B, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
    """The reference's logits of a row (T,), worked out once for all tests."""
    key = None if ids is None else tuple(ids.tolist())
    return once(model.args.sliding_window, model.norm.weight.dtype, tuple(tokens.tolist()), key)


def row_and_truth(window: int | None, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    tokens = tokens_of((max(LENGTHS),), seed=seed)
    return tokens, wanted_of(model_of(window, dtype), tokens)


def cache_of(kind: str, model: Mistral7B, batch: int = 1) -> Cache | None:
    return None if kind == "growing" else model.rolling_cache(batch, static=kind == "static")


def cut(length: int, sizes: tuple[int, ...]) -> Iterator[slice]:
    """Chunks of the given sizes, the last size again and again, until the length is used up."""
    start, turn = 0, 0
    while start < length:
        stop = min(length, start + sizes[min(turn, len(sizes) - 1)])
        yield slice(start, stop)
        start, turn = stop, turn + 1


def in_chunks(
    model: Mistral7B, tokens: Tensor, sizes: tuple[int, ...], cache: Cache | None, ids: Tensor | None = None
) -> Tensor:
    """Logits of tokens (B, T) or (T,), fed to the model a chunk at a time."""
    out = []
    for part in cut(tokens.shape[-1], sizes):
        logits, cache = model(tokens[..., part], cache, None if ids is None else ids[part])
        out.append(logits)
    return torch.cat(out, dim=-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f64", "f32"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("block")
def test_stateless_is_the_reference(length: int, window: int | None, dtype: torch.dtype) -> None:
    model, (tokens, wanted) = model_of(window, dtype), row_and_truth(window, dtype)
    close(model(tokens[:length], Stateless(window))[0], wanted[:length])
    close(model(tokens[None, :length], Stateless(window))[0][0], wanted[:length])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.usefixtures("block")
def test_trap_03_every_cache_and_chunking_is_the_reference(kind: str, chunks: str, window: int | None) -> None:
    model, (tokens, wanted) = model_of(window, torch.float64), row_and_truth(window, torch.float64)
    for length in LENGTHS:
        got = in_chunks(model, tokens[None, :length], CHUNKS[chunks], cache_of(kind, model))
        close(got[0], wanted[:length])


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.usefixtures("block")
def test_in_float32_too(kind: str, chunks: str) -> None:
    for window in (None, W):
        model, (tokens, wanted) = model_of(window, torch.float32), row_and_truth(window, torch.float32)
        close(in_chunks(model, tokens[None], CHUNKS[chunks], cache_of(kind, model))[0], wanted)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", CACHES)
def test_the_rows_of_a_rectangle_do_not_meet(kind: str, window: int | None) -> None:
    model = model_of(window, torch.float64)
    rows = [row_and_truth(window, torch.float64, seed) for seed in (1, 2, 3)]
    tokens, wanted = (torch.stack(list(t)) for t in zip(*rows, strict=True))
    close(in_chunks(model, tokens, CHUNKS["mixed"], cache_of(kind, model, batch=3)), wanted)


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_packed_tokens_of_one_sequence_need_no_ids(chunks: str, window: int | None) -> None:
    model, (tokens, wanted) = model_of(window, torch.float64), row_and_truth(window, torch.float64)
    close(in_chunks(model, tokens, CHUNKS[chunks], None), wanted)


# Documents of 19, 1, 8 and 2 tokens: longer than two windows, shorter than one, and exactly one.
RUNS = torch.repeat_interleave(torch.tensor([4, 0, 7, 2]), torch.tensor([19, 1, 8, 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f64", "f32"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.usefixtures("block")
def test_packed_documents_without_a_cache(window: int | None, dtype: torch.dtype) -> None:
    model, tokens = model_of(window, dtype), tokens_of((2, len(RUNS)))
    ids = torch.stack([RUNS, RUNS.flip(0)])
    wanted = torch.stack([wanted_of(model, t, s) for t, s in zip(tokens, ids, strict=True)])
    close(model(tokens, Stateless(window), ids)[0], wanted)
    close(model(tokens[0], Stateless(window), ids[0])[0], wanted[0])
    close(wanted[0, :19], wanted_of(model, tokens[0, :19]))  # the reference isolates too: a document alone


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("order", ["runs", "interleaved"])
@pytest.mark.usefixtures("block")
def test_packed_documents_in_a_growing_cache(order: str, chunks: str, window: int | None) -> None:
    """In any mixture: a chunk may end one document, start another and go on with a third."""
    model = model_of(window, torch.float64)
    shuffle = torch.randperm(len(RUNS), generator=torch.Generator().manual_seed(3))
    ids = RUNS if order == "runs" else RUNS[shuffle]
    tokens = tokens_of((len(ids),))
    wanted = wanted_of(model, tokens, ids)
    close(in_chunks(model, tokens, CHUNKS[chunks], None, ids), wanted)
    for document in ids.unique():
        close(wanted[ids == document], wanted_of(model, tokens[ids == document]))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f64", "f32"])
@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.usefixtures("block")
def test_trap_14_each_row_alone_is_the_row_in_a_ragged_batch(
    static: bool, window: int | None, dtype: torch.dtype
) -> None:
    """Prompts of 1, 5, 8 and 19 tokens, some longer than W: prefilled row by row, decoded together."""
    model = model_of(window, dtype)
    starts, steps = (1, 5, W, 2 * W + 3), 2 * W + 2
    tokens = [tokens_of((n + steps,), seed=n) for n in starts]
    cache = model.rolling_cache(len(starts), static=static)
    got = []
    for row, (n, row_tokens) in enumerate(zip(starts, tokens, strict=True)):
        part = cache.rows(row, row + 1)
        got.append([in_chunks(model, row_tokens[None, :n], (4, 1, 20), part)[0]])
    for step in range(steps):
        column = torch.stack([t[n + step] for n, t in zip(starts, tokens, strict=True)])[:, None]
        logits, _ = model(column, cache)
        for row in range(len(starts)):
            got[row].append(logits[row])
    for parts, row_tokens in zip(got, tokens, strict=True):
        assert not torch.cat(parts).isnan().any()
        close(torch.cat(parts), wanted_of(model, row_tokens))


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("chunk", [2, W, W + 1, 3 * W])
@pytest.mark.usefixtures("block")
def test_trap_14_a_chunk_over_rows_out_of_step(chunk: int, window: int | None) -> None:
    model = model_of(window, torch.float64)
    starts = (0, 3, 2 * W + 3)
    tokens = [tokens_of((n + chunk + 2,), seed=n) for n in starts]
    cache = model.rolling_cache(len(starts))
    for row, (n, t) in enumerate(zip(starts, tokens, strict=True)):
        if n:
            model(t[None, :n], cache.rows(row, row + 1))
    for part in (slice(0, chunk), slice(chunk, chunk + 2)):
        rectangle = torch.stack([t[n:][part] for n, t in zip(starts, tokens, strict=True)])
        logits, _ = model(rectangle, cache)
        for row, (n, t) in enumerate(zip(starts, tokens, strict=True)):
            close(logits[row], wanted_of(model, t)[n:][part])


def test_the_matrix_would_notice_a_wrong_token() -> None:
    """The negative control: one other token moves every later logit far beyond the tolerance."""
    model, (tokens, wanted) = model_of(None, torch.float32), row_and_truth(None, torch.float32)
    other = tokens.clone()
    other[0] = (other[0] + 1) % TINY.vocab_size
    assert (model(other[None])[0][0] - wanted).abs().amax(-1).min() > 1e-3
