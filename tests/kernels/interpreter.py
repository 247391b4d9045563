"""The device of the checks: a GPU or, with TRITON_INTERPRET=1, Triton's interpreter with corrected bfloat16.

Seen in Triton 3.6.0: the interpreter keeps bfloat16 as its bits, cuts where a GPU rounds to nearest even,
and `tl.dot` multiplies the bits; e4m3 it rounds wrongly. Kernels are not changed for that; here these three
operations are.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), kept)


cast_as_it_was = Builder.cast_impl
dot_as_it_was = Builder.create_dot
narrower_as_it_was = Builder.create_fp_to_fp


def cast(self: Any, value: Any, kind: Any) -> Any:
    if value.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
        return Handle(to_bf16_bits(value.data), tl.bfloat16)
    return cast_as_it_was(self, value, kind)


def to_narrower_type(self: Any, value: Any, kind: Any, rounding_mode: Any) -> Any:
    """float32 to e4m3, to nearest even as a GPU does (the interpreter rounds halves up and loses the carry)."""
    if value.dtype.scalar == tl.float32 and kind.scalar == tl.float8e4nv:
        narrow = torch.from_numpy(np.ascontiguousarray(value.data)).to(torch.float8_e4m3fn)
        return Handle(narrow.view(torch.uint8).numpy(), tl.float8e4nv)
    return narrower_as_it_was(self, value, kind, rounding_mode)


def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    # Refused by the compiler but not by the interpreter: small sides, different types.
    assert a.dtype.scalar == b.dtype.scalar, "tl.dot of two types"
    assert a.data.shape[0] >= 16, "tl.dot wants sides of at least 16"
    assert min(b.data.shape) >= 16, "tl.dot wants sides of at least 16"
    if a.dtype.scalar == tl.bfloat16:
        a, b = (Handle(from_bf16_bits(t.data), tl.float32) for t in (a, b))
    return dot_as_it_was(self, a, b, d, input_precision, max_num_imprecise_acc)


if INTERPRETED:
    Builder.cast_impl = cast
    Builder.create_dot = dot
    Builder.create_fp_to_fp = to_narrower_type
