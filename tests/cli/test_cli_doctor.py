"""`mistral-7b doctor`: facts and hints, on this machine and on unusual ones."""

from __future__ import annotations

import json
import pathlib
import re
import sys
import time
import tomllib

import pytest
import torch
from waiting import soon

import mistral_7b
from mistral_7b import machine
from mistral_7b.cli import doctor
from mistral_7b.errors import BenchmarkError
from mistral_7b.kernels import backend

GOOD = {
    "torch": {"threads": 4, "gpu": None}, "ceilings": {}, "cores": 4,
    "kernels": {"compiler": "/usr/bin/g++", "asked for": "native", "running": "AVX2", "library": "/a.so"},
    "instruction_sets": {"AVX2": True, "AVX-512 VNNI": True}, "memory_free_bytes": 20e9,
    "packages": {"triton": None},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiled() -> None:
    """Prevents the message that the kernels are compiled."""
    backend.describe()


def test_json_has_the_facts(run, ceilings_asked: list) -> None:
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    assert ceilings_asked == [(None, False)]
    facts = json.loads(out)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["threads"] >= 1
    assert facts["cores"] == machine.cores()
    assert 1e9 < facts["ceilings"]["read_bandwidth"] < 1e13
    assert 1e9 < facts["ceilings"]["fp32"] < 1e15
    assert facts["kernels"]["running"]
    assert facts["memory_bytes"] >= facts["memory_free_bytes"] > 0


def test_table_for_a_person(run) -> None:
    code, out, _ = run("doctor", "--no-measure")
    assert code == 0
    for text in (
        "CPU",
        "instruction sets",
        "memory",
        "PyTorch",
        "GPU",
        "kernels: compiler",
        "kernels: running",
        "not measured",
    ):
        assert text in out


def test_facts_come_before_measures(run, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    seen: list[str] = []

    def find_ceilings(seconds: float, tell: object) -> dict[str, float]:
        seen.append(capsys.readouterr().out)
        assert 0 < seconds <= 15
        return {"threads": 2, "read_bandwidth": 12.3e9, "fp32": 4e12, "bf16": None, "int8": 8e12}

    monkeypatch.setattr("mistral_7b.bench.run.find_ceilings", find_ceilings)
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for text in ("CPU", "memory", "extra: serve", "PyTorch", "GPU", "kernels: running"):
        assert f"\n{text} " in f"\n{seen[0]}"
        assert f"\n{text} " not in f"\n{out}"
    assert "read bandwidth" in out
    assert "12.3 GB/s with 2 threads" in out
    assert "float32 4, int8 by the kernels" in " ".join(out.split())
    assert "bf16" not in out.partition("matrix products")[2].partition("Top/s")[0]


@pytest.mark.parametrize("flag", ["--json", "--measure"])
def test_a_probe_that_never_ends_does_not_hang_it(run, tmp_path: pathlib.Path, monkeypatch, flag: str) -> None:
    script = tmp_path / "python"
    lines = "echo '{\"threads\": 2}'; echo '{\"read_bandwidth\": 1e9}'"
    script.write_text(f"#!/bin/sh\n{lines}; exec sleep 1000\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(doctor, "SECONDS", 1.0)
    code, out, err = soon(30, lambda: run("doctor", flag), clock=time.monotonic)
    assert (code, err) == (0, "")
    if flag == "--json":
        assert json.loads(out)["ceilings"] == {"threads": 2, "read_bandwidth": 1e9}
    else:
        assert "1.0 GB/s" in out
        assert "float32 products, bf16 products, int8 products: not finished within 1 seconds" in " ".join(
            out.split()
        )


def test_measurements_can_be_skipped(run) -> None:
    code, out, err = run("doctor", "--no-measure", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["ceilings"] == {"skipped": "--no-measure"}


def test_every_extra_is_listed_with_what_it_lacks(run, monkeypatch) -> None:
    project = tomllib.loads((pathlib.Path(mistral_7b.__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    listed = {name: set(packages) for name, (_, packages) in doctor.EXTRAS.items()}
    names = {
        extra: {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}
        for extra, requirements in extras.items()
    }
    assert listed == {extra: packages for extra, packages in names.items() if extra != "dev"}
    version = machine.version
    monkeypatch.setattr(machine, "version", lambda name: None if name in ("uvicorn", "fastapi") else version(name))
    code, out, _ = run("doctor", "--no-measure")
    assert code == 0
    row = next(line for line in " ".join(out.split()).split("extra: ") if line.startswith("serve"))
    assert "lacks fastapi, uvicorn" in row
    assert "pip install 'mistral-7b[serve]'" in row


def test_nothing_is_missing_on_a_good_machine() -> None:
    assert doctor.advice(GOOD) == []
    assert doctor.advice({**GOOD, "instruction_sets": {"NEON": True, "dot product": True}}) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernels": {"missing": "the CPU kernels are not compiled"}}, "kernels are not compiled"),
        ({"instruction_sets": {"AVX2": True, "AMX int8": False}}, "no integer dot product"),
        ({"instruction_sets": {"NEON": True, "dot product": False}}, "no integer dot product"),
        ({"instruction_sets": {"AVX2": False}}, "instruction sets cannot be read"),
        ({"torch": {"threads": 1, "gpu": None}}, "OMP_NUM_THREADS"),
        ({"memory_free_bytes": 9e9}, "--quantization int8 fits"),
        ({"memory_free_bytes": 6e9}, "--quantization int4 fits"),
        ({"memory_free_bytes": 2e9}, "close other programs"),
        ({"torch": {"threads": 4, "gpu": "NVIDIA H200"}}, "Triton"),
        ({"ceilings": {"error": "no memory"}}, "ceilings could not be checked: no memory"),
    ],
)
def test_what_is_missing_is_told(change: dict[str, object], text: str) -> None:
    (told,) = doctor.advice({**GOOD, **change})
    assert text in told


def test_kernels_that_cannot_be_built_are_advice_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from mistral_7b.kernels.cpu import compiler

    monkeypatch.setattr(compiler, "compiler", lambda: None)
    monkeypatch.setattr(compiler, "library", compiler.library.__wrapped__)
    facts = doctor.kernel_facts()
    assert (facts["running"], facts["library"]) == ("PyTorch operators", "none")
    assert "no C++ compiler was found" in facts["missing"]


@pytest.mark.wording
def test_no_traceback_where_everything_fails(run, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("an odd machine\nwith details")

    def unmeasured(**limits: object) -> None:
        raise BenchmarkError("killed")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setattr(backend, "describe", broken)
    monkeypatch.setattr("mistral_7b.bench.run.find_ceilings", unmeasured)
    monkeypatch.setattr(machine, "read", lambda path: "")
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert "torch could not be checked: RuntimeError: an odd machine" in " ".join(out.split())
    assert "ceilings could not be checked: BenchmarkError: killed" in " ".join(out.split())
