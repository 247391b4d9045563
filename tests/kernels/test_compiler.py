"""The C++ sources: all are compiled, hashed and packaged."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from refusals import refused

from mistral_7b import machine
from mistral_7b.errors import ConfigError
from mistral_7b.kernels.cpu import compiler


def test_the_entry_includes_every_source() -> None:
    seen, todo = set(), [compiler.SOURCE]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [path.with_name(name) for name in re.findall(r'#include "(.+)"', path.read_text())]
    assert sorted(seen) == compiler.sources()
    order = re.findall(r"//   (\w+\.h) ", compiler.SOURCE.read_text())  # the documented reading order
    assert sorted([*order, "entry.cpp"]) == [path.name for path in compiler.sources()]
    for i, name in enumerate(order):
        included = re.findall(r'#include "(.+)"', compiler.SOURCE.with_name(name).read_text())
        assert set(included) <= set(order[:i]), name


@pytest.mark.skipif(machine.architecture() != "x86", reason="the CPUs are x86")
@pytest.mark.parametrize("cpu", ["skylake-avx512", "haswell", "ivybridge", "bdver2", "x86-64"])
def test_the_sources_compile_for_cpus_with_a_part_of_the_instructions(cpu: str) -> None:
    """AVX-512 without VNNI, AVX2, F16C without AVX2, FMA without AVX2, none of them."""
    cxx = compiler.compiler()
    if cxx is None:
        pytest.skip("there is no C++ compiler")
    command = [cxx, *compiler.FLAGS, f"-march={cpu}", "-fsyntax-only", str(compiler.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_fingerprint_depends_on_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(compiler.SOURCE.parent, tmp_path / "cpu")
    monkeypatch.setattr(compiler, "SOURCE", tmp_path / "cpu" / "entry.cpp")
    seen = {compiler._fingerprint("true", [])}
    for path in compiler.sources():
        path.write_text(path.read_text() + "\n")
        seen.add(compiler._fingerprint("true", []))
    assert len(seen) == len(compiler.sources()) + 1 > 10
    assert compiler._fingerprint("true", ["-O3"]) not in seen


def test_compiling_is_said_and_a_cached_library_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cxx = tmp_path / "cxx"
    cxx.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\n[ "$1" = --version ] || touch "$1"\n')
    cxx.chmod(0o755)
    monkeypatch.setattr(compiler, "compiler", lambda: str(cxx))
    for said in ("mistral-7b: compiling the CPU kernels, once: up to a minute\n", ""):
        path, why = compiler._build("native")
        assert path is not None
        assert (path.exists(), why) == (True, "")
        assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("architecture", "known", "unknown"),
    [
        ("x86_64", ("avx512", "avx2"), ("i8mm", "dotprod", "avx1024")),
        ("arm64", ("i8mm", "dotprod"), ("avx512", "avx2")),
        ("riscv64", (), ("avx2", "dotprod")),
    ],
)
def test_instruction_sets_of_other_architectures_are_refused(
    architecture: str, known: tuple[str, ...], unknown: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    for name in (*known, "native", "scalar", "off"):
        monkeypatch.setenv(compiler.VARIABLE, name)
        assert compiler.requested() == name
    for name in unknown:
        monkeypatch.setenv(compiler.VARIABLE, name)
        with refused(ConfigError, field="MISTRAL_7B_KERNELS"):
            compiler.requested()


SYSCTL = "hw.optional.neon: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"


@pytest.mark.parametrize(
    ("system", "architecture", "features", "tried"),
    [
        ("Linux", "x86_64", "flags\t\t: fpu avx2\n", ["native", "avx512"]),
        ("Linux", "aarch64", "Features\t: fp asimd asimddp i8mm\n", ["i8mm", "dotprod", "scalar"]),
        ("Linux", "aarch64", "Features\t: fp asimd asimddp\n", ["dotprod", "scalar"]),
        ("Linux", "aarch64", "Features\t: fp asimd\n", ["scalar"]),
        ("Linux", "riscv64", "isa\t: rv64imafdc\n", ["scalar"]),
        ("Darwin", "arm64", SYSCTL, ["dotprod", "scalar"]),
    ],
)
def test_the_best_instruction_set_of_the_cpu_is_tried_first(
    system: str, architecture: str, features: str, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(compiler.VARIABLE, raising=False)
    monkeypatch.setattr(machine.platform, "system", lambda: system)
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine, "read", lambda path: features if system == "Linux" else "")
    monkeypatch.setattr(machine, "_output", lambda *command: features if system == "Darwin" else "")
    names: list[str] = []
    monkeypatch.setattr(compiler, "_build", lambda name: (names.append(name), (None, "it is too old"))[1])
    monkeypatch.setattr(compiler, "_FAILURES", [])
    assert compiler.library.__wrapped__() is None
    assert names == tried
    monkeypatch.setenv(compiler.VARIABLE, "scalar")
    assert compiler.library.__wrapped__() is None
    assert names == [*tried, "scalar"]


def test_every_source_is_packaged() -> None:
    root = Path(__file__).parents[2]
    globs = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "mistral_7b"
    ]
    shipped = {path for glob in globs for path in (root / "mistral_7b").glob(glob)}
    assert {root / "mistral_7b/kernels/cpu" / path.name for path in compiler.sources()} <= shipped
