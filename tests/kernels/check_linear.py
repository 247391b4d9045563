"""Kernels of block formats and fp8 against their twins; run by test_triton_kernels.py.

Activations are small whole numbers and weights are whole numbers of at most 8 bits times a power of two, so that
every sum is exact in any order and every type represents the weights: kernel and twin must then agree to the bit.
Real activations and weights follow, within rounding.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, INTERPRETED
from torch import Tensor

from mistral_7b.kernels.backend import has_fp8
from mistral_7b.kernels.block_formats import FORMATS, padded
from mistral_7b.kernels.gpu import weight_only as w

SHAPES = ((37, 70), (33, 1100))  # N, K: no multiples of a block
ROWS = (1, 2, 17, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One of each kind of storage: a scale, integer scales, minima, 4 and 8 bits, groups of 16
STORED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def draw(*shape: int, low: int, high: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int32).to(dtype).to(DEVICE)


def weight(kind: str, N: int, K: int, whole: bool = True) -> w.RowMajor:
    """Random codes and scales; `whole`: integer scales of 1 or 2, and d and m the same power of two in a row."""
    f = FORMATS[kind]
    G, B = padded(K) // f.group, f.blocks(K)
    codes = draw(N, padded(K) * w.stored_bits(f) // 8, low=0, high=256)
    if w.stored_bits(f) == 8 and not f.table:
        codes = codes & (2 ** (f.low + f.high) - 1)
    scales = draw(1 + f.minimum, N, G, low=1, high=3 if whole else 64, dtype=torch.int8) if f.scales else None
    d = 2.0 ** draw(1, N, 1, low=-9, high=-3, dtype=torch.float32).expand(1 + f.minimum, N, B)
    if not whole:
        d = torch.rand(1 + f.minimum, N, B, device=DEVICE) / 64
    return w.RowMajor(kind, K, codes, scales, d.half().contiguous())


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
@pytest.mark.parametrize("kind", STORED)
def test_products_are_bit_identical_to_the_twin(kind: str, dtype: torch.dtype) -> None:
    for N, K in SHAPES if kind == "Q4_K" else SHAPES[:1]:
        held = weight(kind, N, K)
        for M in ROWS if K < 100 else (1, 17):
            x = draw(M, K, low=-8, high=9, dtype=dtype)
            wanted = w.blocks_twin(x, held)
            assert torch.equal(w.blocks_linear(x, held), wanted)
            if M in (1, 17):
                assert torch.equal(w.blocks_linear(x, held, invariant=True), wanted)
    assert {"matvec", "tile"} <= set(launched)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_the_last_block_may_be_short(kind: str) -> None:
    for K in (1, 20, 32, 96, 160, 300):
        held, x = weight(kind, 35, K), draw(3, K, low=-8, high=9, dtype=torch.float32)
        assert torch.equal(w.blocks_linear(x, held), w.blocks_twin(x, held))
        assert torch.equal(w.blocks_linear(x[:1], held), w.blocks_twin(x[:1], held))
        assert torch.equal(w.expand(held, torch.float32), w.dequantized(held))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_dequantized_weights_are_bit_identical(kind: str, dtype: torch.dtype) -> None:
    for K in (70, 555):
        held = weight(kind, 37, K, whole=False)
        assert torch.equal(w.expand(held, dtype), w.dequantized(held).to(dtype))
    assert set(launched) == {"dequantize"}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_weights_are_close_to_the_twin(kind: str, dtype: torch.dtype) -> None:
    """Of two rows and more, they are rounded to the type of the activations."""
    N, K = 37, 555
    held = weight(kind, N, K, whole=False)
    for M in (1, 3):
        x = torch.randn(M, K, device=DEVICE).to(dtype)
        rounded = w.dequantized(held).to(dtype if M > 1 else torch.float32)
        wanted = F.linear(x.float(), rounded.float())
        far = (w.blocks_linear(x, held).float() - wanted).abs().max() / wanted.abs().max()
        assert far < {torch.float32: 1e-6}.get(dtype, 2.0**-8)


@pytest.mark.parametrize("M", [65, 300])
def test_many_rows_use_the_dequantized_weight(M: int) -> None:
    x = torch.randn(M, 70, device=DEVICE)
    for kind in ("Q8_0", "Q4_K"):
        held = weight(kind, 37, 70, whole=False)
        torch.testing.assert_close(w.blocks_linear(x, held), w.blocks_twin(x, held), rtol=1e-5, atol=1e-3)
    assert set(launched) == {"dequantize"}


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
        assert torch.equal(w.expand_fp8(q, scale, dtype), (q.float() * scale[:, None]).to(dtype))


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
    N, K = 33, 1100
    x = torch.randn(100, K, device=DEVICE).to(dtype)
    fp8 = w.to_fp8(torch.randn(N, K, device=DEVICE))
    four, eight = weight("Q4_K", N, K, whole=False), weight("Q8_0", N, K, whole=False)
    for linear in (
        lambda x, **how: w.blocks_linear(x, four, **how),
        lambda x, **how: w.blocks_linear(x, eight, **how),
        lambda x, **how: w.fp8_linear(x, *fp8, **how),
    ):
        all_rows = linear(x, invariant=True)
        for M in (1, 2, 17):
            assert torch.equal(linear(x[:M], invariant=True), all_rows[:M])
        for M in (2, 17, 64):
            assert torch.equal(linear(x[:M]), all_rows[:M])


def test_leading_dimensions_and_no_rows() -> None:
    fp8 = w.to_fp8(torch.randn(37, 70, device=DEVICE))
    x = draw(2, 3, 140, low=-8, high=9, dtype=torch.float32)[..., ::2]  # not contiguous
    empty = x[:, :0]
    for kind in ("Q8_0", "Q4_K"):
        held = weight(kind, 37, 70)
        assert torch.equal(w.blocks_linear(x, held), w.blocks_twin(x, held))
        assert w.blocks_linear(empty, held).shape == (2, 0, 37)
    assert w.fp8_linear(x, *fp8).shape == (2, 3, 37)
    assert w.fp8_linear(empty, *fp8).shape == (2, 0, 37)


def test_k_is_split_if_outputs_do_not_fill_a_gpu() -> None:
    assert w._split(1024, 4096, 8, 1024) == (2, 2)
    assert w._split(14336, 4096, 8, 1024) == (1, 4)
    for N, K in ((1, 1), (5, 70_000), (1024, 14336), (33, 1100)):
        splits, steps = w._split(N, K, 32, 128)
        assert (splits - 1) * steps * 128 < K <= splits * steps * 128
