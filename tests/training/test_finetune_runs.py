"""Whole runs from files to an adapter: evaluation, early stopping, samples, report, command line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finetune_data import tokenizer, write_base, write_chats
from refusals import refused

from mistral_7b import FinetuneArgs, Mistral7B, TrainingError, finetune
from mistral_7b.cli import main

TINY = FinetuneArgs(
    steps=4, seq_len=64, rows=2, accumulate=2, warmup=1, lr=1e-2, rank=2, dtype="float32", samples=1, max_tokens=4,
    held_out="0.2", eval_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


def args_of(out: Path, **changes: Any) -> FinetuneArgs:
    return dataclasses.replace(TINY, out=str(out), **changes)


def quiet(record: dict[str, Any]) -> None:
    pass


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_from_files_to_what_can_be_used(base: Path, chats: Path, tmp_path: Path, method: Any) -> None:
    last = finetune(base, str(chats), args_of(tmp_path / "run", method=method), show=quiet)
    log = log_of(tmp_path / "run")
    assert [r["step"] for r in log] == [1, 2, 3, 4]
    assert [r["step"] for r in log if "eval_loss" in r] == [2, 4]
    assert log[-1]["eval_loss"] < log[1]["eval_loss"]
    assert 0 <= last["eval_accuracy"] <= 1
    assert last["kl_from_base"] > 0
    if method == "full":
        assert Mistral7B.from_pretrained(tmp_path / "run" / "model").args.vocab_size == tokenizer().vocab_size
    else:
        assert (
            main(["generate", str(base), "What", "--adapter", str(tmp_path / "run" / "adapter"), "--max-tokens=2"])
            == 0
        )


def test_early_stopping_keeps_the_best(base: Path, chats: Path, tmp_path: Path, monkeypatch: Any) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    saved: list[float] = []
    monkeypatch.setattr(
        "mistral_7b.training.supervised.Supervised.evaluate", lambda self, items: {"eval_loss": next(losses)}
    )
    monkeypatch.setattr("mistral_7b.training.trained.TrainedAdapter.save", lambda self, out: saved.append(1))
    args = args_of(tmp_path / "run", steps=20, eval_every=2, patience=2)
    assert finetune(base, str(chats), args, show=quiet)["step"] == 8
    assert len(saved) == 2
    assert finetune(base, str(chats), args, show=quiet)["step"] == 8, "a stopped run stays stopped"


def test_the_report_is_whole_in_itself(base: Path, chats: Path, tmp_path: Path) -> None:
    finetune(base, str(chats), args_of(tmp_path / "run"), show=quiet)
    text = (tmp_path / "run" / "report.html").read_text()
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint(tags)
    assert tags.count("svg") == tags.count("figure") >= 5
    assert "http" not in text
    for said in ("What is", "Held-out loss", "rank = 2", "20 rows of the form"):
        assert said in text


def test_the_held_out_share_is_of_the_seed_and_not_trained_on(base: Path, chats: Path, tmp_path: Path) -> None:
    from mistral_7b.training.held_out import read_examples

    one, same, other = (
        read_examples(args_of(tmp_path, data=(str(chats),), seed=seed), tokenizer()) for seed in (0, 0, 1)
    )
    kept, held = ({tuple(item.ids) for item in items} for items in (one.items, one.held_out))
    assert (len(kept), len(held)) == (16, 4)
    assert not kept & held
    assert held == {tuple(item.ids) for item in same.held_out} != {tuple(item.ids) for item in other.held_out}
    with refused(TrainingError, field="held_out"):
        read_examples(args_of(tmp_path, data=(str(chats),), held_out="0.99"), tokenizer())
    with refused(TrainingError, field="held_out"):
        read_examples(args_of(tmp_path, data=(str(chats),), held_out=str(chats)), tokenizer())


def test_an_adapter_of_no_run_here_is_not_replaced(base: Path, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with refused(TrainingError, field="out"):
        finetune(base, str(chats), args_of(tmp_path))
    (tmp_path / "file").touch()
    with refused(TrainingError, field="out", place=tmp_path / "file"):
        finetune(base, str(chats), args_of(tmp_path / "file" / "run"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_saves_and_resumes(
    base: Path, chats: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    flags = {
        "--model": base, "--data": chats, "--out": tmp_path / "run", "--steps": 4, "--seq-len": 64, "--rows": 1,
        "--accumulate": 1, "--dtype": "float32", "--samples": 0, "--rank": 2, "--warmup": 1,
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]

    def stop(self: object, record: dict[str, float]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("mistral_7b.training.finetuning.ProgressLine.__call__", stop)
    assert main(["finetune", *words]) == 128 + number
    assert f"update 3 of 4 is saved in {tmp_path / 'run' / 'state.pt'}" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["finetune", *words]) == 0
    assert "the adapter is in" in capsys.readouterr().out
    assert [r["step"] for r in log_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_command_previews_examples(base: Path, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--model", str(base), "--data", str(chats), "--preview", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.count("It is") == 2
    assert "20 rows" in said.err


def test_a_killed_run_resumes_and_ends_in_the_same_bits() -> None:
    """The whole test kills 50 times: tests/killed_runs.py."""
    script = Path(__file__).parents[1] / "killed_runs.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "4", "--steps", "6"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)["resumed_at"]) > 0


def test_metrics_of_a_resumed_run_have_each_update_once(tmp_path: Path) -> None:
    from mistral_7b.training.metrics import MetricsFile

    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, [])
    for step in (1, 2, 3):
        first({"step": step})
    MetricsFile(path, [{"step": 1}])({"step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_tensorboard_gets_every_number_where_it_is_installed(tmp_path: Path, monkeypatch: Any) -> None:
    from mistral_7b import machine
    from mistral_7b.training.metrics import tensorboard

    written: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, *given: Any) -> None:
            written.append(given)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(machine, "version", lambda package: None)
    assert tensorboard(tmp_path, 3) is None
    monkeypatch.setattr(machine, "version", lambda package: "2")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    board = tensorboard(tmp_path, 3)
    assert board is not None
    board({"step": 4, "loss": 1.5, "lr": 0.1})
    assert written == [(str(tmp_path), 4), ("loss", 1.5, 4), ("lr", 0.1, 4)]


def test_the_snippets_of_the_docs_run(
    base: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the tiny model, and for one update."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "finetuning.md").read_text() + (root / "docs" / "cli.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("mistral-7b finetune ")]
    assert len(commands) == 6
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path / "chats.jsonl")
    (tmp_path / "manual.txt").write_text("It is 7.\n" * 20)
    for i, command in enumerate(commands):
        words = shlex.split(command.replace("starter", str(base)).replace("runs/mine", f"runs/{i}"))[1:]
        assert main([*words, "--steps=1", "--warmup=1", "--seq-len=64", "--dtype=float32", "--max-tokens=2"]) == 0
    assert "peak" in capsys.readouterr().out
    snippet = re.search(r"```python\n(.*?)```", text, re.S)
    assert snippet is not None
    exec(snippet[1].replace('"starter"', repr(str(base))).replace("epochs=3", "steps=1, warmup=1, seq_len=64"), {})
    assert (tmp_path / "runs" / "mine" / "adapter").is_dir()
