"""LoRA updates against float64 and against single rows, for sizes that are no multiples of a vector."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mistral_7b.kernels.cpu.compiler import library
from mistral_7b.kernels.low_rank import LowRank, LowRanks, Mixture

SIZES = [(40, 67), (15, 16), (64, 65), (1024, 320), (3, 1)]
compiled = pytest.mark.skipif(library() is None, reason="without the kernel PyTorch's products are used")


def ranks_of(K: int, N: int, dtype: torch.dtype, mixture: Mixture) -> LowRanks:
    own = [LowRank(torch.randn(r, K) / K**0.5, torch.randn(N, r), dtype) for r in (3, 16, 1, 8)]
    return LowRanks([*own, None], mixture)


def exact(ranks: LowRanks, rows: dict[int, list[int]], x: Tensor, y: Tensor) -> Tensor:
    out = y.double().clone()
    for i, numbers in rows.items():
        if (own := ranks.own[i]) is not None:
            out[numbers] += x[numbers].double() @ own.a.double().T @ own.b.double()
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "N"), SIZES)
def test_each_adapter_updates_its_own_rows(K: int, N: int, dtype: torch.dtype) -> None:
    mixture = Mixture()
    ranks, x, y = ranks_of(K, N, dtype, mixture), torch.randn(23, K).to(dtype), torch.randn(23, N).to(dtype)
    rows = {2: [4], 0: [0, 1, 2, 3, 22, 20], 4: [5, 6], 3: [21, *range(7, 17)]}
    mixture.choose(rows, 23, "cpu")
    got, twin, wanted = y.clone(), y.clone(), exact(ranks, rows, x, y)
    ranks.add(x, got)
    ranks.add_twin(x, twin)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for out in (got, twin):
        torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=5 * tolerance)
    others = [5, 6, 17, 18, 19]
    assert torch.equal(got[others], y[others])
    assert not torch.equal(got[4], y[4])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "N"), SIZES)
def test_a_row_is_bit_identical_in_any_batch(K: int, N: int, dtype: torch.dtype) -> None:
    mixture = Mixture()
    ranks, x, y = ranks_of(K, N, dtype, mixture), torch.randn(30, K).to(dtype), torch.randn(30, N).to(dtype)
    rows = {1: list(range(11)), 3: list(range(11, 30))}
    together = y.clone()
    mixture.choose(rows, 30, "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ranks.add(x, together)
    finally:
        torch.set_num_threads(threads)
    for i, numbers in rows.items():
        for row in numbers:
            mixture.choose({i: [0]}, 1, "cpu")
            alone = y[row : row + 1].clone()
            ranks.add(x[row : row + 1], alone)
            assert torch.equal(alone[0], together[row])


def test_a_mismatched_number_of_rows_is_not_updated() -> None:
    mixture = Mixture()
    for dtype in (torch.float32, torch.float64):
        ranks, x, y = ranks_of(8, 9, dtype, mixture), torch.randn(3, 8).to(dtype), torch.randn(3, 9).to(dtype)
        mixture.choose({0: [7]}, 8, "cpu")
        before = y.clone()
        ranks.add(x, y)
        assert mixture.refused == 3
        assert torch.equal(y, before)
        mixture.choose({}, 0, "cpu")
        assert mixture.refused == 0


def test_gradients_use_the_twin() -> None:
    mixture = Mixture()
    ranks, x = ranks_of(8, 9, torch.float32, mixture), torch.randn(3, 8, requires_grad=True)
    mixture.choose({1: [0, 2]}, 3, "cpu")
    y = x @ torch.zeros(8, 9)
    ranks.add(x, y)
    y.sum().backward()
    own = ranks.own[1]
    assert own is not None
    torch.testing.assert_close(x.grad[0], own.b.sum(1) @ own.a)
    assert not x.grad[1].any()
