"""Selects the backend of each operation, with the reason.

    choice = choose(ATTENTION, q)
    choice.backend        Backend.CPU: the C++ in cpu/ · TRITON: gpu/ · ONEDNN · CUBLAS · CUDA_GRAPH · PYTORCH
    choice.reason         "compiled for AVX2", or why a kernel cannot be used

The first rule that applies selects the backend:

    the operation has its own rule              that rule
    an input requires a gradient                PyTorch, unless the operation is an operator with a backward pass
    torch.compile is tracing                    PyTorch, unless the operation is a registered operator
    on a CPU, and the C++ supports the types    the C++, if it is compiled
    on a GPU, and Triton supports the types     Triton, if it is installed
    otherwise                                   PyTorch

The selection does not depend on shapes: each kernel documents the shapes that its callers may pass. No other
module selects a backend, but two refine the choice: quantization/fused.py computes blocks that it cannot fuse
module by module, and gpu/weight_only.py chooses a kernel by the number of rows.
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
FLOATS = (F32, BF16)  # types of the C++ kernels
KINDS = (BF16, F16, F32)  # types of the Triton kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once: Triton also reads it when imported


class Backend(enum.Enum):
    """The backend of an operation. ONEDNN and CUBLAS are PyTorch operators that call these libraries directly."""

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
    """An operation, and the tensor types that each backend supports for it."""

    name: str
    cpu: tuple[torch.dtype, ...] = ()  # types of the first tensor that the C++ supports
    triton: tuple[torch.dtype, ...] = ()  # that the Triton kernel supports
    others: torch.dtype | None = None  # type of the other tensors; None: as the first
    operator: bool = True  # registered as an operator that torch.compile can call
    fp8: bool = False  # the Triton kernel needs a GPU with e4m3
    rule: Rule | None = None  # replaces all other rules


def has_fp8(device: torch.device) -> bool:
    """Whether the device has fp8 matrix products: NVIDIA Ada (8.9), Hopper (9.0) and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def weight_layout(device: torch.device | str) -> str | None:
    """The layout of quantized weights on a device: "tiles" (block_formats.py) for the C++, "rows" for Triton.

    None: the device does not support quantized weights.
    """
    return {"cpu": "tiles", "cuda": "rows", "meta": "rows"}.get(torch.device(device).type)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _fp8_products(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    if not has_fp8(device):
        return Backend.PYTORCH, f"{device} has no fp8 products: they need compute capability 8.9"
    if dtype != BF16:
        return Backend.PYTORCH, "row-wise scaling supports bfloat16 results only"
    return Backend.CUBLAS, "torch._scaled_mm"


def _linear(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    if device.type == "cpu" and dtype == BF16:
        return Backend.ONEDNN, "if it supports bfloat16: it generates and caches code for each number of rows"
    return Backend.PYTORCH, "F.linear"


def _packed_linear(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    if device.type != "cpu" or dtype not in FLOATS:
        return Backend.PYTORCH, "F.linear: weights are packed only for float32 and bfloat16 on a CPU"
    if dtype == F32 and not torch.backends.mkldnn.is_available():
        return Backend.PYTORCH, "F.linear: PyTorch has no oneDNN"
    if dtype == BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Backend.PYTORCH, "F.linear: oneDNN packs for AVX-512 and AVX-NE-CONVERT, and this CPU has neither"
    return Backend.ONEDNN, "the weight is packed once, not in every call"


def _step(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    if device.type != "cuda":
        return Backend.PYTORCH, "kernels are launched one by one"
    attention, why = _apply_rules(PAGED_ATTENTION, device, dtype, True, False, False, None)
    if attention is Backend.PYTORCH:  # it reads the block table on the host: a graph would fix its values
        return Backend.PYTORCH, f"attention over pages cannot be captured: {why}"
    return Backend.CUDA_GRAPH, "a step is captured once and replayed with one launch"


QUANTIZED_LINEAR = Operation("int8, int4 products", cpu=(*KINDS, F64))  # the others are converted to one of FLOATS
DEQUANTIZE = Operation("dequantized weights", cpu=FLOATS, operator=False)  # for gradients
LOW_RANK = Operation("LoRA products", cpu=FLOATS, operator=False)
RMS_NORM = Operation("RMSNorm", cpu=FLOATS, triton=KINDS)
SILU_MUL = Operation("SwiGLU's gate", cpu=FLOATS, triton=KINDS)
ROTATE = Operation("RoPE", cpu=FLOATS, triton=KINDS, others=F32)
ATTENTION = Operation("attention", cpu=(BF16,))  # over new keys and a ring buffer
PAGED_ATTENTION = Operation("attention over pages", cpu=FLOATS, triton=KINDS)
DECODE_ATTENTION = Operation("attention of 1 token", triton=KINDS, operator=False)  # over a ring
BLOCK = Operation("a block in 2 calls", cpu=FLOATS, operator=False)
LAYERS = Operation("all blocks in 1 call", cpu=(BF16,), operator=False)
WEIGHT_ONLY = Operation("weight-only products", triton=KINDS, operator=False)
ROUND_FP8 = Operation("rounding to fp8", triton=KINDS, operator=False, fp8=True)
FP8_LINEAR = Operation("fp8, many rows", rule=_fp8_products)
LINEAR = Operation("plain products", rule=_linear)
PACKED_LINEAR = Operation("packed products", rule=_packed_linear)
STEP = Operation("a step of decoding", rule=_step)
ROUND = Operation("rounding of weights", cpu=FLOATS, operator=False)
READ = Operation("reading memory", cpu=(F32,), operator=False)  # to measure its bandwidth

OPERATIONS = {
    operation.name: operation
    for operation in (
        QUANTIZED_LINEAR, DEQUANTIZE, LOW_RANK, RMS_NORM, SILU_MUL, ROTATE, ATTENTION, PAGED_ATTENTION,
        DECODE_ATTENTION, BLOCK, LAYERS, WEIGHT_ONLY, ROUND_FP8, FP8_LINEAR, LINEAR, PACKED_LINEAR, STEP, ROUND,
        READ,
    )
}  # fmt: skip


def choose(operation: Operation, x: Tensor, *others: Tensor) -> Choice:
    """The backend of an operation on these tensors, with the reason."""
    types_match, gradient = (True, x.requires_grad) if not others else _match_tensors(operation, x, others)
    gradient = gradient and torch.is_grad_enabled()
    return _cached_choice(operation.name, x.device, x.dtype, types_match, gradient, False, compiler.library())


def uses(backend: Backend, operation: Operation, x: Tensor, *others: Tensor) -> bool:
    """Whether an operation on these tensors uses this backend.

    While torch.compile traces, the answer is a constant of the graph.
    """
    if not torch.compiler.is_compiling():
        return choose(operation, x, *others).backend is backend
    types_match, gradient = _match_tensors(operation, x, others)
    gradient = gradient and torch.is_grad_enabled()
    return _uses_while_tracing(backend.name, operation.name, x.device, x.dtype, types_match, gradient)


def _match_tensors(operation: Operation, x: Tensor, others: tuple[Tensor, ...]) -> tuple[bool, bool]:
    """Whether the tensors' types match, and whether any of them requires a gradient."""
    expected = operation.others or x.dtype
    return all(t.dtype == expected for t in others), any(t.requires_grad for t in (x, *others))


def table(device: torch.device, dtype: torch.dtype = BF16) -> list[Choice]:
    """The choices in inference for all operations that have a kernel or a rule on this device."""
    operations = [op for op in OPERATIONS.values() if op.rule or (op.cpu if device.type == "cpu" else op.triton)]
    library = compiler.library()
    return [
        _cached_choice(op.name, device, F32 if op is READ else dtype, True, False, False, library)
        for op in operations
    ]


def _uses_while_tracing(
    backend: str, name: str, device: torch.device, dtype: torch.dtype, types_match: bool, gradient: bool
) -> bool:
    choice = _cached_choice(name, device, dtype, types_match, gradient, True, compiler.library())
    return choice.backend is Backend[backend]


# What torch.compiler.assume_constant_result does, which imports the compiler: two seconds at each start.
_uses_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _cached_choice(
    name: str, device: torch.device, dtype: torch.dtype, types_match: bool, gradient: bool, compiling: bool,
    library: Any,
) -> Choice:  # fmt: skip
    """Apply the rules, cached. `library` is the compiled C++, or None."""
    return Choice(name, *_apply_rules(OPERATIONS[name], device, dtype, types_match, gradient, compiling, library))


def _apply_rules(
    operation: Operation, device: torch.device, dtype: torch.dtype, types_match: bool, gradient: bool,
    compiling: bool, library: Any,
) -> tuple[Backend, str]:  # fmt: skip
    if operation.rule is not None:
        return operation.rule(device, dtype)
    if gradient:
        return Backend.PYTORCH, "a gradient is required, and the kernels have no backward pass"
    if compiling and not operation.operator:
        return Backend.PYTORCH, "torch.compile is tracing, and generates its own kernels"
    why = f"no kernel for {device.type}"
    if device.type == "cpu" and operation.cpu:
        why = _type_mismatch(operation.cpu, dtype, types_match)
        if not why and library is not None:
            return Backend.CPU, f"compiled for {compiler.instructions()}"
        why = why or compiler.missing() or f"{compiler.VARIABLE}={compiler.requested()}"
    if not operation.triton or not (device.type == "cuda" or INTERPRETED):
        return Backend.PYTORCH, why
    if why := _type_mismatch(operation.triton, dtype, types_match):
        return Backend.PYTORCH, why
    if not has_triton():
        return Backend.PYTORCH, "Triton is not installed"
    if operation.fp8 and not (INTERPRETED or has_fp8(device)):
        return Backend.PYTORCH, f"{device} has no fp8: it needs compute capability 8.9"
    return Backend.TRITON, "in Triton's interpreter" if INTERPRETED else "compiled on first use"


def _type_mismatch(supported: tuple[torch.dtype, ...], dtype: torch.dtype, types_match: bool) -> str:
    """Why these types are not supported; "" if they are."""
    if dtype in supported:
        return "" if types_match else "the tensors are of different types"
    return f"the kernel supports {' or '.join(map(_dtype_name, supported))}, not {_dtype_name(dtype)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe() -> dict[str, Any]:
    """The kernels available on this machine, as `doctor` prints them; `operations` is the table of each device."""
    lib = compiler.library()
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    facts: dict[str, Any] = {
        "compiler": compiler.compiler() or "none",
        "asked for": compiler.requested(),
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
    """The instruction set of the CPU kernels, or what replaces them."""
    return compiler.instructions() or "PyTorch operators"
