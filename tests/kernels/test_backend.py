"""Which backend computes what, and that nothing else in the package decides it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mistral_7b
from mistral_7b.cli import doctor
from mistral_7b.kernels import backend
from mistral_7b.kernels.backend import Backend, Operation, choose, uses
from mistral_7b.kernels.cpu import compiler

ROOT = Path(mistral_7b.__file__).parent
CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Library:
    """A compiled library that there need not be."""

    def m7b_instructions(self) -> bytes:
        return b"AVX9"


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(compiler, "library", lambda: library)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "has_fp8", lambda device: device.type == "cuda")
    monkeypatch.setattr(backend, "INTERPRETED", False)


def decided(
    operation: Operation, device: torch.device, dtype: torch.dtype = BF16, *, fitting: bool = True,
    gradient: bool = False, compiling: bool = False,
) -> tuple[Backend, str]:  # fmt: skip
    """By the rules, whatever was decided before."""
    return backend._reasoned(operation, device, dtype, fitting, gradient, compiling, compiler.library())


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(
    ("operation", "device", "dtype", "wanted"),
    [
        (backend.QUANTIZED_LINEAR, CPU, BF16, Backend.CPU),
        (backend.QUANTIZED_LINEAR, CPU, F64, Backend.CPU),  # by way of float32
        (backend.RMS_NORM, CPU, F32, Backend.CPU),
        (backend.RMS_NORM, CPU, F64, Backend.PYTORCH),
        (backend.RMS_NORM, CUDA, F16, Backend.TRITON),
        (backend.RMS_NORM, CUDA, F64, Backend.PYTORCH),
        (backend.RMS_NORM, MPS, F32, Backend.PYTORCH),
        (backend.ATTENTION, CPU, BF16, Backend.CPU),
        (backend.ATTENTION, CPU, F32, Backend.PYTORCH),
        (backend.ATTENTION, CUDA, BF16, Backend.PYTORCH),
        (backend.PAGED_ATTENTION, CPU, BF16, Backend.CPU),
        (backend.PAGED_ATTENTION, CUDA, F32, Backend.TRITON),
        (backend.DECODE_ATTENTION, CPU, BF16, Backend.PYTORCH),
        (backend.DECODE_ATTENTION, CUDA, BF16, Backend.TRITON),
        (backend.BLOCK, CPU, F32, Backend.CPU),
        (backend.LAYERS, CPU, F32, Backend.PYTORCH),
        (backend.LAYERS, CPU, BF16, Backend.CPU),
        (backend.LAYERS, CUDA, BF16, Backend.PYTORCH),
        (backend.WEIGHT_ONLY, CUDA, BF16, Backend.TRITON),
        (backend.ROUND_FP8, CUDA, BF16, Backend.TRITON),
        (backend.FP8_LINEAR, CUDA, BF16, Backend.CUBLAS),
        (backend.FP8_LINEAR, CUDA, F16, Backend.PYTORCH),
        (backend.FP8_LINEAR, CPU, BF16, Backend.PYTORCH),
        (backend.LINEAR, CPU, BF16, Backend.ONEDNN),
        (backend.LINEAR, CPU, F32, Backend.PYTORCH),
        (backend.LINEAR, CUDA, BF16, Backend.PYTORCH),
        (backend.PACKED_LINEAR, CPU, F32, Backend.PYTORCH),
        (backend.STEP, CUDA, BF16, Backend.CUDA_GRAPH),
        (backend.STEP, CUDA, F64, Backend.PYTORCH),  # attention asks the host where pages lie
        (backend.STEP, CPU, BF16, Backend.PYTORCH),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_each_operation_goes_to_its_backend(
    operation: Operation, device: torch.device, dtype: torch.dtype, wanted: Backend
) -> None:
    found, reason = decided(operation, device, dtype)
    assert found is wanted
    assert reason


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_kernels_give_way_to_gradients_other_types_and_torch_compile(device: torch.device) -> None:
    for operation in backend.OPERATIONS.values():
        before, _ = decided(operation, device)
        if before not in (Backend.CPU, Backend.TRITON):
            continue
        assert "gradient" in decided(operation, device, gradient=True)[1]
        assert "different types" in decided(operation, device, fitting=False)[1]
        under, reason = decided(operation, device, compiling=True)
        assert (under is before) == operation.operator
        assert operation.operator or "torch.compile" in reason


@pytest.mark.usefixtures("_compiled")
def test_what_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(backend.ATTENTION, CPU) == (Backend.CPU, "compiled for AVX9")
    assert decided(backend.ATTENTION, CPU, F32)[1] == "it takes bfloat16, not float32"
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert decided(backend.WEIGHT_ONLY, CUDA) == (Backend.PYTORCH, "Triton is not installed")
    assert decided(backend.STEP, CUDA)[0] is Backend.PYTORCH
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "has_fp8", lambda device: False)
    assert "compute capability 8.9" in decided(backend.ROUND_FP8, CUDA)[1]
    assert "compute capability 8.9" in decided(backend.FP8_LINEAR, CUDA)[1]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert "AVX-512" in decided(backend.PACKED_LINEAR, CPU)[1]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert decided(backend.PACKED_LINEAR, CPU)[0] is Backend.ONEDNN
    monkeypatch.setattr(compiler, "library", lambda: None)
    monkeypatch.setattr(compiler, "missing", lambda: "no compiler")
    assert decided(backend.ATTENTION, CPU) == (Backend.PYTORCH, "no compiler")
    monkeypatch.setattr(compiler, "missing", lambda: "")
    monkeypatch.setenv(compiler.VARIABLE, "off")
    assert decided(backend.ATTENTION, CPU) == (Backend.PYTORCH, "MISTRAL_7B_KERNELS=off")


@pytest.mark.usefixtures("_compiled")
def test_the_interpreter_takes_what_the_cpp_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert decided(backend.WEIGHT_ONLY, CPU)[0] is Backend.TRITON
    assert decided(backend.PAGED_ATTENTION, CPU, F32)[0] is Backend.TRITON
    assert decided(backend.PAGED_ATTENTION, CPU, BF16)[0] is Backend.CPU


def test_tensors_are_looked_at() -> None:
    x, weight = torch.ones(2, 8, dtype=BF16), torch.ones(8, dtype=BF16)
    there = Backend.PYTORCH if compiler.library() is None else Backend.CPU
    assert choose(backend.RMS_NORM, x, weight).backend is there
    assert not uses(Backend.CPU, backend.RMS_NORM, x, weight.float())
    assert not uses(Backend.CPU, backend.RMS_NORM, x, weight.requires_grad_())
    with torch.no_grad():
        assert uses(there, backend.RMS_NORM, x, weight)
    angles = torch.ones(2, 1, 4)
    assert uses(there, backend.ROTATE, x.view(2, 1, 8), angles, angles)
    assert not uses(Backend.CPU, backend.ROTATE, x.view(2, 1, 8), angles.double(), angles.double())


def test_a_compiled_graph_keeps_the_choice_as_a_constant() -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        doubled = uses(Backend.CPU, backend.ATTENTION, x)
        block = uses(Backend.CPU, backend.BLOCK, x)  # no operator: never while torch.compile traces
        return x * (1 + doubled) + block

    x = torch.ones(3, dtype=BF16)
    wanted = x * (1 if compiler.library() is None else 2)
    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(x), wanted)


def test_the_doctors_table_is_the_backends() -> None:
    facts = doctor.kernel_facts()
    assert facts["running"] == backend.running()
    table = facts["operations"]["cpu"]
    assert list(table) == [choice.operation for choice in backend.table(CPU)]
    rows = doctor.kernel_rows(facts)
    x = torch.ones(1, dtype=BF16)
    for operation in (backend.QUANTIZED_LINEAR, backend.ATTENTION, backend.LAYERS, backend.LINEAR, backend.STEP):
        choice = choose(operation, x)
        assert table[operation.name] == {"backend": choice.backend.value, "reason": choice.reason}
        assert rows[f"cpu: {operation.name}"] == f"{choice.backend.value}: {choice.reason}"
    assert all(len(name) <= doctor.NAMES for name in rows)


# What tells of a choice between backends, outside of backend.py: module -> the signs that it may show, and why.
ALLOWED = {
    "kernels/cpu/compiler.py": (
        {"VARIABLE", "capability"},
        "builds what the variable names; the seam asks it",
    ),
    "kernels/cpu/calls.py": ({"library", "dtype"}, "calls the library that the seam has chosen"),
    "kernels/gpu/launch.py": ({"cuda"}, "makes the device of a tensor the current one"),
    "kernels/gpu/graph.py": ({"cuda"}, "records on a device that the seam has chosen"),
    "kernels/gpu/paged.py": ({"dtype"}, "sizes of blocks by the type, in a kernel that the seam has chosen"),
    "kernels/cpu/huge_pages.py": ({"device"}, "huge pages are memory of the CPU's"),
    "engine/pages.py": ({"device"}, "the same"),
    "engine/memory.py": ({"device", "cuda"}, "how much memory a device has"),
    "bench/run.py": ({"library"}, "compiles before anything is timed"),
    "cli/inputs.py": ({"available"}, "which device is meant by `auto`"),
    "cli/doctor.py": ({"available", "cuda", "capability"}, "tells what PyTorch and the machine have"),
    "bench/peers/hf_transformers.py": ({"capability"}, "says in the record what the peer ran on"),
    "bench/peers/ours.py": ({"capability"}, "says in the record what PyTorch ran on"),
    "bench/serving/ours.py": ({"capability"}, "the same"),
    "cli/serve.py": ({"available"}, "whether packages of the extra `serve` are installed"),
    "model.py": ({"device"}, "MPS has no float64; meta has no memory"),
    "sampling/sampler.py": ({"device"}, "MPS has no float64; rows are sampled in groups on a CPU"),
    "sampling/choice.py": ({"device"}, "sorts with numpy on a CPU; pins memory for a copy to a GPU"),
}
FLOATING = {"bfloat16", "float16", "float32", "float64"}


def signs(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What looks like a choice of a backend: which sign, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            inside = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr == "is_cuda" or (inside == "torch" and node.attr == "cuda"):
                yield "cuda", node.lineno
            elif node.attr in ("is_available", "find_spec", "has_triton", "_is_mkldnn_bf16_supported"):
                yield "available", node.lineno
            elif node.attr in ("get_cpu_capability", "m7b_instructions"):
                yield "capability", node.lineno
            elif node.attr == "library" and inside == "compiler":
                yield "library", node.lineno
            elif node.attr == "type" and "device" in ast.unparse(node.value):
                yield "device", node.lineno
        elif isinstance(node, ast.Constant) and node.value in ("MISTRAL_7B_KERNELS", "TRITON_INTERPRET"):
            yield "VARIABLE", node.lineno
        elif isinstance(node, ast.Compare):
            text = ast.unparse(node)
            if ".dtype" in text and any(f"torch.{name}" in text for name in FLOATING):
                yield "dtype", node.lineno


def strangers(source: str, name: str) -> list[str]:
    allowed = ALLOWED.get(name, (set(), ""))[0]
    return [f"{name}:{line} {sign}" for sign, line in signs(ast.parse(source)) if sign not in allowed]


def test_no_other_module_chooses_a_backend() -> None:
    seen: set[tuple[str, str]] = set()
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name == "kernels/backend.py":
            continue
        source = path.read_text(encoding="utf-8")
        seen |= {(name, sign) for sign, _ in signs(ast.parse(source))}
        found += strangers(source, name)
    assert not found
    unused = {(name, sign) for name, (allowed, _) in ALLOWED.items() for sign in allowed} - seen
    assert not unused, "allowed, and nowhere to be seen"


@pytest.mark.parametrize(
    "source",
    [
        "if x.is_cuda: pass",
        "torch.cuda.is_available()",
        "if x.device.type == 'cpu': pass",
        "if torch.device(device).type != 'cuda': pass",
        "if q.dtype == torch.bfloat16: pass",
        "if x.dtype not in (torch.float32, torch.bfloat16): pass",
        "compiler.library() is None",
        "os.environ['MISTRAL_7B_KERNELS']",
        "importlib.util.find_spec('triton')",
        "torch.backends.cpu.get_cpu_capability()",
        "torch.ops.mkldnn._is_mkldnn_bf16_supported()",
    ],
)
def test_the_reader_of_sources_sees_a_choice(source: str) -> None:
    assert strangers(source, "cache.py")
