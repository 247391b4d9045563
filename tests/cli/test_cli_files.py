"""`mistral-7b convert`, `pull` and `train`: calls made for given flags, and errors as one message."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from mistral_7b.model import Mistral7B
from mistral_7b.training import TrainArgs


def test_convert_there_and_back(run, windowed: str, tmp_path: pathlib.Path) -> None:
    there, back = tmp_path / "mistral", tmp_path / "back"
    code, out, err = run("convert", windowed, str(there), "--to", "mistral")
    assert (code, out) == (0, "")
    assert "in mistral format" in err
    assert (there / "params.json").is_file()
    assert (there / "tokenizer.model.v3").is_file()
    assert run("convert", str(there), str(back), "--to", "huggingface", "--max-shard-size", "1MB").code == 0
    assert len(list(back.glob("model-*.safetensors"))) > 1
    ours, theirs = Mistral7B.from_pretrained(windowed), Mistral7B.from_pretrained(back)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.wording
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "{tmp}/out"], "--to"),
        (["{model}", "{tmp}/out", "--to", "pickle"], "pickle"),
        (["{model}", "{tmp}", "--to", "mistral"], "exists already"),
        (["{model}", "{tmp}/out", "--to", "huggingface", "--max-shard-size", "big"], "'big'"),
        (["/nowhere", "{tmp}/out", "--to", "mistral"], "/nowhere"),
    ],
)
def test_convert_refuses(run, windowed: str, tmp_path: pathlib.Path, words: list[str], message: str) -> None:
    (tmp_path / "kept").write_text("x")
    code, out, err = run("convert", *(w.format(model=windowed, tmp=tmp_path) for w in words))
    assert (code, out) == (2, "")
    assert message in err
    assert [f.name for f in tmp_path.iterdir()] == ["kept"]


def test_pull_prints_the_folder(run, monkeypatch, tmp_path: pathlib.Path) -> None:
    seen: list[str] = []

    def pull(repo_id: str, revision: str, adapter: bool) -> pathlib.Path:
        assert not adapter
        seen.extend([repo_id, revision])
        return tmp_path

    monkeypatch.setattr("mistral_7b.checkpoint.hub.pull", pull)
    assert run("pull", "some/model", "--revision", "v2") == (0, f"{tmp_path}\n", "")
    assert seen == ["some/model", "v2"]


@pytest.mark.wording
def test_pull_refuses_what_is_no_id_and_fails_offline(run, monkeypatch, tmp_path: pathlib.Path) -> None:
    code, _, err = run("pull", "no-id")
    assert code == 2
    assert "owner/name" in err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, _, err = run("pull", "some/model")
    assert code == 1
    assert "HF_HUB_OFFLINE" in err


@pytest.fixture
def trained(monkeypatch) -> list[TrainArgs]:
    """Replaces training; the arguments are recorded."""
    calls: list[TrainArgs] = []

    def train(args: TrainArgs) -> dict[str, float]:
        calls.append(args)
        return {"loss": 2.0, "held_out_bits_per_byte": 1.23456}

    monkeypatch.setattr("mistral_7b.training.trainer.train", train)
    return calls


def test_train_flags(run, trained: list[TrainArgs]) -> None:
    flags = (
        "--steps",
        "7",
        "--warmup",
        "2",
        "--data",
        "a",
        "b",
        "--sliding-window",
        "None",
        "--betas",
        "0.8",
        "0.9",
    )
    done = run("train", *flags, "--compile")
    assert done.code == 0
    assert "held out: 1.2346 bits per byte" in done.out
    wanted = TrainArgs(steps=7, warmup=2, data=("a", "b"), sliding_window=None, betas=(0.8, 0.9), compile=True)
    assert trained == [wanted]


@pytest.mark.parametrize("flag", ["--config", "--config="])
def test_train_config_and_flags_that_override_it(
    run, trained: list[TrainArgs], tmp_path: pathlib.Path, flag: str
) -> None:
    config = {"steps": 500, "warmup": 20, "data": ["x", "y z"], "held_out": [], "tie_embeddings": True, "lr": 1e-4}
    (tmp_path / "c.json").write_text(json.dumps({**config, "init": None, "sliding_window": None}))
    path = str(tmp_path / "c.json")
    where = [flag + path] if flag.endswith("=") else [flag, path]
    assert run("train", "--steps", "30", *where, "--data", "w").code == 0
    wanted = TrainArgs(steps=30, warmup=20, data=("w",), tie_embeddings=True, lr=1e-4, sliding_window=None)
    assert trained == [wanted]
    assert run("train", *where, "--no-tie-embeddings").code == 0
    assert (trained[1].tie_embeddings, trained[1].data) == (False, ("x", "y z"))


@pytest.mark.wording
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object of training options"),
        ('{"step": 3}', "unknown training option 'step'"),
        ('{"steps": "many"}', "--steps"),
        ('{"steps": 2.5}', "--steps"),
        ('{"steps": {"a": 1}}', "steps must be a single value"),
        ('{"steps": 0}', "steps must be at least 1"),
        (None, "No such file"),
    ],
)
def test_train_refuses(
    run, trained: list[TrainArgs], tmp_path: pathlib.Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    code, _, err = run("train", "--config", str(tmp_path / "c.json"))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert trained == []
