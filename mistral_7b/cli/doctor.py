"""`mistral-7b doctor`: what this machine has, what runs on it, how fast it could be, and what is missing."""

from __future__ import annotations

import dataclasses
import json
import platform
from typing import Any

from .inputs import busy, read_flags

PACKAGES = {  # package -> what it is for, and the extra that brings it, if any
    "matplotlib": "pictures", "gguf": "writing GGUF for the benchmark's peers",
    "llama-cpp-python": "the benchmark's peer", "transformers": "the benchmark's peer",
}  # fmt: skip
NEEDED = {"bf16": 15.5e9, "int8": 8.5e9, "int4": 5.0e9}  # bytes for Mistral 7B with a context of 4096


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Look at this machine: CPU, memory, compiler, kernels, GPU, measured ceilings, and what to do about gaps."""

    measure: bool = True
    """Measure read bandwidth and matrix products: ten seconds, 2 GB of memory for a moment."""
    json: bool = False
    """Print one JSON object."""


def run(argv: list[str]) -> int:
    args = read_flags(Doctor, "doctor", argv)
    with busy("measuring" if args.measure else "looking"):
        facts = examine(args.measure)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(facts).items():
        table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    for n, text in enumerate(facts["advice"], 1):
        console.print(f"{n}. {text}", highlight=False, markup=False)
    if not facts["advice"]:
        console.print("Nothing is missing.")
    return 0


def examine(measure: bool) -> dict[str, Any]:
    """All facts, and advice. A thing that cannot be found out is said to be so; nothing is raised for it."""
    from ..benchmark import machine

    total, free = machine.memory()
    facts: dict[str, Any] = {
        "cpu": machine.cpu_name(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": machine.cores(),
        "instruction_sets": machine.instruction_sets(),
        "last_level_cache_bytes": machine.last_level_cache(),
        "memory_bytes": total,
        "memory_free_bytes": free,
        "python": platform.python_version(),
        "packages": {name: machine.version(name) for name in ("torch", "triton", *PACKAGES)},
    }
    facts["torch"] = _attempt(torch_facts)
    facts["kernels"] = _attempt(kernel_facts)
    facts["ceilings"] = _attempt(ceilings) if measure else {"skipped": "--no-measure"}
    return {**facts, "advice": advice(facts)}


def torch_facts() -> dict[str, Any]:
    """Threads, the instruction sets PyTorch was built to use here, and the accelerator if there is one."""
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


def kernel_facts() -> dict[str, str]:
    """What the package's own kernels say of themselves; they are compiled for it if they were not."""
    from ..kernels import describe

    return describe()


def ceilings() -> dict[str, Any]:
    from ..benchmark.run import measure_ceilings

    return dataclasses.asdict(measure_ceilings())


def _attempt(find: Any) -> dict[str, Any]:
    """What `find` finds, or why it could not: an odd machine is what this command is for."""
    try:
        found: dict[str, Any] = find()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return found


def advice(facts: dict[str, Any]) -> list[str]:
    """What to do about what is missing, the most rewarding first."""
    out = []
    for part in ("torch", "kernels", "ceilings"):
        if "error" in facts[part]:
            out.append(f"{part} could not be looked at: {facts[part]['error']}")
    if "missing" in facts["kernels"]:
        out.append(facts["kernels"]["missing"])
    sets = facts["instruction_sets"]
    if not any(sets.values()):
        out.append(
            "The CPU's instruction sets cannot be read, or it has none that the kernels use: int8 will be slow."
        )
    elif "AVX2" in sets and not any(on for name, on in sets.items() if "VNNI" in name or "AMX" in name):
        out.append("This CPU has no integer dot product (VNNI or AMX): bf16 may be as fast as int8 in prefill.")
    threads = facts["torch"].get("threads")
    if threads and threads < facts["cores"] // 2:
        out.append(
            f"PyTorch takes {threads} of {facts['cores']} CPUs: is OMP_NUM_THREADS set? --threads overrides it."
        )
    free = facts["memory_free_bytes"]
    fitting = [scheme for scheme, size in NEEDED.items() if free >= size]
    if free and "bf16" not in fitting:
        what = f"--quantization {fitting[0]} fits" if fitting else "even int4 needs more, so close other programs"
        out.append(f"{free / 1e9:.1f} GB of memory are free, and Mistral 7B takes 14.5 in bf16: {what}.")
    gpu = facts["torch"].get("gpu")
    if gpu and gpu not in ("mps",) and not facts["packages"]["triton"]:
        out.append("There is a GPU and no Triton, which its quantised kernels are written in: pip install triton.")
    return out


def rows(facts: dict[str, Any]) -> dict[str, str]:
    """The facts for a person."""
    sets, torch = facts["instruction_sets"], facts["torch"]
    has = ", ".join(name for name, on in sets.items() if on) or "none that is known"
    lacks = ", ".join(name for name, on in sets.items() if not on)
    packages = {name: v for name, v in facts["packages"].items() if name != "torch"}
    out = {
        "CPU": f"{facts['cpu']} ({facts['architecture']}), {facts['cores']} CPUs to use",
        "system": f"{facts['system']}, Python {facts['python']}",
        "it can": has,
        "it cannot": lacks or "(nothing is missing)",
        "memory": f"{facts['memory_bytes'] / 1e9:.1f} GB, {facts['memory_free_bytes'] / 1e9:.1f} GB free",
        "PyTorch": torch.get("error")
        or f"{torch['version']}, {torch['threads']} threads, {torch['cpu_capability']}"
        + ("" if torch["mkldnn"] else ", without oneDNN"),
        "GPU": torch.get("gpu") or "none",
        **{f"kernels: {name}": str(value) for name, value in facts["kernels"].items()},
        "optional": ", ".join(f"{name} {v or 'absent'}" for name, v in packages.items()),
    }
    found = facts["ceilings"]
    if "read_bandwidth" in found:
        kinds = {"float32": found["fp32"], "bf16": found["bf16"], "int8": found["int8"]}
        products = ", ".join(f"{kind} {v / 1e12:.2f}" for kind, v in kinds.items() if v)
        out["reads at most"] = f"{found['read_bandwidth'] / 1e9:.1f} GB/s with {found['threads']} threads"
        out["multiplies at most"] = f"{products} Top/s"
    else:
        out["ceilings"] = found.get("error") or "not measured"
    return out
