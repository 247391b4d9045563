"""A number of threads that would crash the process is an error in every API and flag."""

from __future__ import annotations

import pathlib

import pytest
import torch
from command import start
from refusals import refused

from mistral_7b.bench import run as bench
from mistral_7b.bench.quality.run import QualityPlan
from mistral_7b.bench.serving.run import ServingPlan
from mistral_7b.cli import main
from mistral_7b.errors import ConfigError
from mistral_7b.kernels import threads

COMMANDS = {
    "generate": (), "chat": (), "serve": ("--port", "0"), "bench": ("--shape", "tiny"),
    "bench --serving": ("--shape", "tiny"), "bench --quality": ("demo",), "quantize": ("demo", "{out}"),
    "compare": ("demo", "demo"),
}  # fmt: skip


@pytest.fixture
def set_to(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of threads set in PyTorch, without setting it."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    return asked


@pytest.mark.wording
@pytest.mark.parametrize("n", [0, -1, threads.most() + 1, 20_000, 100_000])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it(
    command: str, n: int, tmp_path: pathlib.Path, set_to: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(out=tmp_path / "out") for word in (*command.split(), *COMMANDS[command])]
    code = main([*words, "--threads", str(n)])
    err = capsys.readouterr().err
    bound = "at least 1" if n < 1 else f"at most {threads.most()}"
    assert (code, err.count("\n")) == (2, 1)
    assert f"--threads must be {bound}, not {n}" in err
    assert (set_to, list(tmp_path.iterdir())) == ([], [])


def test_python_doors_refuse_it_too() -> None:
    plans = (
        lambda n: threads.use(n),
        lambda n: bench.Plan("m", {}, None, ("int4",), ("decode",), threads=n),
        lambda n: ServingPlan("m", {}, None, ("int4",), (), 4, 64, threads=n),
        lambda n: QualityPlan("m", "demo", ("int4",), "", "", 1, threads=n),
    )
    for plan in plans:
        for n in (0, threads.most() + 1, 100_000):
            with refused(ConfigError, field="threads"):
                plan(n)


def test_the_bound_itself_is_accepted(set_to: list[int]) -> None:
    threads.use(threads.most())
    threads.use(1)
    threads.use()  # nothing is changed
    assert set_to == [threads.most(), 1]


def test_one_that_the_environment_asks_for_is_refused_by_its_name(tmp_path: pathlib.Path) -> None:
    """Without MKL_DYNAMIC, or without MKL, PyTorch uses OMP_NUM_THREADS: it crashed with SIGSEGV."""
    environment = {"OMP_NUM_THREADS": "100000", "MKL_DYNAMIC": "FALSE"}
    before = f"import os; os.environ.update({environment!r})"
    process = start("quantize", "demo", str(tmp_path / "out"), "--tokens", "9", before=before)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("this PyTorch takes no more threads than there are CPUs, whatever is asked")
    assert process.returncode == 2
    assert b"OMP_NUM_THREADS" in err
    assert err.strip().count(b"\n") == 0
