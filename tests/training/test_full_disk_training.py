"""A disk that fills up during training: one error message, and the last saved state resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from full_disk import below, full_at_every_write, refusal

from mistral_7b import WriteError
from mistral_7b.cli import main
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.training import TrainArgs, train, trainer
from mistral_7b.training.data import PackedDocuments
from mistral_7b.training.vocabulary import train_vocabulary


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> TrainArgs:
    """A run of three updates, each saved."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.py").write_text("".join(f"def f{j}(x):\n    return x * {j % 7}\n\n" for j in range(60)))
    train_vocabulary([(folder / "a.py").read_text()], 290, folder / "tokenizer.model.v3")
    return TrainArgs(
        data=(str(folder / "a.py"),), tokenizer=str(folder / "tokenizer.model.v3"),
        dim=16, n_layers=1, head_dim=8, hidden_dim=16, n_heads=2, n_kv_heads=1, sliding_window=8,
        steps=3, seq_len=16, rows=2, warmup=1, dtype="float32", save_every=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotting would take most of the time, and has its own test."""
    monkeypatch.setattr(trainer, "draw_curve", lambda log, path: True)


def training(args: TrainArgs, out: Path, **changes: object) -> Callable[[], object]:
    changed = dataclasses.replace(args, out=str(out), **changes)  # type: ignore[arg-type]
    return lambda: train(changed, show=lambda record: None)


def test_a_state_that_cannot_be_saved_leaves_the_one_before(
    args: TrainArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at each write."""
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    data = PackedDocuments.from_files([Path(args.data[0])], tokenizer, args.seq_len, args.seed)
    one = trainer.Trainer(args, trainer.open_model(args, tokenizer), data)
    path = tmp_path / "state.pt"
    one.update()
    one.save(path)
    one.update()
    said = str(path)
    assert full_at_every_write(tmp_path, lambda: one.save(path), monkeypatch, said) > 20
    assert torch.load(path, weights_only=True)["step"] == 2


@pytest.mark.parametrize(("room", "saved"), [(10, 0), (400, 1), (700, 2)])
def test_a_run_that_was_cut_by_a_full_disk_resumes_to_the_same_bits(
    args: TrainArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, saved: int
) -> None:
    """Saving a state takes about 270 writes."""
    error = refusal(tmp_path, training(args, tmp_path / "cut"), monkeypatch, room)
    assert error.place == str(tmp_path / "cut" / "state.pt")
    assert list(below(tmp_path / "cut")) == ["state.pt"] * (saved > 0)
    resumed: list[int] = []
    for out, show in (("cut", lambda record: resumed.append(record["step"])), ("whole", lambda record: None)):
        train(dataclasses.replace(args, out=str(tmp_path / out)), show=show)
    assert resumed == list(range(saved + 1, args.steps + 1))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_the_end_of_a_run_leaves_what_an_earlier_end_has_left(
    args: TrainArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = training(args, tmp_path / "run")
    work()
    assert {"state.pt", "log.jsonl", "model/model.safetensors", "model/config.json"} <= set(
        below(tmp_path / "run")
    )
    assert full_at_every_write(tmp_path / "run", work, monkeypatch, str(tmp_path / "run")) > 10


def test_a_full_disk_is_met_once_and_not_again_on_the_way_out(
    args: TrainArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def full(self: trainer.Trainer, path: Path) -> None:
        asked.append(path)
        raise WriteError("full")

    monkeypatch.setattr(trainer.Trainer, "save", full)
    with pytest.raises(WriteError):
        training(args, tmp_path / "run")()
    assert len(asked) == 1


@pytest.mark.wording
def test_the_command_says_it_in_one_sentence(
    args: TrainArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {n: getattr(args, n) for n in ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads")}
    flags = {**shape, "tokenizer": args.tokenizer, "data": args.data[0], "seq_len": 16, "steps": 2, "warmup": 1}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    codes: list[int] = []
    done = refusal(tmp_path, lambda: codes.append(main(["train", *words, "--out", str(tmp_path)])), monkeypatch, 3)
    *_, said = capsys.readouterr().err.splitlines()
    assert (done, codes) == (None, [1])
    assert said == (
        f"mistral-7b: {tmp_path}/state.pt: cannot be written (No space left on device); nothing half-written was "
        "left there. Update 2 is not saved; there is no saved state; free some space there, or name another place"
    )
    assert below(tmp_path) == {}
