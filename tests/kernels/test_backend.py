"""The selection of backends, and that no other module selects one."""

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
    """A stand-in for a compiled library."""

    def m7b_instructions(self) -> bytes:
        return b"AVX9"


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(compiler, "library", lambda: library)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "has_fp8", lambda device: device.type == "cuda")
    monkeypatch.setattr(backend, "INTERPRETED", False)


def decide(
    operation: Operation, device: torch.device, dtype: torch.dtype = BF16, *, types_match: bool = True,
    gradient: bool = False, compiling: bool = False,
) -> tuple[Backend, str]:  # fmt: skip
    """The result of the rules, without the cache."""
    return backend._apply_rules(operation, device, dtype, types_match, gradient, compiling, compiler.library())


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(
    ("operation", "device", "dtype", "wanted"),
    [
        (backend.QUANTIZED_LINEAR, CPU, BF16, Backend.CPU),
        (backend.QUANTIZED_LINEAR, CPU, F64, Backend.CPU),  # converted to float32
        (backend.RMS_NORM, CPU, F32, Backend.CPU),
        (backend.RMS_NORM, CPU, F64, Backend.PYTORCH),
        (backend.RMS_NORM, CUDA, F16, Backend.TRITON),
        (backend.RMS_NORM, CUDA, F64, Backend.PYTORCH),
        (backend.RMS_NORM, MPS, F32, Backend.PYTORCH),
        (backend.ATTENTION, CPU, BF16, Backend.CPU),
        (backend.ATTENTION, CPU, F32, Backend.PYTORCH),
        (backend.ATTENTION, CUDA, BF16, Backend.PYTORCH),
        (backend.PAGED_ATTENTION, CPU, BF16, Backend.CPU),
        (backend.PAGED_ATTENTION, CPU, F32, Backend.CPU),
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
        (backend.PACKED_LINEAR, CPU, F32, Backend.ONEDNN),
        (backend.PACKED_LINEAR, CPU, F64, Backend.PYTORCH),
        (backend.STEP, CUDA, BF16, Backend.CUDA_GRAPH),
        (backend.STEP, CUDA, F64, Backend.PYTORCH),  # attention reads the block table on the host
        (backend.STEP, CPU, BF16, Backend.PYTORCH),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_each_operation_selects_its_backend(
    operation: Operation, device: torch.device, dtype: torch.dtype, wanted: Backend
) -> None:
    found, reason = decide(operation, device, dtype)
    assert found is wanted
    assert reason


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_gradients_other_types_and_torch_compile_do_not_use_kernels(device: torch.device) -> None:
    for operation in backend.OPERATIONS.values():
        before, _ = decide(operation, device)
        if before not in (Backend.CPU, Backend.TRITON):
            continue
        assert "gradient" in decide(operation, device, gradient=True)[1]
        assert "different types" in decide(operation, device, types_match=False)[1]
        under, reason = decide(operation, device, compiling=True)
        assert (under is before) == operation.operator
        assert operation.operator or "torch.compile" in reason


@pytest.mark.usefixtures("_compiled")
def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(backend.ATTENTION, CPU) == (Backend.CPU, "compiled for AVX9")
    assert decide(backend.ATTENTION, CPU, F32)[1] == "the kernel supports bfloat16, not float32"
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert decide(backend.WEIGHT_ONLY, CUDA) == (Backend.PYTORCH, "Triton is not installed")
    assert decide(backend.STEP, CUDA)[0] is Backend.PYTORCH
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "has_fp8", lambda device: False)
    assert "compute capability 8.9" in decide(backend.ROUND_FP8, CUDA)[1]
    assert "compute capability 8.9" in decide(backend.FP8_LINEAR, CUDA)[1]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert "AVX-512" in decide(backend.PACKED_LINEAR, CPU)[1]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert decide(backend.PACKED_LINEAR, CPU)[0] is Backend.ONEDNN
    monkeypatch.setattr(compiler, "library", lambda: None)
    monkeypatch.setattr(compiler, "missing", lambda: "no compiler")
    assert decide(backend.ATTENTION, CPU) == (Backend.PYTORCH, "no compiler")
    monkeypatch.setattr(compiler, "missing", lambda: "")
    monkeypatch.setenv(compiler.VARIABLE, "off")
    assert decide(backend.ATTENTION, CPU) == (Backend.PYTORCH, "MISTRAL_7B_KERNELS=off")


@pytest.mark.usefixtures("_compiled")
def test_the_interpreter_runs_what_the_cpp_does_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert decide(backend.WEIGHT_ONLY, CPU)[0] is Backend.TRITON
    assert decide(backend.PAGED_ATTENTION, CPU, F16)[0] is Backend.TRITON
    assert decide(backend.PAGED_ATTENTION, CPU, BF16)[0] is Backend.CPU


def test_the_choice_depends_on_types_and_gradients_of_all_tensors() -> None:
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


def test_the_choice_is_a_constant_of_a_compiled_graph() -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        doubled = uses(Backend.CPU, backend.ATTENTION, x)
        block = uses(Backend.CPU, backend.BLOCK, x)  # no operator: never used while torch.compile traces
        return x * (1 + doubled) + block

    x = torch.ones(3, dtype=BF16)
    wanted = x * (1 if compiler.library() is None else 2)
    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(x), wanted)


def test_doctor_prints_the_choices() -> None:
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
    assert all(len(name) <= doctor.NAME_WIDTH for name in rows)


# Signs of a backend selection allowed outside backend.py: module -> its signs, and the reason.
ALLOWED = {
    "kernels/cpu/compiler.py": (
        {"VARIABLE", "capability"},
        "builds what the variable names; backend.py calls it",
    ),
    "kernels/cpu/calls.py": ({"library", "dtype"}, "calls the library that backend.py has selected"),
    "kernels/gpu/launch.py": ({"cuda"}, "makes the device of a tensor current"),
    "kernels/gpu/graph.py": ({"cuda"}, "captures on a device that backend.py has selected"),
    "kernels/gpu/paged.py": (
        {"dtype"},
        "block sizes depend on the type, in a kernel that backend.py has selected",
    ),
    "kernels/cpu/huge_pages.py": ({"device"}, "huge pages are CPU memory"),
    "cache/entries.py": ({"device"}, "the same"),
    "engine/fingerprint.py": (
        {"library", "device", "capability", "cuda"},
        "records what keys and values on disk depend on",
    ),
    "engine/memory.py": ({"device", "cuda"}, "how much memory a device has"),
    "bench/run.py": ({"library"}, "compiles before timing"),
    "cli/inputs.py": ({"available", "device", "library"}, "resolves the device `auto`; compiles before timing"),
    "checkpoint/starter.py": ({"available"}, "whether pip is installed"),
    "cli/eval_harness.py": ({"available"}, "whether lm-eval is installed"),
    "evaluation/task_names.py": ({"available"}, "where lm-eval is installed"),
    "bench/quality/engines.py": ({"available"}, "whether transformers is installed"),
    "course/checks/ex02_rotary.py": ({"dtype"}, "recognizes a learner's mistake"),
    "distributed/ranks.py": ({"available", "cuda"}, "the library of the ranks' sums, and each rank's device"),
    "evaluation/comparison/plot.py": ({"available"}, "whether matplotlib is installed"),
    "engine/llm.py": ({"device"}, "refuses what is deterministic on other devices alone"),
    "distributed/tensor_parallel.py": ({"device"}, "the mesh of the ranks' devices"),
    "evaluation/scoring.py": ({"device"}, "only CPUs have equal bits at every batch size"),
    "interpret/explain/operators.py": ({"device"}, "times the operators of CPUs alone"),
    "engine/forward.py": ({"device"}, "OpenMP threads compute on a CPU alone"),
    "lora/merging.py": ({"dtype"}, "compares models in the type of the weights"),
    "cli/doctor.py": ({"available", "cuda", "capability"}, "reports what PyTorch and the machine have"),
    "bench/peers/hf_transformers.py": ({"capability"}, "records what the peer ran on"),
    "bench/peers/ours.py": ({"capability"}, "records what PyTorch ran on"),
    "cli/serve.py": ({"available"}, "whether packages of the extra `serve` are installed"),
    "model.py": ({"device"}, "MPS has no float64; meta has no memory"),
    "sampling/sampler.py": ({"device"}, "MPS has no float64; rows are sampled in groups on a CPU"),
    "training/estimate.py": ({"dtype", "device", "cuda"}, "how much memory training takes, and a device has"),
    "training/finetuning.py": ({"device"}, "how much memory the weights take on a CPU"),
    "training/progress.py": ({"cuda"}, "shows the peak memory of a GPU"),
    "training/weights.py": ({"dtype"}, "float32 weights are their own masters"),
    "sampling/choice.py": ({"device"}, "sorts with numpy on a CPU; pins memory for a copy to a GPU"),
}
FLOATING = {"bfloat16", "float16", "float32", "float64"}


def signs(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Signs of a backend selection, with their lines."""
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


def forbidden_signs(source: str, name: str) -> list[str]:
    allowed = ALLOWED.get(name, (set(), ""))[0]
    return [f"{name}:{line} {sign}" for sign, line in signs(ast.parse(source)) if sign not in allowed]


def test_no_other_module_selects_a_backend() -> None:
    seen: set[tuple[str, str]] = set()
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name == "kernels/backend.py":
            continue
        source = path.read_text(encoding="utf-8")
        seen |= {(name, sign) for sign, _ in signs(ast.parse(source))}
        found += forbidden_signs(source, name)
    assert not found
    unused = {(name, sign) for name, (allowed, _) in ALLOWED.items() for sign in allowed} - seen
    assert not unused, "allowed but not present"


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
def test_the_source_check_finds_a_selection(source: str) -> None:
    assert forbidden_signs(source, "cache.py")
