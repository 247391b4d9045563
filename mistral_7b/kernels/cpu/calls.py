"""Python bindings of the functions in entry.cpp, each with one structure of arguments.py.

Call them only if backend.py selects the CPU kernels: devices and types are not checked again.

With one call per operation, the Python interpreter takes a tenth of a decode step, because streaming the weights
evicts its memory from the CPU's caches. So a block is two calls (`project`, `finish_block`), or all blocks are one
(`layers`). Their twin is the model itself.
"""

from __future__ import annotations

import ctypes
from ctypes import addressof, byref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import arguments, compiler
from .arguments import PTR, Block, Weights

if TYPE_CHECKING:
    from ..attend import Place, Remembered


def linear(weight: Weights, x: Tensor) -> Tensor:
    """x (..., K) times a quantized weight: (..., N), in x's type. Other float types are converted to float32."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return linear(weight, x.float()).to(x.dtype)
    x, K = x.contiguous(), x.shape[-1]
    out = x.new_empty((*x.shape[:-1], weight.N))
    if not x.numel():
        return out
    call = arguments.LinearCall(
        weight=addressof(weight), x=x.data_ptr(), out=out.data_ptr(), M=x.numel() // K, K=K, **_common(x)
    )
    _library().m7b_linear(byref(call))
    return out


def dequantize(weight: Weights, out: Tensor, first: int) -> None:
    """Write the inputs first .. first + width of a quantized weight's rows to out (N, width), contiguous.

    `first` is a multiple of 256. Values are rounded to out's type, float32 or bfloat16.
    """
    call = arguments.DequantizeCall(
        weight=addressof(weight), out=out.data_ptr(), first=first, width=out.shape[1], **_common(out)
    )
    _library().m7b_dequantize(byref(call))


def low_rank(adapters: ctypes.Array[Any], mixture: arguments.Mixture, x: Tensor, y: Tensor) -> None:
    """Add the LoRA update of x (M, K) to y (M, N), contiguous, in place."""
    x = x.contiguous()
    call = arguments.LowRankCall(
        adapters=addressof(adapters), mixture=addressof(mixture), x=x.data_ptr(), y=y.data_ptr(),
        M=x.shape[0], K=x.shape[1], N=y.shape[1], **_common(x),
    )  # fmt: skip
    _library().m7b_low_rank(byref(call))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., D) with weight (D,)."""
    x, weight, D = x.contiguous(), weight.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    call = arguments.RMSNormCall(
        x=x.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), M=x.numel() // D, D=D, eps=eps, **_common(x)
    )
    _library().m7b_rms_norm(byref(call))
    return out


def rms_norm_back(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> Tensor:
    """The gradient of x (..., D) of `rms_norm`, from that of its result."""
    x, weight, grad, D = x.contiguous(), weight.contiguous(), grad.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    call = arguments.RMSNormBackCall(
        x=x.data_ptr(), weight=weight.data_ptr(), grad=grad.data_ptr(), out=out.data_ptr(), M=x.numel() // D, D=D,
        eps=eps, **_common(x),
    )  # fmt: skip
    _library().m7b_rms_norm_back(byref(call))
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    call = arguments.SiluMulCall(
        gate=gate.data_ptr(), up=up.data_ptr(), out=out.data_ptr(), n=gate.numel(), **_common(gate)
    )
    _library().m7b_silu_mul(byref(call))
    return out


def silu_mul_back(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up of `silu_mul`, from that of its result."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    call = arguments.SiluMulBackCall(
        gate=gate.data_ptr(), up=up.data_ptr(), grad=grad.data_ptr(), d_gate=d_gate.data_ptr(),
        d_up=d_up.data_ptr(), n=gate.numel(), **_common(gate),
    )  # fmt: skip
    _library().m7b_silu_mul_back(byref(call))
    return d_gate, d_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., heads, D); cos, sin (..., 1, D/2) repeat over leading dimensions they lack."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    heads, D = x.shape[-2:]
    call = arguments.RotateCall(
        x=x.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), out=out.data_ptr(), M=x.numel() // (heads * D),
        angles=cos.numel() // (D // 2), heads=heads, D=D, **_common(x),
    )  # fmt: skip
    _library().m7b_rotate(byref(call))
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered, window: int,
    keep: bool,
) -> Tensor:  # fmt: skip
    """Attention of bfloat16 or float32 q (..., H, D), see ../attend.py. `window` 0: no window."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    H, D = q.shape[-2:]
    call, tensors = _attend(
        old.place, q.numel() // (H * D), window, H=H, G=k.shape[-2], D=D, bf16=q.dtype == torch.bfloat16,
        int8=k.dtype == torch.int8, keep=keep,
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), k_scale=_pointer(k_scale), v_scale=_pointer(v_scale),
        old_k=old.k.data_ptr(), old_v=old.v.data_ptr(), old_k_scale=_pointer(old.k_scale),
        old_v_scale=_pointer(old.v_scale), out=out.data_ptr(),
    )  # fmt: skip
    _library().m7b_attend(byref(call))
    del tensors
    return out


def project(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (..., H, K), k and v (..., G, K) of the normalized x (..., D), with RoPE applied to q and k.

    cos and sin (..., 1, K/2) float32 repeat over leading dimensions of x that they lack.
    """
    x, cos, sin, K = x.contiguous(), cos.contiguous(), sin.contiguous(), block.head_dim
    q, k, v = (x.new_empty((*x.shape[:-1], w.N // K, K)) for w in (block.wq, block.wk, block.wv))
    call = arguments.ProjectCall(
        block=addressof(block), x=x.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), q=q.data_ptr(),
        k=k.data_ptr(), v=v.data_ptr(), M=x.numel() // block.dim, angles=cos.numel() // (K // 2), **_common(x),
    )  # fmt: skip
    _library().m7b_project(byref(call))
    return q, k, v


def finish_block(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """The block's output (..., D) from its input x (..., D) and its attention output (..., H, K)."""
    x, attended = x.contiguous(), attended.contiguous()
    out = torch.empty_like(x)
    call = arguments.FinishBlockCall(
        block=addressof(block), x=x.data_ptr(), attended=attended.data_ptr(), out=out.data_ptr(),
        M=x.numel() // block.dim, **_common(x),
    )  # fmt: skip
    _library().m7b_finish_block(byref(call))
    return out


def layers(
    blocks: list[Block], x: Tensor, cos: Tensor, sin: Tensor, entries: list[tuple[Tensor, ...]], place: Place,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Apply all blocks to bfloat16 x (..., D); the cache is read and updated as in `attend`.

    cos, sin    (..., 1, K/2) float32, repeated over leading dimensions that they lack
    entries     per layer the cached keys and values (..., G, K), for int8 also their scales, stored as in `place`
    """
    first, x, cos, sin = blocks[0], x.contiguous().clone(), cos.contiguous(), sin.contiguous()
    K = first.head_dim
    pointers = [t.data_ptr() for layer in entries for t in layer]
    block_array, cache_pointers = (Block * len(blocks))(*blocks), (PTR * len(pointers))(*pointers)
    attend_call, tensors = _attend(
        place, x.numel() // first.dim, window or 0, H=first.wq.N // K, G=first.wk.N // K, D=K,
        int8=entries[0][0].dtype == torch.int8,
    )  # fmt: skip
    call = arguments.LayersCall(
        attend=attend_call, blocks=addressof(block_array), entries=addressof(cache_pointers), x=x.data_ptr(),
        cos=cos.data_ptr(), sin=sin.data_ptr(), layers=len(blocks), angles=cos.numel() // (K // 2),
    )  # fmt: skip
    _library().m7b_layers(byref(call))
    del tensors
    return x


def round_blocks(x: Tensor, q6: bool, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Round x (N, K) to Q4_K or Q6_K: q (N, B * 256) and scales (N, B, bytes) uint8, d float16 (N, B, 1 or 2).

    `importance` float32 (K,) weights the error of each input. d is not finite for blocks with values that are not.
    """
    x, (N, K) = x.contiguous(), x.shape
    importance = None if importance is None else importance.contiguous()
    blocks = -(-K // 256)
    q = torch.empty(N, blocks * 256, dtype=torch.uint8)
    scales = torch.empty(N, blocks, 16 if q6 else 12, dtype=torch.uint8)
    d = torch.empty(N, blocks, 1 if q6 else 2, dtype=torch.float16)
    call = arguments.RoundCall(
        x=x.data_ptr(), importance=_pointer(importance), q=q.data_ptr(), scales=scales.data_ptr(),
        d=d.data_ptr(), N=N, K=K, q6=q6, **_common(x),
    )  # fmt: skip
    _library().m7b_round(byref(call))
    return q, scales, d


def feedback(target: Tensor, w: Tensor, factor: Tensor, step: Tensor, q: Tensor, low: int, high: int) -> None:
    """Round the columns of w (N, C) to q, with error feedback; all contiguous float32. w becomes the errors."""
    call = arguments.FeedbackCall(
        target=target.data_ptr(), w=w.data_ptr(), factor=factor.data_ptr(), step=step.data_ptr(),
        q=q.data_ptr(), N=w.shape[0], C=w.shape[1], low=low, high=high, threads=torch.get_num_threads(),
    )  # fmt: skip
    _library().m7b_feedback(byref(call))


def read(words: Tensor) -> int:
    """The sum of a tensor's 64-bit words, without a remainder below 128 bytes: one timed read of its memory."""
    return _library().m7b_read(words.data_ptr(), words.nbytes, torch.get_num_threads())


def _attend(place: Place, rows: int, window: int, **rest: Any) -> tuple[arguments.Attend, list[Tensor | None]]:
    """The arguments of an attention call, and the tensors they point to, which must be kept alive meanwhile."""
    tensors = [
        None if t is None else t.contiguous() for t in (place.offsets, place.start, place.held, place.table)
    ]
    offsets, start, held, table = map(_pointer, tensors)
    columns = 0 if place.table is None else place.table.shape[1]
    call = arguments.Attend(
        B=place.start.shape[0], N=rows, offsets=offsets, start=start, held=held, slots=place.slots,
        origin=place.origin, table=table, columns=columns, page=place.page, window=window,
        threads=torch.get_num_threads(), **rest,
    )  # fmt: skip
    return call, tensors


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _common(x: Tensor) -> dict[str, int]:
    """The fields that nearly all calls share."""
    return {"bf16": x.dtype == torch.bfloat16, "threads": torch.get_num_threads()}


def _library() -> ctypes.CDLL:
    library = compiler.library()
    assert library is not None  # backend.py has checked it
    return library
