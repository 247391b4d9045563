"""The C++ in cpu/, compiled on first use with the machine's own compiler, kept, and loaded.

The library lies in `$XDG_CACHE_HOME/mistral-7b/kernels` under a hash of everything that it depends on: the
sources, the flags, the compiler and the CPU. Without a compiler this is said once, and every function of this
room runs its PyTorch twin.

MISTRAL_7B_KERNELS chooses the instructions: native (the default), avx512 (no AMX), avx2, scalar, or off.
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

from ...errors import ConfigError

SOURCE = pathlib.Path(__file__).with_name("entry.cpp")  # which includes all that lies beside it
COMPILERS = ("g++", "c++", "clang++")  # g++ first: its OpenMP is the one that PyTorch has loaded already
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off",  # or a sum would depend on the instructions
)  # fmt: skip
INSTRUCTIONS = {
    "native": ("-march=native",),
    "avx512": ("-march=native", "-mno-amx-int8", "-mno-amx-bf16", "-mno-amx-tile"),
    "avx2": ("-march=haswell",),
    "scalar": (),
    "off": (),
}
VARIABLE = "MISTRAL_7B_KERNELS"

FUNCTIONS = (  # each takes one structure of arguments.py, and returns nothing
    "linear", "low_rank", "rms_norm", "silu_mul", "rotate", "attend", "project", "finish_block", "layers",
)  # fmt: skip


def asked() -> str:
    """Which instructions the environment asks for. ConfigError for a name that is none."""
    name = os.environ.get(VARIABLE, "native") or "native"
    if name not in INSTRUCTIONS:
        raise ConfigError(f"{VARIABLE}={name} is not known: it can be {', '.join(INSTRUCTIONS)}", field=VARIABLE)
    return name


@functools.cache
def compiler() -> str | None:
    """The compiler: $CXX, or the first of COMPILERS that is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def cpu() -> str:
    """What tells this CPU from another for a compiler: its architecture and features."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def cache_folder() -> pathlib.Path:
    """Where compiled libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mistral-7b" / "kernels"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none to be had."""
    name = asked()
    if name == "off":
        return None
    for instructions in dict.fromkeys((name, "avx512")):  # where a system knows of AMX and does not grant it
        path, why = _build(instructions)
        lib = None if path is None else _load(path)
        if lib is not None and lib.m7b_instructions():
            return lib
        _WHY.append(why or f"{path} cannot be loaded; remove it to have it compiled again")
    return None


def instructions() -> str:
    """What the compiled kernels run on: AMX, AVX-512 VNNI, AVX2 or scalar; "" where there are none."""
    lib = library()
    return lib.m7b_instructions().decode() if lib else ""


def must_compile() -> bool:
    """Whether `library` has to compile first, which takes from ten seconds to a minute: nothing is kept yet."""
    name, cxx = asked(), compiler()
    return name != "off" and cxx is not None and not _place(cxx, name).exists()


_WHY: list[str] = []  # what was in the way, if anything was


def missing() -> str:
    """What to say where the kernels were wanted and could not be had; "" where all is well."""
    if library() is not None or not _WHY:
        return ""
    return (
        f"the CPU kernels are not compiled ({_WHY[-1]}), so PyTorch's operators stand in, many times slower; "
        f"install g++ (Debian: apt-get install g++), or set {VARIABLE}=off to silence this"
    )


@functools.cache
def warn_if_missing() -> None:
    """Say so once."""
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
    """All files of the one piece that is compiled."""
    return sorted(path for path in SOURCE.parent.iterdir() if path.suffix in (".cpp", ".h"))


def _fingerprint(cxx: str, flags: list[str]) -> str:
    """A hash of all that a library depends on."""
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sources()]
    what = "\0".join([*texts, *flags, cxx, version, cpu(), sys.platform])
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _flags(name: str) -> list[str]:
    return [*FLAGS, *INSTRUCTIONS[name]]


def _place(cxx: str, name: str) -> pathlib.Path:
    """Where the library for these instructions is kept."""
    return cache_folder() / f"cpu-{name}-{_fingerprint(cxx, _flags(name))}.so"


def _build(name: str) -> tuple[pathlib.Path | None, str]:
    """The library for these instructions, from the cache or compiled; or None and why."""
    cxx = compiler()
    if cxx is None:
        return None, "no C++ compiler was found"
    path = _place(cxx, name)
    if path.exists():
        return path, ""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    said = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for openmp in (["-fopenmp"], []):  # without it on one thread: better than not at all
            done = subprocess.run(
                [cxx, *_flags(name), *openmp, str(SOURCE), "-o", str(partial)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                os.replace(partial, path)  # two processes may compile at once: either result will do
                return path, ""
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
    except OSError as e:
        return None, f"{path.parent}: {e.strerror}"
    finally:
        partial.unlink(missing_ok=True)
    return None, f"{cxx} failed: {said}"
