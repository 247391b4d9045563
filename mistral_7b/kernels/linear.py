"""y = x W^T with W in GGUF's block formats: the kernel of cpu/blocks.h as an operator, and its PyTorch twin.

Activations are quantized to int8 with a scale per block of 32 or 256 inputs. The products with a block are summed
as integers, which is exact in any order, and the sums of blocks are added as float32 in block order. So the twin
and all kernels are bit-identical, and the result of a row does not depend on the other rows.

... any leading dimensions · N outputs · K inputs · B blocks of K · T tiles of 16 outputs · L lines of a tile
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import DEQUANTIZE, LINEAR, PACKED_LINEAR, QUANTIZED_LINEAR, Backend, uses
from .block_formats import FORMATS, TILE, dequantize, float_scales, integer_weight, padded
from .cpu import calls, compiler
from .cpu.arguments import Weights

OPS = torch.library.Library("mistral_7b", "DEF")
PIECE = 1024  # inputs, or outputs, of a weight that are dequantized at a time for a gradient


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows (..., K) to integers -127..127, as float32, with scales (..., 1): x is about q * scale."""
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(absmax > 0, torch.full_like(absmax, 127.0) / absmax, 0.0)
    q = (x * inverse).round()
    return torch.where(inverse.isfinite() & absmax.isfinite(), q, 0.0), absmax / 127


def uses_cpu_kernels(x: Tensor) -> bool:
    """Whether the CPU kernels compute this product. Warns once if they could not be compiled."""
    if uses(Backend.CPU, QUANTIZED_LINEAR, x):
        return True
    compiler.warn_if_missing()
    return False


def block_weights(kind: str, codes: Tensor, d: Tensor, n: int, inputs: int) -> Weights:
    """The kernels' descriptor of a weight in tiles (block_formats.py); it holds pointers to the tensors."""
    return Weights(N=n, Kp=padded(inputs), codes=codes.data_ptr(), d=d.data_ptr(), kind=FORMATS[kind].code)


def block_linear_twin(x: Tensor, codes: Tensor, d: Tensor, n: int, kind: str) -> Tensor:
    """`block_linear` in plain PyTorch, one block at a time."""
    f, inputs = FORMATS[kind], x.shape[-1]
    weight, t = integer_weight(kind, codes, inputs)  # (N, B, block), (N, B, G)
    scale, minimum = float_scales(d)  # (N, B)
    blocks = F.pad(x, (0, f.blocks(inputs) * f.block - inputs)).unflatten(-1, (-1, f.block))
    q, sx = quantize_rows(blocks)  # (..., B, block), (..., B, 1)
    out = torch.zeros(*x.shape[:-1], len(weight))
    for b in range(weight.shape[1]):
        xb, sxb = q[..., b, :].double(), sx[..., b, :]
        sums = (xb @ weight[:, b].double().T).float()  # exact: integers far below 2^53
        out = out + sums * (scale[:, b] * sxb)
        if minimum is None:
            continue
        groups = xb.unflatten(-1, (-1, f.group)).sum(-1)  # (..., G)
        if t is None:
            out = out + groups.float() * (minimum[:, b] * sxb)
        else:
            out = out - (groups @ t[:, b].double().T).float() * (minimum[:, b] * sxb)
    return out[..., :n].to(x.dtype).contiguous()


def _block(x: Tensor, codes: Tensor, d: Tensor, n: int, kind: str) -> Tensor:
    if uses_cpu_kernels(x):
        return calls.linear(block_weights(kind, codes, d, n, x.shape[-1]), x)
    return block_linear_twin(x, codes, d, n, kind)


def block_linear_gradient_twin(grad: Tensor, codes: Tensor, d: Tensor, inputs: int, kind: str) -> Tensor:
    """`block_linear_gradient` in plain PyTorch, some tiles at a time; sums in float32 or wider."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    rows = F.pad(grad.flatten(0, -2), (0, len(codes) * TILE - grad.shape[-1])).to(wide)  # (M, N padded)
    out = rows.new_zeros(len(rows), inputs)
    tiles = PIECE // TILE
    for part, c, s in zip(rows.split(PIECE, 1), codes.split(tiles), d.split(tiles), strict=True):
        out.addmm_(part, dequantize(kind, c, s, inputs).to(wide))
    return out.to(grad.dtype).view(*grad.shape[:-1], inputs)


def _block_gradient(grad: Tensor, codes: Tensor, d: Tensor, inputs: int, kind: str) -> Tensor:
    """`block_linear_gradient`: bfloat16 weights where the CPU multiplies them fast, else float32 ones."""
    fast = all(uses(Backend.ONEDNN, operation, grad) for operation in (LINEAR, PACKED_LINEAR))
    dtype = torch.bfloat16 if fast else torch.float32
    if not uses(Backend.CPU, DEQUANTIZE, grad.new_empty(0, dtype=dtype)):
        return block_linear_gradient_twin(grad, codes, d, inputs, kind)
    rows, out = grad.flatten(0, -2).to(dtype), grad.new_empty((*grad.shape[:-1], inputs))
    n, weight = grad.shape[-1], block_weights(kind, codes, d, grad.shape[-1], inputs)
    memory = grad.new_empty(n * min(PIECE, inputs), dtype=dtype)
    for first, part in zip(range(0, inputs, PIECE), out.split(PIECE, -1), strict=True):
        piece = memory[: n * part.shape[-1]].view(n, -1)
        calls.dequantize(weight, piece, first)
        part.copy_((rows @ piece).view(part.shape))
    return out


OPS.define("block_linear(Tensor x, Tensor codes, Tensor d, int n, str kind) -> Tensor")
OPS.impl("block_linear", _block, "CPU")
torch.library.register_fake(
    "mistral_7b::block_linear", lambda x, codes, d, n, kind: x.new_empty((*x.shape[:-1], n))
)
OPS.define("block_linear_gradient(Tensor grad, Tensor codes, Tensor d, int inputs, str kind) -> Tensor")
OPS.impl("block_linear_gradient", _block_gradient, "CPU")
torch.library.register_fake(
    "mistral_7b::block_linear_gradient",
    lambda grad, codes, d, inputs, kind: grad.new_empty((*grad.shape[:-1], inputs)),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.weight, _, ctx.kind = inputs  # not saved tensors: recomputation may end before their product
    ctx.inputs = x.shape[-1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, d = ctx.weight
    return block_linear_gradient(grad, codes, d, ctx.inputs, ctx.kind), None, None, None, None


torch.library.register_autograd("mistral_7b::block_linear", _gradient, setup_context=_keep, lib=OPS)


def block_linear(x: Tensor, codes: Tensor, d: Tensor, n: int, kind: str) -> Tensor:
    """x (..., K) times tiles of a block format, codes (T, L, 64), d (T, B, 1 or 2, 16): (..., n), in x's type."""
    return torch.ops.mistral_7b.block_linear(x, codes, d, n, kind)


def block_linear_gradient(grad: Tensor, codes: Tensor, d: Tensor, inputs: int, kind: str) -> Tensor:
    """The gradient (..., K) of `block_linear` with respect to x, from that of its result (..., n): grad @ W.

    W is the dequantized weight; the rounding of activations counts as the identity (straight-through).
    """
    return torch.ops.mistral_7b.block_linear_gradient(grad, codes, d, inputs, kind)
