"""The twins of the Triton kernels against their definitions, without Triton."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, tiny_model

from mistral_7b.attention import attention, visible
from mistral_7b.kernels.block_formats import FORMATS, padded
from mistral_7b.kernels.elementwise import rms_norm_twin, rotate_twin, silu_mul_twin
from mistral_7b.kernels.gpu import weight_only as w
from mistral_7b.kernels.gpu.decode_attention import decode_attention_twin
from mistral_7b.model import FeedForward, RMSNorm, rope_phases, rotate


def draw(*shape: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, shape).to(torch.uint8)


def weight(kind: str, n: int, k: int) -> w.RowMajor:
    """Random codes and scales."""
    f = FORMATS[kind]
    codes = draw(n, padded(k) * w.stored_bits(f) // 8, low=0, high=256)
    scales = draw(1 + f.minimum, n, padded(k) // f.group, low=0, high=64).to(torch.int8) if f.scales else None
    return w.RowMajor(kind, k, codes, scales, torch.rand(1 + f.minimum, n, f.blocks(k)).half())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "Q6_K"])
def test_block_formats_match_their_definition(kind: str) -> None:
    """The formula of the docstring, weight by weight, in float64 (which has no kernel and no rounding)."""
    f, (n, k) = FORMATS[kind], (3, 300)
    held, x = weight(kind, n, k), torch.randn(4, k, dtype=torch.float64)
    assert held.shape == (n, k)
    wanted = torch.empty(n, k, dtype=torch.float64)
    for row in range(n):
        for i in range(k):
            four = f.low + f.high == 4
            code = int(held.codes[row, i // 2]) >> (i % 2 * 4) & 15 if four else int(held.codes[row, i])
            s, t = (1, 1) if held.scales is None else held.scales[[0, -1], row, i // f.group].tolist()
            m = float(held.d[1, row, i // f.block]) if f.minimum else 0
            wanted[row, i] = float(held.d[0, row, i // f.block]) * s * (code - f.zero) - m * t
    torch.testing.assert_close(w.expand(held, torch.float64), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(w.blocks_linear(x, held), x @ wanted.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(w.expand(held, torch.bfloat16), w.dequantized(held).bfloat16())


def test_fp8_scales_rows_by_their_absmax() -> None:
    x = torch.randn(6, 64) * torch.logspace(-4, 4, 6)[:, None]
    x[3] = 0
    q, scale = w.to_fp8(x)
    assert q.dtype == torch.float8_e4m3fn
    back = q.float() * scale[:, None]
    assert not back.isnan().any()
    assert torch.equal(back[3], x[3])
    largest = x.abs().amax(-1, keepdim=True)
    assert bool(((back - x).abs() <= largest * 2.0**-4 / 1.75).all())  # half a step of 3 bits of mantissa
    weight, w_scale = w.to_fp8(torch.randn(9, 64))
    y = w.fp8_linear(x, weight, w_scale)
    torch.testing.assert_close(y, back @ (weight.float() * w_scale[:, None]).T, rtol=1e-5, atol=1e-4)
    assert w.fp8_linear(x.bfloat16(), weight, w_scale).dtype == torch.bfloat16


def test_gradients_of_activations() -> None:
    """QLoRA needs gradients through a quantized weight, which use the twin, also on a GPU."""
    x, held = torch.randn(3, 70, requires_grad=True), weight("Q4_K", 5, 70)
    w.blocks_linear(x, held).sum().backward()
    torch.testing.assert_close(x.grad[0], w.expand(held, torch.float32).sum(0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_twins_match_the_model(dtype: torch.dtype) -> None:
    model = tiny_model(TINY, dtype)
    x = torch.randn(2, 5, TINY.dim).to(dtype)
    norm, forward = model.layers[0].ffn_norm, model.layers[0].feed_forward
    assert isinstance(norm, RMSNorm)
    assert isinstance(forward, FeedForward)
    assert torch.equal(rms_norm_twin(x, norm.weight, norm.eps), norm(x))
    assert torch.equal(forward.w2(silu_mul_twin(forward.w1(x), forward.w3(x))), forward(x))
    heads = torch.randn(2, 5, 6, 10).to(dtype)
    rope = rope_phases(torch.arange(5), TINY, dtype)
    assert torch.equal(rotate_twin(heads, *rope), rotate(heads, rope))


def test_the_operators_are_registered_for_cuda() -> None:
    for name in ("rms_norm", "silu_mul", "rotate", "attend"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mistral_7b::{name}", "CUDA")


def test_decode_attention_is_attention() -> None:
    q, k, v = (torch.randn(2, n, h, 10, dtype=torch.float64) for n, h in ((1, 6), (40, 3), (40, 3)))
    seen = visible(torch.tensor([[50], [39]]), torch.arange(40).expand(2, -1), 20)
    torch.testing.assert_close(decode_attention_twin(q, k, v, seen), attention(q, k, v, seen))
    torch.testing.assert_close(decode_attention_twin(q, k, v, None), attention(q, k, v))
