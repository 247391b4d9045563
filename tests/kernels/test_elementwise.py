"""RMSNorm, SwiGLU's gate and rotary embedding against their twins, and batch invariance of rows."""

from __future__ import annotations

import pytest
import torch

from mistral_7b.kernels.elementwise import (
    rms_norm,
    rms_norm_twin,
    rotate,
    rotate_twin,
    silu_mul,
    silu_mul_twin,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# Another order of sums, or the last bit of an exponential, may change a rounding by one step of the type.
STEP = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1 / 128}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 63, 64, 65, 320, 4096])
def test_rms_norm_matches_the_twin(width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, width).to(dtype) * 3, torch.randn(width).to(dtype)
    for rows in (1, 2, 17, 300):
        got, wanted = rms_norm(x[:rows], weight, 1e-5), rms_norm_twin(x[:rows], weight, 1e-5)
        torch.testing.assert_close(got, wanted, rtol=STEP[dtype], atol=1e-6)
        if dtype == torch.bfloat16 and width > 1:
            assert (got == wanted).float().mean() > 0.9
    together = rms_norm(x, weight, 1e-5)
    assert all(torch.equal(rms_norm(row, weight, 1e-5), y) for row, y in zip(x, together, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (17, 33), (2, 3, 14336)])
def test_silu_mul_matches_the_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = torch.randn(shape).to(dtype) * 5, torch.randn(shape).to(dtype)
    torch.testing.assert_close(silu_mul(gate, up), silu_mul_twin(gate, up), rtol=2 * STEP[dtype], atol=1e-6)


def test_silu_of_extreme_values() -> None:
    far = torch.tensor([-torch.inf, -200.0, -100.0, -87.5, -0.0, 0.0, 100.0, 3e38, torch.nan])
    one = torch.ones_like(far)
    got, wanted = silu_mul(far, one), silu_mul_twin(far, one)
    assert got[[8]].isnan().all()
    torch.testing.assert_close(got[1:8], wanted[1:8], rtol=1e-6, atol=1e-35)


def test_subnormals_are_rounded_as_in_pytorch() -> None:
    gate = torch.full((64,), 1e-20, dtype=torch.bfloat16)
    up = (torch.arange(64) * 1e-19 / 64).bfloat16()
    product = silu_mul(gate, up)
    assert 0 < float(product[-1]) < 1.2e-38
    assert torch.equal(product, silu_mul_twin(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 10, 64, 128])
def test_rotate_is_bit_identical_to_the_twin(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, 5, width).to(dtype)
    for angles in (
        torch.randn(7, 1, width // 2),
        torch.randn(3, 7, 1, width // 2),
        torch.randn(1, 7, 1, width // 2),
    ):
        cos, sin = angles.cos(), angles.sin()
        assert torch.equal(rotate(x, cos, sin), rotate_twin(x, cos, sin))
    cos, sin = torch.randn(2, 7, 1, width // 2)
    assert torch.equal(rotate(x[0], cos, sin), rotate_twin(x[0], cos, sin))  # packed (T, heads, K)
