"""`mistral-7b doctor`: report the hardware, kernels, measured ceilings and missing software of this machine."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import first_line
from .inputs import busy, read_flags

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = {  # extra -> what it is for, and its packages
    "serve": ("`serve` and structured outputs", ("llguidance", "fastapi", "uvicorn", "prometheus-client")),
    "otel": ("traces of `serve`", ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")),
    "train": ("TensorBoard's files of `finetune`", ("tensorboard",)),
    "eval": ("`eval harness`", ("lm-eval",)),
    "scale": ("`serve --ray`", ("ray",)),
    "docs": ("`make site`", ("mkdocs-material", "mkdocstrings")),
    "plot": ("plots of `train`, `bench`, `compare`, `eval`, `explain`", ("matplotlib",)),
    "peers": ("the engines of `bench --peers`", ("llama-cpp-python", "gguf", "transformers")),
    "gpu-tests": ("tests of the GPU kernels without a GPU", ("triton",)),
    "page-tests": ("tests of the chat page", ("playwright",)),
    "clients": (
        "tests of clients of `serve`",
        ("langchain-openai", "langchain-mistralai", "langchain-anthropic", "langchain-ollama", "ollama"),
    ),
}
MEASURED = {  # the ceilings in the order of measurement
    "read_bandwidth": "memory bandwidth", "fp32": "float32 products", "bf16": "bf16 products",
    "int8": "int8 products",
}  # fmt: skip
DOT_PRODUCTS = ("VNNI", "AMX", "dot product")  # parts of the names of instruction sets with one
NAME_WIDTH = 27  # characters of the longest row name
NEEDED = {"bf16": 15.5e9, "int8": 8.9e9, "int4": 5.3e9}  # bytes for Mistral 7B with a context of 4096
SECONDS = 15.0  # time limit for all measurements


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check this machine: CPU, memory, compiler, kernels, GPU, measured ceilings, and how to fix problems."""

    measure: bool = True
    """Measure memory bandwidth and matrix products: at most 15 seconds, briefly 2 GB of memory."""
    json: bool = False
    """Print one JSON object."""


def run(argv: list[str]) -> int:
    args = read_flags(Doctor, "doctor", argv)
    from rich.console import Console

    console, facts = Console(), dict[str, Any]()
    for found in examine(args.measure):
        if not args.json:
            show(console, rows({**facts, **found}, found))
        facts |= found
    facts["advice"] = advice(facts)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for n, text in enumerate(facts["advice"], 1):
        console.print(f"{n}. {text}", highlight=False, markup=False)
    if not facts["advice"]:
        console.print("Nothing is missing.")
    return 0


def show(console: Console, rows: dict[str, str]) -> None:
    """Print some rows of the table; later facts follow below."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True, width=NAME_WIDTH)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)


def examine(measure: bool) -> Iterator[dict[str, Any]]:
    """Yield all facts: those read from the system first, measurements last.

    A fact that cannot be determined has an "error" entry; no exception is raised.
    """
    yield machine_facts()
    with busy("importing PyTorch"):
        found = _attempt(torch_facts)
    yield {"torch": found}
    yield {"kernels": _attempt(kernel_facts)}
    yield {"ceilings": _attempt(ceilings) if measure else {"skipped": "--no-measure"}}


def machine_facts() -> dict[str, Any]:
    """Return hardware, operating system and the versions of installed packages."""
    from .. import machine

    total, free = machine.memory()
    packages = dict.fromkeys(name for _, names in EXTRAS.values() for name in names)
    return {
        "cpu": machine.cpu_name(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": machine.cores(),
        "instruction_sets": machine.instruction_sets(),
        "last_level_cache_bytes": machine.last_level_cache(),
        "memory_bytes": total,
        "memory_free_bytes": free,
        "python": platform.python_version(),
        "packages": {name: machine.version(name) for name in ("torch", "triton", *packages)},
    }


def torch_facts() -> dict[str, Any]:
    """Return PyTorch's version, threads and CPU capability, and the accelerator if there is one."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    gpu = None
    if found is not None:
        gpu = torch.cuda.get_device_name() if found.type == "cuda" else found.type
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "gpu": gpu,
    }


def kernel_facts() -> dict[str, Any]:
    """Return the backend of each operation and the reason (kernels/backend.py); compile the kernels if needed."""
    from ..kernels import backend

    return backend.describe()


def ceilings() -> dict[str, Any]:
    """Return the ceilings measured within SECONDS; show progress on a terminal."""
    from ..bench.run import find_ceilings

    with busy(f"measuring, at most {SECONDS:.0f} seconds") as tell:
        return find_ceilings(seconds=SECONDS, tell=lambda what: tell(f"measuring: {MEASURED.get(what, what)}"))


def _attempt(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `find`, or its error: this command must also work on unusual machines."""
    try:
        return find()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def advice(facts: dict[str, Any]) -> list[str]:
    """Return recommendations, the most useful first."""
    out = []
    for part in ("torch", "kernels", "ceilings"):
        if "error" in facts[part]:
            out.append(f"{part} could not be checked: {facts[part]['error']}")
    if "missing" in facts["kernels"]:
        out.append(facts["kernels"]["missing"])
    sets = facts["instruction_sets"]
    if not any(sets.values()):
        out.append(
            "The CPU's instruction sets cannot be read, or the kernels use none of them: int8 will be slow."
        )
    elif not any(on for name, on in sets.items() if any(part in name for part in DOT_PRODUCTS)):
        out.append(
            "This CPU has no integer dot product (VNNI, AMX, ARM's dotprod): int8 and int4 speed up prefill less."
        )
    threads = facts["torch"].get("threads")
    if threads and threads < facts["cores"] // 2:
        out.append(
            f"PyTorch uses {threads} of {facts['cores']} CPUs: is OMP_NUM_THREADS set? --threads overrides it."
        )
    free = facts["memory_free_bytes"]
    fitting = [scheme for scheme, size in NEEDED.items() if free >= size]
    if free and "bf16" not in fitting:
        what = f"--quantization {fitting[0]} fits" if fitting else "int4 does not fit either; close other programs"
        out.append(f"{free / 1e9:.1f} GB of memory are free, but Mistral 7B takes 14.5 GB in bf16: {what}.")
    gpu = facts["torch"].get("gpu")
    if gpu and gpu not in ("mps",) and not facts["packages"]["triton"]:
        out.append("Triton, which the quantized GPU kernels need, is not installed: pip install triton.")
    return out


def rows(facts: dict[str, Any], found: dict[str, Any]) -> dict[str, str]:
    """Return table rows for the facts just `found`; `facts` are all facts so far."""
    if "cpu" in found:
        return machine_rows(found)
    if "torch" in found:
        torch = found["torch"]
        version = (
            torch.get("error") or f"{torch['version']}, {torch['threads']} threads, {torch['cpu_capability']}"
        )
        without = "" if torch.get("mkldnn", True) else ", without oneDNN"
        return {"PyTorch": version + without, "GPU": torch.get("gpu") or "none"}
    if "kernels" in found:
        return kernel_rows(found["kernels"])
    return ceiling_rows(found["ceilings"], facts["kernels"].get("running", ""))


def kernel_rows(facts: dict[str, Any]) -> dict[str, str]:
    """Return rows on the kernels, and on the backend of each operation with the reason."""
    out = {f"kernels: {name}": str(value) for name, value in facts.items() if name != "operations"}
    for device, operations in facts.get("operations", {}).items():
        for name, choice in operations.items():
            out[f"{device}: {name}"] = f"{choice['backend']}: {choice['reason']}"
    return out


def machine_rows(facts: dict[str, Any]) -> dict[str, str]:
    sets = facts["instruction_sets"]
    present = ", ".join(name for name, on in sets.items() if on) or "(none known)"
    absent = ", ".join(name for name, on in sets.items() if not on) or "(none)"
    return {
        "CPU": f"{facts['cpu']} ({facts['architecture']}), {facts['cores']} CPUs available",
        "system": f"{facts['system']}, Python {facts['python']}",
        "instruction sets": present,
        "not available": absent,
        "memory": f"{facts['memory_bytes'] / 1e9:.1f} GB, {facts['memory_free_bytes'] / 1e9:.1f} GB free",
        **{f"extra: {extra}": extra_row(extra, facts["packages"]) for extra in EXTRAS},
    }


def extra_row(extra: str, versions: dict[str, str | None]) -> str:
    """Return what an extra is for, with its packages' versions or what it lacks and how to install it."""
    purpose, packages = EXTRAS[extra]
    if missing := [name for name in packages if versions[name] is None]:
        return f"{purpose}: lacks {', '.join(missing)} (pip install 'mistral-7b[{extra}]')"
    return f"{purpose}: {', '.join(f'{name} {versions[name]}' for name in packages)}"


def ceiling_rows(found: dict[str, Any], kernels: str) -> dict[str, str]:
    """Return rows on the ceilings and how they were measured."""
    if "error" in found or "skipped" in found:
        return {"ceilings": found.get("error") or "not measured"}
    out = {}
    if "read_bandwidth" in found:
        out["read bandwidth"] = f"{found['read_bandwidth'] / 1e9:.1f} GB/s with {found['threads']} threads"
    kinds = {"float32": "fp32", "bf16": "bf16", f"int8 by the kernels ({kernels})": "int8"}
    if products := [f"{kind} {found[key] / 1e12:.3g}" for kind, key in kinds.items() if found.get(key)]:
        out["matrix products"] = f"{', '.join(products)} Top/s"
    if missing := [word for key, word in MEASURED.items() if key not in found]:
        out["not measured"] = (
            f"{', '.join(missing)}: not finished within {SECONDS:.0f} seconds, the machine is busy"
        )
    return out
