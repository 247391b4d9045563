"""How a Triton kernel is started. Triton is imported with the first: without a GPU it is not there."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def launch(module: str, kernel: str, grid: tuple[int, ...], first: Tensor, *arguments: Any, **how: Any) -> None:
    """Run a kernel of a module beside this, on the device of its first tensor, which need not be current."""
    with torch.cuda.device_of(first):
        getattr(_module(module), kernel)[grid](first, *arguments, **how)


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")
