"""Keys and values as a cache stores them: in the model's type, or in int8 with a scale per head and token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CacheError
from ..kernels.attend import quantize_kv
from ..kernels.cpu import huge_pages

Entries = tuple[Tensor, ...]  # k and v (..., S, G, K); in int8 also their scales (..., S, G, 1)


class Described:
    """The repr of a cache: layers, window, and tokens so far (a list where sequences may differ)."""

    def __repr__(self) -> str:
        state = vars(self)
        length = state["length"].tolist() if isinstance(state["length"], Tensor) else state["length"]
        return f"{type(self).__name__}({len(state['layers'])} layers, window={state['window']}, length={length})"


def check_kv_dtype(kv_dtype: torch.dtype | None) -> bool:
    """Whether keys and values are stored in int8. CacheError for any other type than int8 or None."""
    if kv_dtype not in (None, torch.int8):
        raise CacheError(
            f"kv_dtype must be torch.int8, or None for the model's own type, not {kv_dtype}", field="kv_dtype"
        )
    return kv_dtype == torch.int8


def compressed(k: Tensor, v: Tensor, int8: bool) -> Entries:
    """Keys and values (..., T, G, K) as they are stored: quantized if `int8`."""
    if not int8:
        return k, v
    (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
    return k, v, k_scale, v_scale


def blank_entries(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, int8: bool) -> Entries:
    """Memory of one layer; on a CPU the system allocates it as it is filled."""
    one = compressed(
        torch.zeros(1, 1, 1, shape[-1], dtype=dtype), torch.zeros(1, 1, 1, shape[-1], dtype=dtype), int8
    )
    shapes = [(*shape[:-1], t.shape[-1]) for t in one]
    if device.type == "cpu":
        return tuple(huge_pages.empty(s, t.dtype) for s, t in zip(shapes, one, strict=True))
    return tuple(torch.zeros(s, dtype=t.dtype, device=device) for s, t in zip(shapes, one, strict=True))


def expanded(entries: Entries, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values dequantized, for attention without a kernel."""
    if len(entries) == 2:
        return entries[0], entries[1]
    k, v, k_scale, v_scale = entries
    return (k * k_scale).to(dtype), (v * v_scale).to(dtype)


def four(entries: Entries) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """k, v and their scales, as the kernels take them; None for scales that do not exist."""
    return entries if len(entries) == 4 else (*entries, None, None)  # type: ignore[return-value]
