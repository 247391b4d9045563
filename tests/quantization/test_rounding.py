"""The search for scales: the kernel is bit-identical to its twin in PyTorch."""

from __future__ import annotations

import pytest
import torch

from mistral_7b.errors import QuantizationError
from mistral_7b.kernels.cpu import calls, compiler
from mistral_7b.quantization.rounding import round_blocks, round_blocks_twin


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32), (33, 1000), (70, 576), (5, 2048)])
def test_the_kernel_is_bit_identical_to_its_twin(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if compiler.library() is None:
        pytest.skip("the kernels are not compiled")
    w = torch.randn(shape).to(dtype)
    w[:, 5] = 30  # an outlier
    w[-1, :64], w[0] = 0, w[0].abs()
    q, scales, d = round_blocks_twin(w, kind)
    for a, b in zip(calls.round_blocks(w, kind == "Q6_K"), (q, scales, d), strict=True):
        assert b is not None
        assert a.equal(b)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e9])
def test_values_that_scales_cannot_hold_are_refused(kind: str, value: float) -> None:
    w = torch.randn(3, 300)
    w[1, 290] = value
    with pytest.raises(QuantizationError):
        round_blocks(w, kind)
    if kind != "Q8_0":
        assert not round_blocks_twin(w, kind)[2].isfinite().all()
