"""The C++ called with tensors: a function for each of entry.cpp's, with one structure of arguments.py each.

For what backend.py gives to the CPU's kernels, and nothing else: device and types are not looked at again here.

Between calls of a block's parts, one by one, the interpreter takes a tenth of a step of decoding: each weight that
streams by leaves its own memory cold. So a block is two calls (`project`, `finish_block`), or all are one
(`layers`). The twin of these is the model itself, part by part.
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
    """x (..., K) by a quantized weight: (..., N), of x's type; others than these two go by way of float32."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return linear(weight, x.float()).to(x.dtype)
    x, K = x.contiguous(), x.shape[-1]
    out = x.new_empty((*x.shape[:-1], weight.N))
    if not x.numel():
        return out
    call = arguments.LinearCall(
        weight=addressof(weight), x=x.data_ptr(), out=out.data_ptr(), M=x.numel() // K, K=K, **_shared(x)
    )
    _library().m7b_linear(byref(call))
    return out


def low_rank(adapters: ctypes.Array[Any], mixture: arguments.Mixture, x: Tensor, y: Tensor) -> None:
    """Add to y (M, N), contiguous, in place, what adapters make of x (M, K)."""
    x = x.contiguous()
    call = arguments.LowRankCall(
        adapters=addressof(adapters), mixture=addressof(mixture), x=x.data_ptr(), y=y.data_ptr(),
        M=x.shape[0], K=x.shape[1], N=y.shape[1], **_shared(x),
    )  # fmt: skip
    _library().m7b_low_rank(byref(call))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., D) by weight (D,)."""
    x, D = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    call = arguments.RMSNormCall(
        x=x.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), M=x.numel() // D, D=D, eps=eps, **_shared(x)
    )
    _library().m7b_rms_norm(byref(call))
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    call = arguments.SiluMulCall(
        gate=gate.data_ptr(), up=up.data_ptr(), out=out.data_ptr(), n=gate.numel(), **_shared(gate)
    )
    _library().m7b_silu_mul(byref(call))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., heads, D) rotated by cos and sin (..., 1, D/2): those of its last rows, repeated for the others."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    heads, D = x.shape[-2:]
    call = arguments.RotateCall(
        x=x.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), out=out.data_ptr(), M=x.numel() // (heads * D),
        angles=cos.numel() // (D // 2), heads=heads, D=D, **_shared(x),
    )  # fmt: skip
    _library().m7b_rotate(byref(call))
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered, window: int,
    keep: bool,
) -> Tensor:  # fmt: skip
    """Attention of bfloat16 q (..., H, D): see ../attend.py. `window` 0: none."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    H, D = q.shape[-2:]
    call, kept = _attend(
        old.place, q.numel() // (H * D), window, H=H, G=k.shape[-2], D=D, int8=k.dtype == torch.int8, keep=keep,
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), k_scale=_at(k_scale), v_scale=_at(v_scale),
        old_k=old.k.data_ptr(), old_v=old.v.data_ptr(), old_k_scale=_at(old.k_scale),
        old_v_scale=_at(old.v_scale), out=out.data_ptr(),
    )  # fmt: skip
    _library().m7b_attend(byref(call))
    del kept
    return out


def project(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (..., H, K), keys and values (..., G, K) of the normed x (..., D), the first two rotated.

    cos and sin (..., 1, K/2) float32 are those of x's last rows, repeated for leading dimensions they lack.
    """
    x, cos, sin, K = x.contiguous(), cos.contiguous(), sin.contiguous(), block.head_dim
    q, k, v = (x.new_empty((*x.shape[:-1], w.N // K, K)) for w in (block.wq, block.wk, block.wv))
    call = arguments.ProjectCall(
        block=addressof(block), x=x.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), q=q.data_ptr(),
        k=k.data_ptr(), v=v.data_ptr(), M=x.numel() // block.dim, angles=cos.numel() // (K // 2), **_shared(x),
    )  # fmt: skip
    _library().m7b_project(byref(call))
    return q, k, v


def finish_block(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """The block's output (..., D) from its input and what its heads attended to, (..., H, K)."""
    x, attended = x.contiguous(), attended.contiguous()
    out = torch.empty_like(x)
    call = arguments.FinishBlockCall(
        block=addressof(block), x=x.data_ptr(), attended=attended.data_ptr(), out=out.data_ptr(),
        M=x.numel() // block.dim, **_shared(x),
    )  # fmt: skip
    _library().m7b_finish_block(byref(call))
    return out


def layers(
    blocks: list[Block], x: Tensor, cos: Tensor, sin: Tensor, entries: list[tuple[Tensor, ...]], place: Place,
    window: int | None,
) -> Tensor:  # fmt: skip
    """bfloat16 x (..., D) through all blocks, over a cache that is read and written: see `attend`.

    cos, sin    (..., 1, K/2) float32, repeated for leading dimensions that they lack
    entries     for each layer its keys and values (..., G, K), in int8 their scales too, laid out as `place` says
    """
    first, x, cos, sin = blocks[0], x.contiguous().clone(), cos.contiguous(), sin.contiguous()
    K = first.head_dim
    pointers = [t.data_ptr() for layer in entries for t in layer]
    together, old = (Block * len(blocks))(*blocks), (PTR * len(pointers))(*pointers)
    where, kept = _attend(
        place, x.numel() // first.dim, window or 0, H=first.wq.N // K, G=first.wk.N // K, D=K,
        int8=entries[0][0].dtype == torch.int8,
    )  # fmt: skip
    call = arguments.LayersCall(
        attend=where, blocks=addressof(together), entries=addressof(old), x=x.data_ptr(), cos=cos.data_ptr(),
        sin=sin.data_ptr(), layers=len(blocks), angles=cos.numel() // (K // 2),
    )  # fmt: skip
    _library().m7b_layers(byref(call))
    del kept
    return x


def read(words: Tensor) -> int:
    """The sum of a tensor's 64-bit words, without what is left of 128 bytes: memory read once, to be timed."""
    return _library().m7b_read(words.data_ptr(), words.nbytes, torch.get_num_threads())


def _attend(place: Place, rows: int, window: int, **rest: Any) -> tuple[arguments.Attend, list[Tensor | None]]:
    """The structure of an attention over a place, and the tensors that it points at, to be kept meanwhile."""
    kept = [None if t is None else t.contiguous() for t in (place.offsets, place.start, place.held, place.table)]
    offsets, start, held, table = map(_at, kept)
    columns = 0 if place.table is None else place.table.shape[1]
    call = arguments.Attend(
        B=place.start.shape[0], N=rows, offsets=offsets, start=start, held=held, slots=place.slots,
        origin=place.origin, table=table, columns=columns, page=place.page, window=window,
        threads=torch.get_num_threads(), **rest,
    )  # fmt: skip
    return call, kept


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _shared(x: Tensor) -> dict[str, int]:
    """What nearly every call says."""
    return {"bf16": x.dtype == torch.bfloat16, "threads": torch.get_num_threads()}


def _library() -> ctypes.CDLL:
    library = compiler.library()
    assert library is not None  # as backend.py has found
    return library
