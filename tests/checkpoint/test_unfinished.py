"""An interrupted quantization continues where it stopped, and gives the same bits."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import tiny_model, tokens_of

from mistral_7b import CheckpointError
from mistral_7b.checkpoint import load, quantize, read_record
from mistral_7b.checkpoint.unfinished import STATE

TEXT = tokens_of((3, 20))
GUIDE = [tokens_of((n,), seed=n).tolist() for n in (30, 7)]
FILES = ("quantized.safetensors", "config.json")


@pytest.fixture
def plain(tmp_path: pathlib.Path) -> pathlib.Path:
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "source" / "plain")
    return tmp_path / "source" / "plain"


def interrupting(name: str) -> Any:
    """A progress callback that interrupts after the first tensor with this prefix."""

    def progress(done: int, total: int, tensor: str) -> None:
        if tensor.startswith(name):
            raise KeyboardInterrupt

    return progress


def partials(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".out.partial-")]


@pytest.mark.parametrize("guide", [GUIDE, None], ids=["calibrated", "nearest"])
@pytest.mark.parametrize("stop", ["layers.1", "norm", "output"])
def test_an_interrupted_run_continues_with_the_same_bits(
    tmp_path: pathlib.Path, plain: pathlib.Path, stop: str, guide: list[list[int]] | None
) -> None:
    more: dict[str, Any] = {"calibration_tokens": guide, "calibration_text": "a guide"}
    wanted = quantize(plain, tmp_path / "whole", "int4", TEXT, "a text", **more)
    with pytest.raises(KeyboardInterrupt):
        quantize(plain, tmp_path / "out", "int4", TEXT, "a text", interrupting(stop), **more)
    (rest,) = partials(tmp_path)
    for path in (rest, rest / FILES[0], rest / STATE):
        with pytest.raises(CheckpointError):
            load(path)
    told, resumed = [], []
    record = quantize(
        plain, tmp_path / "out", "int4", TEXT, "a text", lambda *now: told.append(now),
        resumed=lambda *now: resumed.append(now), **more,
    )  # fmt: skip
    done = 1 if stop == "layers.1" else 2
    assert resumed == [(done, 2)]
    assert not any(name.startswith(("tok_embeddings", "layers.0")) for _, _, name in told)
    assert told[-1][0] == told[-1][1] == record.nbytes
    assert record == wanted == read_record(tmp_path / "out")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not partials(tmp_path)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


KILLED = """
import os, signal, sys, torch
from mistral_7b.checkpoint import quantize

def progress(done, total, name):
    if name.startswith("layers.1"):
        os.kill(os.getpid(), signal.SIGKILL)

quantize(sys.argv[1], sys.argv[2], "int4", torch.tensor(eval(sys.argv[3])), "a text", progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="whether a process has ended is not told there")
def test_a_killed_run_continues(tmp_path: pathlib.Path, plain: pathlib.Path) -> None:
    wanted = quantize(plain, tmp_path / "whole", "int4", TEXT, "a text")
    run = subprocess.run([sys.executable, "-c", KILLED, plain, tmp_path / "out", str(TEXT.tolist())], check=False)
    assert run.returncode == -9
    resumed: list[tuple[int, int]] = []
    record = quantize(plain, tmp_path / "out", "int4", TEXT, "a text", resumed=lambda *now: resumed.append(now))
    assert resumed == [(1, 2)]
    assert record == wanted
    assert (tmp_path / "out" / FILES[0]).read_bytes() == (tmp_path / "whole" / FILES[0]).read_bytes()


@pytest.mark.parametrize("change", ["scheme", "tokens", "text", "guide", "source", "damage"])
def test_another_job_starts_anew(tmp_path: pathlib.Path, plain: pathlib.Path, change: str) -> None:
    job: dict[str, Any] = {"scheme": "int4", "tokens": TEXT, "text": "a text", "calibration_tokens": GUIDE}
    with pytest.raises(KeyboardInterrupt):
        quantize(plain, tmp_path / "out", progress=interrupting("norm"), **job)
    (rest,) = partials(tmp_path)
    other = {"scheme": "int8", "tokens": TEXT[:2], "text": "b", "guide": GUIDE[:1]}
    if change == "source":
        tiny_model(dtype=torch.bfloat16).save_pretrained(plain.parent / "again")
        (plain.parent / "again" / "model.safetensors").replace(plain / "model.safetensors")
    elif change == "damage":
        (rest / STATE).write_bytes((rest / STATE).read_bytes()[:100])
    else:
        job["calibration_tokens" if change == "guide" else change] = other[change]
    resumed: list[tuple[int, int]] = []
    record = quantize(plain, tmp_path / "out", **job, resumed=lambda *now: resumed.append(now))
    assert not resumed
    assert read_record(tmp_path / "out") == record
    assert not partials(tmp_path)


def test_an_interruption_before_the_first_layer_leaves_nothing(
    tmp_path: pathlib.Path, plain: pathlib.Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(plain, tmp_path / "out", "int4", TEXT, "a text", interrupting("layers.0"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
