"""Which backend computes what, and why. Nothing else in the package decides it.

    choice = choose(ATTENTION, q)
    choice.backend        Backend.CPU: the C++ in cpu/ · TRITON: gpu/ · ONEDNN · CUBLAS · CUDA_GRAPH · PYTORCH
    choice.reason         "compiled for AVX2", or what stands in the way

The rules, in their order; the first that applies decides:

    the operation has a rule of its own     below, beside it
    a gradient is wanted                    PyTorch: the kernels have none
    torch.compile traces                    PyTorch, unless the operation is an operator that it can call
    on a CPU, and the C++ takes the types   the C++, if it is compiled
    on a GPU, and Triton takes the types    Triton, if it is installed
    anything else                           PyTorch

Shapes are no part of this: a kernel says which it takes, and its caller keeps to them.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cpu import compiler

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FLOATS = (F32, BF16)  # what the C++ reads and writes
KINDS = (BF16, F16, F32)  # what Triton's kernels do
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once as well, when it is imported


class Backend(enum.Enum):
    """What computes. oneDNN and cuBLAS are called by way of PyTorch, for what others of its operators are not."""

    CPU = "CPU kernels"
    TRITON = "Triton"
    ONEDNN = "oneDNN"
    CUBLAS = "cuBLAS"
    CUDA_GRAPH = "CUDA graph"
    PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Choice:
    """The backend of an operation, and the reason for it."""

    operation: str
    backend: Backend
    reason: str


Rule = Callable[[torch.device, torch.dtype], tuple[Backend, str]]


@dataclass(frozen=True)
class Operation:
    """What can be computed, and which types of its tensors the backends take."""

    name: str
    cpu: tuple[torch.dtype, ...] = ()  # types of the first tensor that the C++ takes
    triton: tuple[torch.dtype, ...] = ()  # that Triton's kernel takes
    others: torch.dtype | None = None  # the type of the other tensors; None: that of the first
    operator: bool = True  # torch.compile can call it, for it is registered as an operator
    fp8: bool = False  # Triton's kernel needs a GPU that has e4m3
    rule: Rule | None = None  # in the place of all others


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies fp8: NVIDIA's Ada (8.9), Hopper (9.0) and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def weight_layout(device: torch.device | str) -> str | None:
    """How quantized weights lie on a device: in "tiles" (layout.py) for the C++, in "rows" for Triton.

    None: there are no products with them.
    """
    return {"cpu": "tiles", "cuda": "rows", "meta": "rows"}.get(torch.device(device).type)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _fp8_products(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    if not has_fp8(device):
        return Backend.PYTORCH, f"{device} multiplies no fp8: compute capability 8.9 does"
    if dtype != BF16:
        return Backend.PYTORCH, "scaling by rows is for bfloat16 results alone"
    return Backend.CUBLAS, "torch._scaled_mm"


def _linear(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    if device.type == "cpu" and dtype == BF16:
        return Backend.ONEDNN, "where it knows bfloat16: it makes code for each number of rows, and keeps it"
    return Backend.PYTORCH, "F.linear"


def _packed_linear(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    if device.type != "cpu" or dtype != BF16:
        return Backend.PYTORCH, "F.linear: weights are packed for bfloat16 on a CPU"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Backend.PYTORCH, "F.linear: oneDNN packs for AVX-512 and AVX-NE-CONVERT, and this CPU has neither"
    return Backend.ONEDNN, "the weight is packed once, not at every call"


def _step(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    if device.type != "cuda":
        return Backend.PYTORCH, "a step is called kernel by kernel"
    attention, why = _reasoned(PAGED_ATTENTION, device, dtype, True, False, False, None)
    if attention is Backend.PYTORCH:  # it asks the host where pages lie: a graph would know of one step alone
        return Backend.PYTORCH, f"attention over pages cannot be recorded: {why}"
    return Backend.CUDA_GRAPH, "a step is recorded once and replayed as one launch"


QUANTIZED_LINEAR = Operation("int8, int4 products", cpu=(*KINDS, F64))  # all by way of FLOATS
LOW_RANK = Operation("LoRA products", cpu=FLOATS, operator=False)
RMS_NORM = Operation("RMSNorm", cpu=FLOATS, triton=KINDS)
SILU_MUL = Operation("SwiGLU's gate", cpu=FLOATS, triton=KINDS)
ROTATE = Operation("RoPE", cpu=FLOATS, triton=KINDS, others=F32)
ATTENTION = Operation("attention", cpu=(BF16,))  # over new keys and a ring
PAGED_ATTENTION = Operation("attention over pages", cpu=(BF16,), triton=KINDS)
DECODE_ATTENTION = Operation("attention of 1 token", triton=KINDS, operator=False)  # over a ring
BLOCK = Operation("a block in 2 calls", cpu=FLOATS, operator=False)
LAYERS = Operation("all blocks in 1 call", cpu=(BF16,), operator=False)
WEIGHT_ONLY = Operation("weight-only products", triton=KINDS, operator=False)
ROUND_FP8 = Operation("rounding to fp8", triton=KINDS, operator=False, fp8=True)
FP8_LINEAR = Operation("fp8, many rows", rule=_fp8_products)
LINEAR = Operation("plain products", rule=_linear)
PACKED_LINEAR = Operation("packed products", rule=_packed_linear)
STEP = Operation("a step of decoding", rule=_step)
READ = Operation("reading memory", cpu=(F32,), operator=False)  # to measure its bandwidth

OPERATIONS = {
    operation.name: operation
    for operation in (
        QUANTIZED_LINEAR, LOW_RANK, RMS_NORM, SILU_MUL, ROTATE, ATTENTION, PAGED_ATTENTION, DECODE_ATTENTION,
        BLOCK, LAYERS, WEIGHT_ONLY, ROUND_FP8, FP8_LINEAR, LINEAR, PACKED_LINEAR, STEP, READ,
    )
}  # fmt: skip


def choose(operation: Operation, x: Tensor, *others: Tensor) -> Choice:
    """What computes an operation of x and the other tensors, and why."""
    fitting, gradient = (True, x.requires_grad) if not others else _together(operation, x, others)
    gradient = gradient and torch.is_grad_enabled()
    return _decided(operation.name, x.device, x.dtype, fitting, gradient, False, compiler.library())


def uses(backend: Backend, operation: Operation, x: Tensor, *others: Tensor) -> bool:
    """Whether it is this backend that computes an operation of x and the other tensors.

    Also where torch.compile traces, which takes the answer for a constant.
    """
    if not torch.compiler.is_compiling():
        return choose(operation, x, *others).backend is backend
    fitting, gradient = _together(operation, x, others)
    gradient = gradient and torch.is_grad_enabled()
    return _used_in_a_graph(backend.name, operation.name, x.device, x.dtype, fitting, gradient)


def _together(operation: Operation, x: Tensor, others: tuple[Tensor, ...]) -> tuple[bool, bool]:
    """Whether the tensors are of the types that belong together, and whether any of them has a gradient."""
    wanted = operation.others or x.dtype
    return all(t.dtype == wanted for t in others), any(t.requires_grad for t in (x, *others))


def table(device: torch.device, dtype: torch.dtype = BF16) -> list[Choice]:
    """What computes each operation that a device has a kernel or a rule for, in inference."""
    known = [op for op in OPERATIONS.values() if op.rule or (op.cpu if device.type == "cpu" else op.triton)]
    library = compiler.library()
    return [_decided(op.name, device, F32 if op is READ else dtype, True, False, False, library) for op in known]


@torch.compiler.assume_constant_result
def _used_in_a_graph(
    backend: str, name: str, device: torch.device, dtype: torch.dtype, fitting: bool, gradient: bool
) -> bool:
    choice = _decided(name, device, dtype, fitting, gradient, True, compiler.library())
    return choice.backend is Backend[backend]


@functools.cache
def _decided(
    name: str, device: torch.device, dtype: torch.dtype, fitting: bool, gradient: bool, compiling: bool,
    library: Any,
) -> Choice:  # fmt: skip
    """By the rules. `library` is the compiled C++; None: there is none."""
    return Choice(name, *_reasoned(OPERATIONS[name], device, dtype, fitting, gradient, compiling, library))


def _reasoned(
    operation: Operation, device: torch.device, dtype: torch.dtype, fitting: bool, gradient: bool, compiling: bool,
    library: Any,
) -> tuple[Backend, str]:  # fmt: skip
    if operation.rule is not None:
        return operation.rule(device, dtype)
    if gradient:
        return Backend.PYTORCH, "a gradient is wanted, and the kernels have none"
    if compiling and not operation.operator:
        return Backend.PYTORCH, "torch.compile traces, and makes kernels of its own"
    why = f"there is no kernel for it on {device.type}"
    if device.type == "cpu" and operation.cpu:
        why = _unfit(operation.cpu, dtype, fitting)
        if not why and library is not None:
            return Backend.CPU, f"compiled for {compiler.instructions()}"
        why = why or compiler.missing() or f"{compiler.VARIABLE}={compiler.asked()}"
    if not operation.triton or not (device.type == "cuda" or INTERPRETED):
        return Backend.PYTORCH, why
    if why := _unfit(operation.triton, dtype, fitting):
        return Backend.PYTORCH, why
    if not has_triton():
        return Backend.PYTORCH, "Triton is not installed"
    if operation.fp8 and not (INTERPRETED or has_fp8(device)):
        return Backend.PYTORCH, f"{device} has no fp8: compute capability 8.9 has"
    return Backend.TRITON, "in its interpreter" if INTERPRETED else "compiled when first called"


def _unfit(takes: tuple[torch.dtype, ...], dtype: torch.dtype, fitting: bool) -> str:
    """Why these types are not taken; "" if they are."""
    if dtype in takes:
        return "" if fitting else "the tensors are of different types"
    return f"it takes {' or '.join(map(_short, takes))}, not {_short(dtype)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe() -> dict[str, Any]:
    """What there is of kernels on this machine, for a person; `operations` is the table of its devices."""
    lib = compiler.library()
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    facts: dict[str, Any] = {
        "compiler": compiler.compiler() or "none",
        "asked for": compiler.asked(),
        "running": running(),
        "library": lib._name if lib else "none",
    }
    if why := compiler.missing():
        facts["missing"] = why
    facts["operations"] = {
        device.type: {c.operation: {"backend": c.backend.value, "reason": c.reason} for c in table(device)}
        for device in devices
    }
    return facts


def running() -> str:
    """The instructions that the CPU's kernels run, or who stands in for them."""
    return compiler.instructions() or "PyTorch operators"
