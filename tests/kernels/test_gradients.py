"""Gradients of the operators: those of a Linear with the dequantized weight, and of the elementwise twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_linear import weight
from torch import Tensor, nn

from mistral_7b.kernels import elementwise
from mistral_7b.kernels.block_formats import FORMATS
from mistral_7b.kernels.cpu import calls, compiler
from mistral_7b.quantization.gpu import Fp8Linear, GpuBlockLinear
from mistral_7b.quantization.linear import PackedLinear


def gradient(product: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    product(x).backward(grad)
    assert x.grad is not None
    return x.grad


def near(got: Tensor, wanted: Tensor) -> None:
    """Within the rounding of got's type, relative to the size of a sum."""
    share = {torch.bfloat16: 1e-2, torch.float32: 2e-6, torch.float64: 1e-12}[got.dtype]
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= share * wanted.norm()


def kept_by(product: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """What is kept for the backward pass."""
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        product(x.detach().requires_grad_())
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (35, 300), (67, 1280), (1100, 512)])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_gradient_of_a_quantized_product(kind: str, n: int, k: int, dtype: torch.dtype) -> None:
    linear, draw = weight(kind, n, k), torch.Generator().manual_seed(k)
    x, grad = (torch.randn(2, 3, m, generator=draw).to(dtype) for m in (k, n))
    got = gradient(linear, x, grad)
    assert got.dtype == dtype
    near(got, grad.double() @ linear.dequantized().double())
    packed = gradient(linear, x.flatten(0, 1), grad.flatten(0, 1))
    assert torch.equal(packed, got.flatten(0, 1))


@pytest.mark.skipif(compiler.library() is None, reason="needs the CPU kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", FORMATS)
def test_dequantized_weights_are_those_of_the_twin(kind: str, dtype: torch.dtype) -> None:
    for n, k in ((1, 32), (35, 300), (67, 1000), (16, 1280)):
        linear = weight(kind, n, k)
        wanted = linear.dequantized().to(dtype)
        for first, width in ((0, k), (0, min(k, 256)), *([(256, k - 256)] if k > 256 else [])):
            out = torch.full((n, width), torch.nan, dtype=dtype)
            calls.dequantize(linear.described(), out, first)
            assert torch.equal(out, wanted[:, first : first + width])


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_of_a_packed_product(deterministic: bool) -> None:
    w = torch.randn(67, 300).bfloat16()
    x, grad = torch.randn(2, 40, 300).bfloat16(), torch.randn(2, 40, 67).bfloat16()
    near(gradient(PackedLinear(w, deterministic), x, grad), grad.double() @ w.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_products_of_a_gpu(dtype: torch.dtype) -> None:
    """Their twins, on the CPU: nothing is kept for the backward pass but the quantized weight."""
    block = weight("Q4_K", 67, 512)
    x, grad = torch.randn(5, 512).to(dtype), torch.randn(5, 67).to(dtype)
    fp8 = Fp8Linear.from_weight(torch.randn(67, 512))
    for linear in (GpuBlockLinear.of(block), fp8):
        near(gradient(linear, x, grad), grad.double() @ linear.dequantized().double())
        assert not kept_by(linear, x)


def test_a_quantized_product_keeps_nothing() -> None:
    linear: nn.Module = weight("Q4_K", 67, 512)
    assert not kept_by(linear, torch.randn(5, 512))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradients_of_elementwise_operators(dtype: torch.dtype) -> None:
    x, up = (torch.randn(2, 7, 4, 16).to(dtype) for _ in range(2))
    w, angle, grad = torch.randn(16).to(dtype), torch.randn(7, 1, 8), torch.randn(2, 7, 4, 16).to(dtype)
    cases = (
        (elementwise.rms_norm, elementwise.rms_norm_twin, (x, w, 1e-5)),
        (elementwise.silu_mul, elementwise.silu_mul_twin, (x, up)),
        (elementwise.rotate, elementwise.rotate_twin, (x, angle.cos(), angle.sin())),
    )
    for operator, twin, inputs in cases:
        trained = [t.requires_grad_() for t in inputs if t is x or t is up or t is w]
        got, wanted = (torch.autograd.grad(f(*inputs), trained, grad) for f in (operator, twin))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)


def test_a_rotation_keeps_its_angles_alone() -> None:
    """Its backward pass is the rotation by the opposite angles, which needs no x."""
    x, angle = torch.randn(2, 7, 4, 16), torch.randn(7, 1, 8)
    cos, sin = angle.cos(), angle.sin()
    kept = kept_by(lambda t: elementwise.rotate(t, cos, sin), x)
    assert sum(t.nbytes for t in kept) == cos.nbytes + sin.nbytes < x.nbytes


@pytest.mark.parametrize("width", [16, 100, 4096])
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_the_gradients_of_a_frozen_norm_and_of_a_gate(width: int, dtype: torch.dtype, step: float) -> None:
    """Their kernels against float64, also for rows that do not fill vectors, and rows shared among threads."""
    x, up, w, grad = (torch.randn(n, width).to(dtype) for n in (40, 40, 1, 40))
    wide = [t.double() for t in (x, up, w[0], grad)]
    cases = (
        (elementwise.rms_norm, elementwise.rms_norm_twin, (0,), (2,), (1e-5,)),
        (elementwise.silu_mul, elementwise.silu_mul_twin, (0, 1), (), ()),
    )
    for operator, twin, trained, frozen, rest in cases:
        got, exact = (
            torch.autograd.grad(f(*own, *(of[i] for i in frozen), *rest), own, of[3])
            for f, of in ((operator, (x, up, w[0], grad)), (twin, wide))
            for own in [[of[i].clone().requires_grad_() for i in trained]]
        )
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), b, atol=step, rtol=step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strided_inputs_are_computed_as_contiguous_ones(dtype: torch.dtype) -> None:
    """Also the norm's weight; and torch.compile is told the strides that results have."""
    x, w = torch.randn(5, 6, 16).to(dtype).transpose(0, 1), torch.randn(32).to(dtype)[::2]
    assert torch.equal(
        elementwise.rms_norm(x, w, 1e-5), elementwise.rms_norm(x.contiguous(), w.contiguous(), 1e-5)
    )
    grads = [gradient(lambda t, v=v: elementwise.rms_norm(t, v, 1e-5), x, x) for v in (w, w.contiguous())]
    assert torch.equal(*grads)
    for name, inputs in (("rms_norm", (x, w, 1e-5)), ("silu_mul", (x, x))):
        torch.library.opcheck(getattr(torch.ops.mistral_7b, name), inputs, test_utils="test_faketensor")
        if dtype != torch.float64:
            back = getattr(torch.ops.mistral_7b, f"{name}_back")
            torch.library.opcheck(back, (*inputs, x), test_utils="test_faketensor")
