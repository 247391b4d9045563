"""Paged attention against its twin, and batch invariance of rows; run by test_triton_kernels.py.

Splits, blocks and tiles are small here, so that short sequences have several of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from interpreter import DEVICE, INTERPRETED
from torch import Tensor

from mistral_7b.kernels import attend
from mistral_7b.kernels.attend import Place, Remembered, attend_twin, quantize_kv
from mistral_7b.kernels.gpu import paged

PAGE = 4
ULP = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NAN = float("nan")
IN_USE = {"SPLIT": paged.SPLIT, "BLOCK_M": paged.BLOCK_M, "BLOCK_S": paged.BLOCK_S}
launched: list[tuple[str, tuple[int, ...]]] = []


@pytest.fixture(autouse=True)
def _small_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    launched.clear()
    real, empty = paged._launch, torch.empty

    def poisoned(*size: object, **how: Any) -> Tensor:
        return empty(*size, **how).fill_(NAN)  # type: ignore[call-overload]

    for name, value in {"SPLIT": 32, "BLOCK_M": 16, "BLOCK_S": 32}.items():
        monkeypatch.setattr(paged, name, value)

    def launch(name: str, grid: tuple[int, ...], *rest: object, **how: object) -> None:
        launched.append((name, grid))
        real(name, grid, *rest, **how)

    monkeypatch.setattr(paged, "_launch", launch)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda t, **how: poisoned(t.shape, dtype=t.dtype, device=t.device))


class Batch(NamedTuple):
    """The arguments of `paged_attend`, flat."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    old_k: Tensor
    old_v: Tensor
    old_k_scale: Tensor | None
    old_v_scale: Tensor | None
    start: Tensor
    held: Tensor
    offsets: Tensor
    table: Tensor
    page: int


class Case(NamedTuple):
    """A sequence (T, ...) of queries, keys and values, to be split into cached and new tokens."""

    q: Tensor
    k: Tensor
    v: Tensor


def sequence(T: int, H: int, G: int, K: int, dtype: torch.dtype = torch.float32) -> Case:
    q, k, v = (torch.randn(T, heads, K, device=DEVICE).to(dtype) for heads in (H, G, G))
    return Case(q, 2 * k, v)


def batch(
    cases: Sequence[Case], starts: Sequence[int], lengths: Sequence[int], *, int8: bool = False,
    held: Sequence[int] | None = None, columns: int = 0,
) -> Batch:  # fmt: skip
    """Rows start..start + length of each case, with the cached positions before them in shuffled pages.

    Whatever else lies in the pages is NaN, scales in int8, and entries of the table that nobody may read
    point far outside of all memory.
    """
    held = starts if held is None else held
    columns = max(columns, *(-(-(s + n) // PAGE) for s, n in zip(starts, lengths, strict=True)))
    places = torch.randperm(len(cases) * columns + 3)[: len(cases) * columns].view(-1, columns)
    table = torch.full_like(places, 2**40)
    pools: list[Tensor] = []
    for t in (cases[0].k, cases[0].v):
        pool = torch.full((len(cases) * columns + 3, PAGE, *t.shape[1:]), NAN, device=DEVICE)
        pools += [torch.full_like(pool, 77).char(), pool[..., :1].clone()] if int8 else [pool.to(t.dtype)]
    for b, (case, s, n, h) in enumerate(zip(cases, starts, lengths, held, strict=True)):
        used = slice((s - h) // PAGE, -(-(s + n) // PAGE))
        table[b, used] = places[b, used]
        for p in range(s - h, s):
            old = [form for t in (case.k, case.v) for form in quantized_if(t[p], int8)]
            for pool, t in zip(pools, old, strict=True):
                pool[places[b, p // PAGE], p % PAGE] = t
    q, k, v = (
        torch.cat([t[s : s + n] for t, s, n in zip(ts, starts, lengths, strict=True)])
        for ts in zip(*cases, strict=True)
    )
    new = (*quantized_if(k, int8), *quantized_if(v, int8))
    k, v, k_scale, v_scale = (new[0], new[2], new[1], new[3]) if int8 else (*new, None, None)
    old_k, old_v, *scales = (pools[0], pools[2], pools[1], pools[3]) if int8 else (*pools, None, None)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    where = (torch.tensor(starts), torch.tensor(list(held)), offsets, table)
    return Batch(q, k, v, k_scale, v_scale, old_k, old_v, *scales, *(t.to(DEVICE) for t in where), PAGE)


def quantized_if(t: Tensor, int8: bool) -> tuple[Tensor, ...]:
    return quantize_kv(t) if int8 else (t,)


def paged_attend_of(given: Batch, window: int | None, **how: bool) -> Tensor:
    return paged.paged_attend(*given[:5], cache_of(given), window, **how)


def cache_of(given: Batch) -> Remembered:
    place = Place(given.start, given.held, 1, 0, given.table, given.page, given.offsets)
    return Remembered(*given[5:9], place)


def copied(given: Batch) -> Batch:
    return Batch(*(t.clone() if isinstance(t, Tensor) else t for t in given))


def twin(given: Batch, window: int | None) -> Tensor:
    """The twin's result in float64; it also writes to the pages."""
    return attend_twin(*given[:5], cache_of(given), window, keep=True)


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    """Within a few roundings of the type, of values of size 1 and more."""
    assert actual.dtype == wanted.dtype
    bound = 3 * ULP[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=bound, atol=bound)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are bit-identical, including NaN."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def one_program_and_split(
    monkeypatch: pytest.MonkeyPatch, given: Batch, window: int | None, **how: bool
) -> Tensor:
    """Runs with one program per tile and with split programs; results and pages must be bit-identical."""
    ways, outs = (given, copied(given)), []
    for way, programs in zip(ways, (1, 2048), strict=True):
        monkeypatch.setattr(paged, "PROGRAMS", programs)
        outs.append(paged_attend_of(way, window, **how))
    assert not outs[0].isnan().any()
    assert torch.equal(*outs)
    return outs[0]


RAGGED = {"starts": [99, 3, 20, 0, 63], "lengths": [1, 11, 0, 3, 2]}
KINDS = [
    (torch.float32, None, False), (torch.bfloat16, 8, False), (torch.float16, 60, False),
    (torch.float32, 60, True), (torch.bfloat16, None, True), (torch.float16, 8, True),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "window", "int8"), KINDS)
def test_packed_batches_match_the_twin(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None, int8: bool
) -> None:
    cases = [sequence(110, 4, 2, 10, dtype) for _ in RAGGED["starts"]]
    held = [min(s, (window or 51) - 1) for s in RAGGED["starts"]]  # without a window, fewer than visible
    given = batch(cases, **RAGGED, held=held, int8=int8)
    beside = copied(given)
    out, wanted = one_program_and_split(monkeypatch, given, window), twin(beside, window)
    assert_close(out, wanted)
    for ours, theirs in zip(given[5:9], beside[5:9], strict=True):  # all pages, written or not
        assert ours is None or same(ours, theirs)
    assert [name for name, _ in launched] == [
        "attend_tiles",
        "write_kv",
        "attend_tiles",
        "merge_splits",
        "write_kv",
    ]
    if window is None:  # the negative control
        assert (twin(copied(beside), 8).double() - out.double()).abs().max() > 0.1


def test_with_the_default_block_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in IN_USE.items():
        monkeypatch.setattr(paged, name, value)
    given = batch([sequence(620, 4, 1, 16, torch.bfloat16) for _ in "ab"], [610, 60], [1, 9])
    wanted = twin(copied(given), 560)
    assert_close(one_program_and_split(monkeypatch, given, 560), wanted)


@pytest.mark.parametrize(("H", "G", "K"), [(2, 2, 16), (5, 1, 20), (20, 1, 3), (6, 2, 33)])
def test_head_shapes(monkeypatch: pytest.MonkeyPatch, H: int, G: int, K: int) -> None:
    given = batch([sequence(50, H, G, K) for _ in "ab"], [40, 1], [1, 9])
    wanted = twin(copied(given), 30)
    assert_close(one_program_and_split(monkeypatch, given, 30), wanted)


@pytest.mark.parametrize(
    ("dtype", "window", "int8"),
    [(torch.float32, None, False), (torch.bfloat16, 8, False), (torch.bfloat16, 40, True)],
)
def test_a_row_depends_on_its_keys_only(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None, int8: bool
) -> None:
    length = 90  # more than two windows, and splits
    case, other = sequence(length, 2, 1, 10, dtype), sequence(length, 2, 1, 10, dtype)
    whole = paged_attend_of(batch([case], [0], [length], int8=int8), window, keep=False)
    for start, T in ((0, 1), (89, 1), (31, 2), (29, 13)):
        held = start if window is None else min(start, window - 1)
        given = batch([other, case, other], [40, start, 3], [1, T, 1], held=[40, held, 3], int8=int8)
        beside = one_program_and_split(monkeypatch, given, window, keep=False)[1 : T + 1]
        assert torch.equal(beside, whole[start : start + T]), (start, T)
    assert {name for name, _ in launched} == {"attend_tiles", "merge_splits"}


def test_padding_rows_give_zeros_and_write_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding of a captured batch: rows after the last offset, and sequences without rows."""
    given = batch([sequence(80, 4, 2, 10) for _ in range(3)], [70, 5, 40], [1, 1, 9])
    real = copied(given)._replace(
        q=given.q[:2], k=given.k[:2], v=given.v[:2], offsets=given.offsets[:3], start=given.start[:2]
    )
    padding = {"offsets": [0, 1, 2, 2, 2], "start": [70, 5, 0, 0], "held": [70, 5, 0, 0]}
    padded = given._replace(
        **{name: torch.tensor(value, device=DEVICE) for name, value in padding.items()},
        table=torch.cat([given.table[:2], torch.full_like(given.table[:2], 2**40)]),
    )
    out = one_program_and_split(monkeypatch, padded, None)
    assert_close(out[:2], twin(real, None))
    assert not out[2:].any()
    assert same(padded.old_k, real.old_k)


def test_without_keep_pages_are_not_written_and_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = sequence(70, 2, 1, 10)
    given = batch([case, case], [60, 0], [9, 33])
    before = copied(given)
    out = one_program_and_split(monkeypatch, given, None, keep=False)
    assert same(given.old_k, before.old_k)
    assert_close(out, twin(before, None))
    moved = torch.tensor([60, 1000], device=DEVICE)  # nothing cached: positions may begin anywhere
    none = given._replace(table=given.table[:, :0], start=moved, held=0 * moved)
    assert_close(one_program_and_split(monkeypatch, none, None, keep=False)[9:], out[9:])
    assert {name for name, _ in launched} == {"attend_tiles", "merge_splits"}


def test_strided_rows_are_not_copied() -> None:
    """q, k and v as column ranges of one product."""
    given = batch([sequence(80, 4, 2, 16)], [70], [10])
    wide = torch.cat([t.flatten(1) for t in (given.q, given.k, given.v)], 1)
    q, k, v = (t.unflatten(1, (-1, 16)) for t in wide.split([64, 32, 32], 1))
    assert not q.is_contiguous()
    parted = copied(given)._replace(q=q, k=k, v=v)
    assert torch.equal(paged_attend_of(parted, 30), paged_attend_of(given, 30))
    assert same(parted.old_v, given.old_v)


def test_the_operator_uses_this_kernel_for_packed_rows_over_pages() -> None:
    """The operator as called for a CUDA device; other cases, as a rectangle over pages, use the twin."""
    given = batch([sequence(40, 4, 2, 10) for _ in "ab"], [30, 5], [1, 1])
    *tensors, start, held, offsets, table, page = given
    wanted = paged_attend_of(copied(given), 20)
    launched.clear()
    out = attend._attend(*tensors, start, held, 1, 0, table, page, offsets, 20, True)
    assert torch.equal(out, wanted)
    assert [name for name, _ in launched] == ["attend_tiles", "write_kv"]
    whole = [None if t is None else t[:, None] for t in tensors[:5]]
    out = attend._attend(*whole, *tensors[5:], start, held, 1, 0, table, page, None, 20, True)
    assert_close(out[:, 0], wanted)
    assert len(launched) == 2


def test_launches_depend_on_sizes_only() -> None:
    """A captured graph must be valid for other values in the same tensors."""
    cases = [sequence(160, 4, 2, 10) for _ in range(3)]
    grids = []
    for starts, lengths in (([140, 0, 9], [1, 1, 1]), ([0, 0, 0], [3, 0, 0]), ([99, 3, 150], [0, 2, 1])):
        launched.clear()
        paged_attend_of(batch(cases, starts, lengths, columns=40), 50)
        grids.append(list(launched))
    assert grids[0] == grids[1] == grids[2]
    assert len(grids[0]) == 3


@pytest.mark.skipif(INTERPRETED, reason="graphs are captured on a GPU")
def test_a_captured_graph_is_valid_for_other_values() -> None:
    cases = [sequence(160, 4, 2, 10) for _ in range(3)]
    first, second = (batch(cases, starts, [1, 1, 1], columns=40) for starts in ([140, 0, 9], [3, 150, 70]))
    wanted, held = paged_attend_of(copied(second), 50), copied(first)
    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        paged_attend_of(copied(first), 50)
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph, stream=aside):
        out = paged_attend_of(held, 50)
    for place, value in zip(held, second, strict=True):
        if isinstance(place, Tensor) and isinstance(value, Tensor):
            place.copy_(value)
    graph.replay()
    assert torch.equal(out, wanted)
