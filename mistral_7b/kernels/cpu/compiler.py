"""Compiles the C++ in cpu/ on first use with the machine's compiler, caches the library, and loads it.

The library is stored in `$XDG_CACHE_HOME/mistral-7b/kernels` under a hash of the sources, the flags, the compiler
and the CPU. Without a compiler, one warning is issued and all operations use their PyTorch twins.

MISTRAL_7B_KERNELS selects the instruction set: native (the default), on x86 avx512 (no AMX) or avx2, on 64-bit ARM
i8mm or dotprod, scalar, or off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import secrets
import shutil
import subprocess
import sys
import warnings

from ... import machine
from ...errors import ConfigError

SOURCE = pathlib.Path(__file__).with_name("entry.cpp")  # includes all headers of this folder
COMPILERS = ("g++", "c++", "clang++")  # g++ first: PyTorch has already loaded its OpenMP library
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off",  # else sums would depend on the instruction set
)  # fmt: skip
INSTRUCTIONS = {
    "native": ("-march=native",),
    "avx512": ("-march=native", "-mno-amx-int8", "-mno-amx-bf16", "-mno-amx-tile"),
    "avx2": ("-march=haswell",),
    "i8mm": ("-march=armv8.2-a+dotprod+i8mm",),
    "dotprod": ("-march=armv8.2-a+dotprod",),
    "scalar": (),
}
OF_ARCHITECTURE = {"x86": ("avx512", "avx2"), "arm64": ("i8mm", "dotprod")}  # the best first
ARM_FLAGS = {"i8mm": "i8mm", "dotprod": "asimddp"}  # the CPU's names, in Linux
VARIABLE = "MISTRAL_7B_KERNELS"

FUNCTIONS = (  # each takes a pointer to one structure of arguments.py
    "linear", "dequantize", "low_rank", "rms_norm", "rms_norm_back", "silu_mul", "silu_mul_back", "rotate",
    "attend", "project", "finish_block", "layers", "round", "feedback",
)  # fmt: skip


def requested() -> str:
    """The instruction set requested by the environment. ConfigError for an unknown name."""
    name, architecture = os.environ.get(VARIABLE, "native") or "native", machine.architecture()
    known = ("native", *OF_ARCHITECTURE.get(architecture, ()), "scalar", "off")
    if name not in known:
        raise ConfigError(
            f"{VARIABLE}={name} is not known on {architecture}: it must be one of {', '.join(known)}",
            field=VARIABLE,
        )
    return name


def _candidates(name: str) -> list[str]:
    """The instruction sets to try for the requested one, the best first."""
    if name != "native":
        return [name]
    if machine.architecture() == "x86":
        return ["native", "avx512"]  # a system may report AMX but not permit it, or it may be wrong
    # A compiler may be too old for an extension of ARM; not all support -march=native on other CPUs.
    flags = machine.cpu_flags() if machine.architecture() == "arm64" else set()
    return [*(name for name, flag in ARM_FLAGS.items() if flag in flags), "scalar"]


@functools.cache
def compiler() -> str | None:
    """The compiler: $CXX, or the first of COMPILERS that is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def cpu() -> str:
    """The CPU's model and features, which compiled code depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def cache_folder() -> pathlib.Path:
    """The folder of compiled libraries."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mistral-7b" / "kernels"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None if they are off or cannot be built."""
    name = requested()
    if name == "off":
        return None
    for instructions in _candidates(name):
        path, why = _build(instructions)
        lib = None if path is None else _load(path)
        if lib is not None and lib.m7b_instructions():
            if lib.m7b_check():
                return lib
            warnings.warn(
                "AMX gives other products on this machine than its vector instructions, so AVX-512 is used, and "
                f"prefill is slower; please report this CPU; {VARIABLE}=avx512 disables this warning",
                stacklevel=2,
            )
        _FAILURES.append(why or f"{path} cannot be loaded; delete it to recompile it")
    return None


def instructions() -> str:
    """The instruction set of the compiled kernels, as entry.cpp names it; "" if there are none."""
    lib = library()
    return lib.m7b_instructions().decode() if lib else ""


_FAILURES: list[str] = []  # why building or loading failed


def missing() -> str:
    """The warning if the kernels are enabled but not available; "" if there is no problem."""
    if library() is not None or not _FAILURES:
        return ""
    return (
        f"the CPU kernels are not compiled ({_FAILURES[-1]}), so PyTorch operators are used, many times slower; "
        f"install g++ (Debian: apt-get install g++), or set {VARIABLE}=off to disable this warning"
    )


@functools.cache
def warn_if_missing() -> None:
    """Warn once if the kernels are enabled but not available."""
    if why := missing():
        warnings.warn(why, stacklevel=2)


def _load(path: pathlib.Path) -> ctypes.CDLL | None:
    try:
        lib = ctypes.CDLL(str(path))
    except OSError:
        return None
    for function in FUNCTIONS:
        getattr(lib, f"m7b_{function}").argtypes = (ctypes.c_void_p,)
        getattr(lib, f"m7b_{function}").restype = None
    lib.m7b_read.argtypes, lib.m7b_read.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int), ctypes.c_int64
    lib.m7b_instructions.restype = ctypes.c_char_p
    return lib


def sources() -> list[pathlib.Path]:
    """All source files of the library."""
    return sorted(path for path in SOURCE.parent.iterdir() if path.suffix in (".cpp", ".h"))


def _fingerprint(cxx: str, flags: list[str]) -> str:
    """A hash of everything the library depends on."""
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sources()]
    inputs = "\0".join([*texts, *flags, cxx, version, cpu(), sys.platform])
    return hashlib.sha256(inputs.encode()).hexdigest()[:16]


def _flags(name: str) -> list[str]:
    return [*FLAGS, *INSTRUCTIONS[name]]


def _library_path(cxx: str, name: str) -> pathlib.Path:
    """The path of the library for an instruction set."""
    return cache_folder() / f"cpu-{name}-{_fingerprint(cxx, _flags(name))}.so"


def _build(name: str) -> tuple[pathlib.Path | None, str]:
    """The library for an instruction set, cached or newly compiled; or None and the reason."""
    cxx = compiler()
    if cxx is None:
        return None, "no C++ compiler was found"
    path = _library_path(cxx, name)
    if path.exists():
        return path, ""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    message = ""
    print("mistral-7b: compiling the CPU kernels, once: up to a minute", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for openmp in (["-fopenmp"], []):  # without OpenMP, the kernels run on one thread
            process = subprocess.run(
                [cxx, *_flags(name), *openmp, str(SOURCE), "-o", str(partial)],
                capture_output=True,
                text=True,
                check=False,
            )
            if process.returncode == 0:
                os.replace(partial, path)  # atomic: another process may compile at the same time
                return path, ""
            message = next(
                (line for line in process.stderr.splitlines() if "error" in line), process.stderr[-200:]
            )
    except OSError as e:
        return None, f"{path.parent}: {e.strerror}"
    finally:
        partial.unlink(missing_ok=True)
    return None, f"{cxx} failed: {message}"
