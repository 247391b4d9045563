"""A transformer block on either side of its attention in two calls of the kernels, or all blocks in one.

Between calls of a block's parts, one by one, the interpreter takes a tenth of a step of decoding: each weight
that streams by leaves its own memory cold. The twin is the model itself, part by part.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..attend import LONG, PTR, Place, Where
from ..linear import FLOATS
from . import compiler


class Weights(ctypes.Structure):
    """A quantised weight as cpu/weights.h has it. Whoever makes it holds on to the tensors pointed at."""

    _fields_ = (
        ("N", LONG), ("Kp", LONG), ("group", LONG), ("codes", PTR), ("groups", PTR), ("scale", PTR), ("d", PTR),
        ("bits", ctypes.c_int), ("adapters", PTR), ("mixture", PTR),
    )  # fmt: skip


class Block(ctypes.Structure):
    """A transformer block's weights."""

    _fields_ = (
        *((name, Weights) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        ("attention_norm", PTR), ("ffn_norm", PTR), ("dim", LONG), ("head_dim", LONG), ("eps", ctypes.c_float),
    )  # fmt: skip


def usable(x: Tensor) -> bool:
    """Whether the kernels take a block's input: on a CPU, compiled, of a type they know, outside torch.compile."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in FLOATS
        and compiler.library() is not None
    )


def project(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (..., H, K), keys and values (..., G, K) of the normed x (..., D), the first two rotated.

    cos and sin (..., 1, K/2) float32 are those of x's last rows, repeated for leading dimensions they lack.
    """
    lib, x = compiler.library(), x.contiguous()
    assert lib is not None  # as `usable` has said
    K = block.head_dim
    q, k, v = (x.new_empty((*x.shape[:-1], w.N // K, K)) for w in (block.wq, block.wk, block.wv))
    lib.m7b_project(
        ctypes.byref(block), x.dtype == torch.bfloat16, x.data_ptr(), x.numel() // block.dim,
        cos.data_ptr(), sin.data_ptr(), cos.numel() // (K // 2), torch.get_num_threads(),
        q.data_ptr(), k.data_ptr(), v.data_ptr(),
    )  # fmt: skip
    return q, k, v


def finish(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """The block's output (..., D) from its input and what its heads attended to, (..., H, K)."""
    lib, x, attended = compiler.library(), x.contiguous(), attended.contiguous()
    assert lib is not None
    out = torch.empty_like(x)
    lib.m7b_finish_block(
        ctypes.byref(block), x.dtype == torch.bfloat16, x.data_ptr(), attended.data_ptr(),
        x.numel() // block.dim, torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out


def run_layers(
    blocks: list[Block], x: Tensor, cos: Tensor, sin: Tensor, entries: list[tuple[Tensor, ...]],
    place: Place, window: int | None,
) -> Tensor:  # fmt: skip
    """bfloat16 x (..., D) through all blocks, over a cache that is read and written: see `attend`.

    cos, sin    (..., 1, K/2) float32, repeated for leading dimensions that they lack
    entries     for each layer its keys and values (..., G, K), in int8 their scales too, laid out as `place` says
    """
    lib, first = compiler.library(), blocks[0]
    assert lib is not None
    x = x.contiguous().clone()
    old = [t.data_ptr() for layer in entries for t in layer]
    where = Where(place, x.numel() // first.dim, window or 0)
    lib.m7b_layers(
        (Block * len(blocks))(*blocks), len(blocks), (PTR * len(old))(*old), ctypes.byref(where),
        len(entries[0]) == 4, first.wq.N // first.head_dim, first.wk.N // first.head_dim, first.head_dim,
        cos.data_ptr(), sin.data_ptr(), cos.numel() // (first.head_dim // 2),
        torch.get_num_threads(), x.data_ptr(),
    )  # fmt: skip
    return x
