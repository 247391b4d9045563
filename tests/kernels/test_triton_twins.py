"""The twins of the Triton kernels against their definitions, without Triton."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, tiny_model

from mistral_7b.attention import attention, visible
from mistral_7b.kernels.elementwise import rms_norm_twin, rotate_twin, silu_mul_twin
from mistral_7b.kernels.gpu import weight_only as w
from mistral_7b.kernels.gpu.decode_attention import decode_attention_twin
from mistral_7b.model import FeedForward, RMSNorm, rope_phases, rotate


def draw(*shape: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, shape).to(torch.uint8)


def test_nibbles_are_packed_low_first_in_whole_words() -> None:
    q = draw(3, 37, low=0, high=16)
    packed = w.pack_int4(q)
    assert packed.shape == (3, 32)
    assert packed.dtype == torch.uint8
    assert packed[1, 2] == q[1, 4] + 16 * q[1, 5]
    assert not packed[:, 19:].any()
    assert torch.equal(w.unpack_int4(packed, 37), q)
    assert w.pack_int4(draw(3, 4096, low=0, high=16)).shape == (3, 2048)  # exactly 4 bits per weight


def test_int8_and_int4_match_their_definition() -> None:
    """The formulas of the docstring, weight by weight, in float64 (which has no kernel and no rounding)."""
    N, K, group = 5, 70, 32
    x, scale = torch.randn(4, K, dtype=torch.float64), torch.rand(N)
    q8, q4 = draw(N, K, low=0, high=256), draw(N, K, low=0, high=16)
    z = draw(N, 3, low=0, high=16)
    m = 127 // torch.maximum(z, 15 - z)
    w8, w4 = torch.empty(N, K, dtype=torch.float64), torch.empty(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            g = k // group
            w8[n, k] = float(scale[n]) * (int(q8[n, k]) - 128)
            w4[n, k] = float(scale[n]) * int(m[n, g]) * (int(q4[n, k]) - int(z[n, g]))
    torch.testing.assert_close(w.int8_linear(x, q8, scale), x @ w8.T, rtol=1e-12, atol=1e-12)
    packed = w.pack_int4(q4)
    torch.testing.assert_close(w.int4_linear(x, packed, m, z, scale, group), x @ w4.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w.expand_int8(q8, scale, torch.float64), w8, rtol=1e-6, atol=1e-6)
    wide = w.expand_int4(packed, m, z, scale, group, K, torch.float64)
    torch.testing.assert_close(wide, w4, rtol=1e-6, atol=1e-6)
    assert w.int4_integers(packed, m, z, group, K).abs().max() <= 127  # an int4 weight is an int8 weight


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
    x = torch.randn(3, 70, requires_grad=True)
    q, scale = draw(5, 70, low=0, high=256), torch.rand(5)
    w.int8_linear(x, q, scale).sum().backward()
    torch.testing.assert_close(x.grad[0], w.expand_int8(q, scale, torch.float32).sum(0), rtol=1e-5, atol=1e-3)


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
