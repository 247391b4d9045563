"""Facts about this machine, read from the operating system; unreadable facts are omitted."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import math
import os
import pathlib
import platform
import re
import subprocess

# CPU flag in Linux -> common name, from the least to the most useful.
X86 = {
    "avx2": "AVX2", "avx_vnni": "AVX-VNNI", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 bf16", "amx_int8": "AMX int8", "amx_bf16": "AMX bf16",
}  # fmt: skip
ARM = {"asimd": "NEON", "asimddp": "dot product", "i8mm": "int8 matrices", "bf16": "bf16", "sve": "SVE"}


def memory() -> tuple[int, int]:
    """Bytes of memory in all and available now, within a container's limit; (0, 0) if unknown."""
    facts = {k: int(v) << 10 for k, v in re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo"), re.MULTILINE)}
    if not facts:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return 0, 0
        return total, total
    total, free = facts["MemTotal"], facts.get("MemAvailable", facts["MemTotal"])
    group = pathlib.Path("/sys/fs/cgroup")
    limit, used = (read(group / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    return total, free


def read(path: str | pathlib.Path) -> str:
    """A system file as text, "" if it is missing."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_name() -> str:
    """Return the vendor's name of the CPU, or the architecture if unavailable."""
    found = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    if found:
        return found[1].strip()
    name = _output("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else ""
    return name or platform.processor() or platform.machine() or "unknown CPU"


def cpu_flags() -> set[str]:
    """Return CPU features by their names in Linux; empty if unreadable."""
    if platform.system() == "Darwin":
        known = _output("sysctl", "-a", "hw.optional").lower()
        arm = {"asimd": "neon", "asimddp": "feat_dotprod", "i8mm": "feat_i8mm", "bf16": "feat_bf16"}
        return {flag for flag, key in arm.items() if re.search(rf"\.{key}: 1", known)}
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def architecture() -> str:
    """Return the CPU's architecture: "x86", "arm64", or the system's name of another one."""
    name = platform.machine().lower()
    names = {"aarch64": "arm64", **dict.fromkeys(("x86_64", "amd64", "i686"), "x86")}
    return names.get(name, name)


def instruction_sets() -> dict[str, bool]:
    """Return the instruction sets relevant to this package, and whether this CPU has each."""
    flags = cpu_flags()
    return {name: flag in flags for flag, name in {"x86": X86, "arm64": ARM}.get(architecture(), {}).items()}


def cores() -> int:
    """Return the number of CPUs available to this process, by its affinity and its control groups' quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota(root: str | pathlib.Path = "/") -> float | None:
    """Return how many CPUs' time the control groups of this process grant it (versions 1 and 2); None: no limit.

    The quota of every group from this process's own up to the mounted root applies. A container may see its own
    group as the root. `root` is the folder that holds proc and sys.
    """
    root = pathlib.Path(root)
    granted = []
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        groups = root / "sys/fs/cgroup"
        mounts = [groups / controllers, groups / "cpu"] if controllers else [groups, groups / "unified"]
        inner = pathlib.PurePosixPath(path.lstrip("/"))
        for folder in (mount / group for mount in mounts for group in (inner, *inner.parents)):
            if controllers:
                quota, period = (read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
            else:
                quota, period = (*read(folder / "cpu.max").split(), "", "")[:2]
            if quota.isdigit() and period.isdigit() and int(period):  # -1 or "max": no limit
                granted.append(int(quota) / int(period))
    return min(granted, default=None)


def runnable() -> int:
    """Return how many threads of the machine run or wait for a CPU just now, with this one; 1 if unknown."""
    found = re.search(r" (\d+)/\d+ ", read("/proc/loadavg"))
    return max(1, int(found[1])) if found else 1


def last_level_cache() -> int:
    """Return the size of the largest CPU cache in bytes; 0 if unknown."""
    sizes = [0]
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", read(path).strip())
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes)


def peak_memory(pid: int | None = None) -> int:
    """Return the peak resident memory of a process in bytes, with mapped files; 0 if unknown.

    Linux's VmHWM, unlike ru_maxrss, does not include the memory of a large parent.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", read(f"/proc/{pid or 'self'}/status"), re.MULTILINE)
    if found:
        return int(found[1]) << 10
    if pid is not None:
        return 0
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak << 10


def resident_memory() -> int:
    """Return the resident memory of this process in bytes, with mapped files; 0 if unknown (other than Linux)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", read("/proc/self/status"), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def return_large_blocks(least: int = 1 << 20) -> bool:
    """Return freed memory of `least` bytes and more to the system at once, where the C library is glibc.

    By itself it keeps blocks of up to 32 MB for later, and fragments them: training then takes up to twice the
    memory of its tensors. Returns whether it was set.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(-3, least))  # M_MMAP_THRESHOLD, which is then constant
    except (AttributeError, OSError, TypeError):
        return False


def return_free_blocks() -> bool:
    """Return the memory of freed small blocks to the system, where the C library is glibc; return whether it is.

    By itself it returns only those at the end of its heap. What is allocated next may not fit between the others.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True


def version(package: str) -> str | None:
    """Return the installed version of a package, without importing it; None if not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def features(system_info: str) -> str:
    """Return the CPU features used by a llama.cpp build: "AVX512, AMX_INT8, ...", or "no AMX"."""
    on = re.findall(r"(\w+) = 1", system_info)
    return ", ".join([*on, *([] if "AMX_INT8" in on else ["no AMX"])])


@functools.cache
def commit() -> str | None:
    """Return this checkout's commit, with "-dirty" if modified; None outside a checkout."""
    here = pathlib.Path(__file__).parent
    git = ("git", "-C", str(here))
    if not _output(*git, "ls-files", "__init__.py"):  # a virtual environment may be inside another checkout
        return None
    return _output(*git, "describe", "--always", "--dirty", "--exclude", "*") or None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
