"""The search for scales: the kernel is bit-identical to its twin in PyTorch."""

from __future__ import annotations

import pytest
import torch

from mistral_7b.errors import QuantizationError
from mistral_7b.kernels.block_formats import FORMATS
from mistral_7b.kernels.cpu import calls, compiler
from mistral_7b.quantization.rounding import Blocks, grid, round_blocks, round_blocks_twin


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (33, 1000), (70, 576), (5, 2048)])
def test_the_kernel_is_bit_identical_to_its_twin(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], weighted: bool
) -> None:
    if compiler.library() is None:
        pytest.skip("the kernels are not compiled")
    w = torch.randn(shape).to(dtype)
    w[:, 5] = 30  # an outlier
    w[-1, :64], w[0] = 0, w[0].abs()
    importance = torch.rand(shape[1]) + 0.01 if weighted else None
    found, wanted = calls.round_blocks(w, kind == "Q6_K", importance), round_blocks_twin(w, kind, importance)
    for a, b in zip(found, wanted, strict=True):
        assert b is not None
        assert a.equal(b)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_importance_reduces_the_weighted_error(kind: str) -> None:
    w, importance = torch.randn(20, 512), torch.rand(512) ** 4 + 0.01

    def error(blocks: Blocks) -> float:
        step, offset = grid(kind, blocks)
        rounded = step * (blocks.q.float() - FORMATS[kind].zero) + offset
        return ((rounded - w).square() * importance).sum().item()

    assert error(round_blocks(w, kind, importance)) < 0.95 * error(round_blocks(w, kind))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e9])
def test_values_that_scales_cannot_hold_are_refused(kind: str, value: float) -> None:
    w = torch.randn(3, 300)
    w[1, 290] = value
    with pytest.raises(QuantizationError):
        round_blocks(w, kind)
    if kind != "Q8_0":
        assert not round_blocks_twin(w, kind)[2].isfinite().all()
