"""Launching of Triton kernels. Triton is imported by the first launch, as it is not installed without a GPU."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def launch(
    module: str, kernel: str, grid: tuple[int, ...], first: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Launch a kernel of a module in this package on the device of its first tensor, whether current or not."""
    with torch.cuda.device_of(first):
        getattr(_module(module), kernel)[grid](first, *arguments, **constants)


def power(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")
