"""RMSNorm, rotary embedding and SwiGLU's gate, each in one pass over memory.

The twins are the code of model.py. The kernels round at the same points, so float32 and bfloat16 results equal the
twins' except for the order of one sum (RMSNorm) and the last bit of one exponential (SiLU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import RMS_NORM, ROTATE, SILU_MUL, Backend, choose, uses
from .cpu import calls
from .gpu import elementwise as gpu
from .linear import OPS


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, cast to x's type, times the weight."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def silu_mul_twin(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def rotate_twin(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent pairs of x (..., heads, K) by angles (..., 1, K/2)."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, backend = x.contiguous(), choose(RMS_NORM, x, weight).backend
    if backend is Backend.PYTORCH or not x.numel():
        return rms_norm_twin(x, weight, eps)
    return (calls if backend is Backend.CPU else gpu).rms_norm(x, weight, eps)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    backend = choose(SILU_MUL, gate, up).backend
    gate, up = gate.contiguous(), up.contiguous()
    if backend is Backend.PYTORCH or not gate.numel():
        return silu_mul_twin(gate, up)
    return (calls if backend is Backend.CPU else gpu).silu_mul(gate, up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    backend = choose(ROTATE, x, cos, sin).backend
    if backend is Backend.TRITON and x.numel():
        return gpu.rotate(x, cos, sin)
    # The kernel repeats the angles over leading dimensions: (T,) positions for tokens (B, T).
    repeatable = cos.shape[:-2] == x.shape[x.dim() - cos.dim() : -2]
    if backend is Backend.CPU and x.numel() and repeatable:
        return calls.rotate(x, cos, sin)
    return rotate_twin(x, cos, sin)


def _like(x: Tensor, *rest: object) -> Tensor:
    """What torch.compile expects of a result: it is contiguous, also where x is not."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


OPS.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
OPS.define("silu_mul(Tensor gate, Tensor up) -> Tensor")
OPS.define("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor")
for name, kernel in (("rms_norm", _rms_norm), ("silu_mul", _silu_mul), ("rotate", _rotate)):
    for device in ("CPU", "CUDA"):
        OPS.impl(name, kernel, device)
    torch.library.register_fake(f"mistral_7b::{name}", _like)


# Backward passes are operators too, so that torch.compile can call them.
OPS.define("rms_norm_back(Tensor x, Tensor weight, float eps, Tensor grad) -> Tensor")
OPS.define("silu_mul_back(Tensor gate, Tensor up, Tensor grad) -> (Tensor, Tensor)")
OPS.impl("rms_norm_back", calls.rms_norm_back, "CPU")
OPS.impl("silu_mul_back", calls.silu_mul_back, "CPU")
torch.library.register_fake("mistral_7b::rms_norm_back", _like)
torch.library.register_fake("mistral_7b::silu_mul_back", lambda gate, up, grad: (_like(gate), _like(up)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))
    ctx.others = [value for value in inputs if not isinstance(value, Tensor)]


def _of_twin(twin: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward pass of an operator: that of its twin, computed again from the saved inputs."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        tensors = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=False)]
        with torch.enable_grad():
            out = twin(*tensors, *ctx.others)
        found = iter(torch.autograd.grad(out, [t for t in tensors if t.requires_grad], grad))
        return tuple(next(found) if n else None for n in needed)

    return backward


_rms_norm_back_twin, _silu_mul_back_twin = _of_twin(rms_norm_twin), _of_twin(silu_mul_twin)


def _rms_norm_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    # The kernel is for a weight that is not trained.
    if ctx.needs_input_grad[1] or not grad.numel() or not uses(Backend.CPU, RMS_NORM, grad, x, weight):
        return _rms_norm_back_twin(ctx, grad)
    (eps,) = ctx.others
    return torch.ops.mistral_7b.rms_norm_back(x, weight, eps, grad), None, None


def _silu_mul_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    if not grad.numel() or not uses(Backend.CPU, SILU_MUL, grad, gate, up):
        return _silu_mul_back_twin(ctx, grad)
    return tuple(torch.ops.mistral_7b.silu_mul_back(gate, up, grad))


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _rotate_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return rotate(grad, cos, -sin), None, None


for name, backward, keep in (
    ("rms_norm", _rms_norm_back, _keep),
    ("silu_mul", _silu_mul_back, _keep),
    ("rotate", _rotate_back, _keep_angles),
):
    torch.library.register_autograd(f"mistral_7b::{name}", backward, setup_context=keep, lib=OPS)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., D) by weight (D,)."""
    return torch.ops.mistral_7b.rms_norm(x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of the same shape."""
    return torch.ops.mistral_7b.silu_mul(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., heads, K), interleaved, by float32 cos and sin (..., 1, K/2)."""
    return torch.ops.mistral_7b.rotate(x, cos, sin)
