"""int8, int4 and fp8 kernels against their twins; run by test_triton_kernels.py.

Activations are small whole numbers and scales powers of two, so that every sum is exact in any order: kernel
and twin must then agree to the bit, in every type. Real activations follow, within rounding.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, INTERPRETED
from torch import Tensor

from mistral_7b.kernels.backend import has_fp8
from mistral_7b.kernels.gpu import weight_only as w

SHAPES = ((37, 70), (300, 261), (33, 1100))  # N, K: no multiples of a block
ROWS = (1, 2, 3, 16, 17, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, low: int, high: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int32).to(dtype).to(DEVICE)


def scales(N: int) -> Tensor:
    return 2.0 ** draw(N, low=-9, high=-3, dtype=torch.float32)


def int4_weight(N: int, K: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    G = -(-K // group)
    z = torch.full((N, G), 8, dtype=torch.uint8, device=DEVICE) if symmetric else draw(N, G, low=0, high=16)
    m = 127 // torch.maximum(z, 15 - z)
    return w.pack_int4(draw(N, K, low=0, high=16)), m, z


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that tests of the kernels do not use the twins: `launched` lists the launches."""
    torch.manual_seed(0)
    launched.clear()
    real = w._launch
    monkeypatch.setattr(
        w, "_launch", lambda kernel, *rest, **how: (launched.append(kernel), real(kernel, *rest, **how))
    )


launched: list[str] = []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_int8_is_bit_identical_to_the_twin(N: int, K: int, dtype: torch.dtype) -> None:
    q, scale = draw(N, K, low=0, high=256), scales(N)
    for M in ROWS if N < 100 else (1, 17):
        x = draw(M, K, low=-8, high=9, dtype=dtype)
        assert torch.equal(w.int8_linear(x, q, scale), w.int8_twin(x, q, scale))
        assert torch.equal(w.int8_linear(x, q, scale, invariant=True), w.int8_twin(x, q, scale))
    assert {"matvec8", "tile8"} <= set(launched)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_int4_is_bit_identical_to_the_twin(
    N: int, K: int, dtype: torch.dtype, group: int, symmetric: bool
) -> None:
    (packed, m, z), scale = int4_weight(N, K, group, symmetric), scales(N)
    for M in ROWS if N < 100 and symmetric else (1, 17):
        x = draw(M, K, low=-8, high=9, dtype=dtype)
        wanted = w.int4_twin(x, packed, m, z, scale, group)
        assert torch.equal(w.int4_linear(x, packed, m, z, scale, group), wanted)
    assert {"matvec4", "tile4"} <= set(launched)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_weights_are_rounded_once(dtype: torch.dtype) -> None:
    N, K, group = 37, 261, 32
    scale = torch.rand(N, device=DEVICE)
    q = draw(N, K, low=0, high=256)
    assert torch.equal(w.expand_int8(q, scale, dtype), ((q.float() - 128) * scale[:, None]).to(dtype))
    packed, m, z = int4_weight(N, K, group, symmetric=False)
    wanted = (w.int4_integers(packed, m, z, group, K) * scale[:, None]).to(dtype)
    assert torch.equal(w.expand_int4(packed, m, z, scale, group, K, dtype), wanted)
    assert set(launched) == {"dequantize8", "dequantize4"}


@pytest.mark.parametrize("M", [65, 300])
def test_many_rows_use_the_dequantized_weight(M: int) -> None:
    N, K, group = 37, 70, 32
    x, scale = torch.randn(M, K, device=DEVICE), torch.rand(N, device=DEVICE)
    q, (packed, m, z) = draw(N, K, low=0, high=256), int4_weight(N, K, group, symmetric=True)
    torch.testing.assert_close(w.int8_linear(x, q, scale), w.int8_twin(x, q, scale), rtol=1e-5, atol=1e-3)
    wanted = w.int4_twin(x, packed, m, z, scale, group)
    torch.testing.assert_close(w.int4_linear(x, packed, m, z, scale, group), wanted, rtol=1e-5, atol=1e-3)
    assert set(launched) == {"dequantize8", "dequantize4"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 17, 64, 300])
def test_fp8_is_close_to_the_twin(M: int, dtype: torch.dtype) -> None:
    if not INTERPRETED and not has_fp8(DEVICE):
        pytest.skip("this GPU has no fp8")
    for N, K in ((33, 70), (48, 272)):  # torch._scaled_mm supports the second
        q, scale = w.to_fp8(torch.randn(N, K, device=DEVICE))
        x = torch.randn(M, K, device=DEVICE).to(dtype)
        wanted = w.fp8_twin(x, q, scale).float()
        far = (w.fp8_linear(x, q, scale).float() - wanted).abs().max() / wanted.abs().max()
        assert far < {torch.float32: 1e-6}.get(dtype, 2.0**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_quantization_is_bit_identical_to_the_twin(dtype: torch.dtype) -> None:
    x = (torch.randn(17, 300, device=DEVICE) * torch.logspace(-4, 4, 17, device=DEVICE)[:, None]).to(dtype)
    x[5] = 0
    (q, scale), (wanted, wanted_scale) = w.to_fp8(x), w.to_fp8_twin(x)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(q.view(torch.uint8), wanted.view(torch.uint8))
    assert launched == ["quantize_fp8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_batch_invariant(dtype: torch.dtype) -> None:
    """Activations in general: 2 to 64 rows by default, 1 to 100 with `invariant`."""
    N, K, group = 33, 1100, 128
    x, scale = torch.randn(100, K, device=DEVICE).to(dtype), torch.rand(N, device=DEVICE)
    q, (packed, m, z) = draw(N, K, low=0, high=256), int4_weight(N, K, group, symmetric=False)
    fp8 = w.to_fp8(torch.randn(N, K, device=DEVICE))
    for linear in (
        lambda x, **how: w.int8_linear(x, q, scale, **how),
        lambda x, **how: w.int4_linear(x, packed, m, z, scale, group, **how),
        lambda x, **how: w.fp8_linear(x, *fp8, **how),
    ):
        all_rows = linear(x, invariant=True)
        for M in (1, 2, 17):
            assert torch.equal(linear(x[:M], invariant=True), all_rows[:M])
        for M in (2, 17, 64):
            assert torch.equal(linear(x[:M]), all_rows[:M])


def test_leading_dimensions_and_no_rows() -> None:
    q, scale = draw(37, 70, low=0, high=256), scales(37)
    packed, m, z = int4_weight(37, 70, 32, symmetric=True)
    fp8 = w.to_fp8(torch.randn(37, 70, device=DEVICE))
    x = draw(2, 3, 140, low=-8, high=9, dtype=torch.float32)[..., ::2]  # not contiguous
    assert torch.equal(w.int8_linear(x, q, scale), w.int8_twin(x, q, scale))
    assert torch.equal(w.int4_linear(x, packed, m, z, scale, 32), w.int4_twin(x, packed, m, z, scale, 32))
    assert w.fp8_linear(x, *fp8).shape == (2, 3, 37)
    empty = x[:, :0]
    assert w.int8_linear(empty, q, scale).shape == w.fp8_linear(empty, *fp8).shape == (2, 0, 37)
    assert w.int4_linear(empty, packed, m, z, scale, 32).shape == (2, 0, 37)


def test_k_is_split_if_outputs_do_not_fill_a_gpu() -> None:
    assert w._split(1024, 4096, 8, 1024) == (2, 2048)
    assert w._split(14336, 4096, 8, 1024) == (1, 4096)
    for N, K in ((1, 1), (5, 70_000), (1024, 14336), (33, 1100)):
        splits, span = w._split(N, K, 32, 128)
        assert (splits - 1) * span < K <= splits * span
        assert span % 128 == 0
