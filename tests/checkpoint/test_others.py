"""What is given in place of a checkpoint: one sentence says what it is and what to do, and no traceback."""

from __future__ import annotations

import json
import pathlib
import shutil
import zipfile
from collections.abc import Callable

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from tiny import tiny_model

from mistral_7b import CheckpointError, Mistral7B
from mistral_7b.checkpoint import read_args
from mistral_7b.cli import main

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4995584424\n"
INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SHARD = "model-00002-of-00005.safetensors"
BASE = "mistralai/Mistral-7B-v0.1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint in one file, in shards, and in shards of PyTorch."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model()
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="30KB")
    (folder / "pickles").mkdir()
    shutil.copyfile(folder / "many" / "config.json", folder / "pickles" / "config.json")
    index = json.loads((folder / "many" / INDEX).read_text())
    for file in set(index["weight_map"].values()):
        renamed = "pytorch_" + file.replace("safetensors", "bin")
        torch.save(load_file(folder / "many" / file), folder / "pickles" / renamed)
    weight_map = {
        name: "pytorch_" + file.replace("safetensors", "bin") for name, file in index["weight_map"].items()
    }
    (folder / "pickles" / PICKLE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def files(folder: pathlib.Path, **contents: str | bytes) -> None:
    """Write files into a folder; "__" in a name is a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(data)


def without(source: pathlib.Path, folder: pathlib.Path, name: str) -> None:
    shutil.copytree(source, folder)
    (folder / name).unlink()


def zipped(folder: pathlib.Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "m.safetensors", "w") as archive:
        archive.writestr("config.json", "{}")


Make = Callable[[pathlib.Path, pathlib.Path], object]  # (models, the folder to make)
ADAPTER = {
    "adapter_config__json": json.dumps({"base_model_name_or_path": BASE}),
    "adapter_model__safetensors": b"x",
}
# name: (what makes the folder, the path in it that is opened, that of the error, words of the hint)
CASES: dict[str, tuple[Make, str, str, str]] = {
    "adapter": (
        lambda m, d: files(d, **ADAPTER, training_args__bin=b"x"), "", "", f"{BASE}, and this with --adapter",
    ),
    "adapter among a training's states": (
        lambda m, d: files(d, **ADAPTER, training_args__bin=b"x", optimizer__pt=b"x", rng_state__pth=b"x"),
        "", "", f"{BASE}, and this with --adapter",
    ),
    "a training's states": (
        lambda m, d: files(d, optimizer__bin=b"x", rng_state_0__pth=b"x"), "", "", "name a model's folder",
    ),
    "one shard": (lambda m, d: shutil.copytree(m / "many", d), SHARD, SHARD, "name its folder"),
    "file of an adapter": (
        lambda m, d: files(d, **ADAPTER), "adapter_model.safetensors", "adapter_model.safetensors", "--adapter",
    ),
    "adapter of mistral-finetune": (lambda m, d: files(d, lora__safetensors=b"x"), "", "", "--adapter"),
    "training folder": (
        lambda m, d: (shutil.copytree(m / "one", d / "model"), files(d, state__pt=b"", log__jsonl="")), "", "",
        "did you mean",
    ),
    "folder of a model's folder": (lambda m, d: shutil.copytree(m / "one", d / "inner"), "", "", "inner?"),
    "cache of the hub": (
        lambda m, d: (files(d / "refs", main="abc"), shutil.copytree(m / "one", d / "snapshots" / "abc")), "", "",
        "abc?",
    ),
    "empty": (lambda m, d: d.mkdir(), "", "", "download"),
    "shards without index": (lambda m, d: without(m / "many", d, INDEX), "", "", INDEX),
    "pickled shards without index": (
        lambda m, d: without(m / "pickles", d, PICKLE_INDEX), "", "", PICKLE_INDEX,
    ),
    "no configuration": (lambda m, d: without(m / "one", d, "config.json"), "", "", "where the weights come from"),
    "ONNX": (lambda m, d: files(d, config__json='{"model_type": "mistral"}', model__onnx=b"x"), "", "", "GGUF"),
    "TensorFlow": (lambda m, d: files(d, config__json="{}", tf_model__h5=b"x"), "", "", "GGUF"),
    "archive in a folder": (lambda m, d: files(d, model__tar__gz=b"x"), "", "", "unpack"),
    "other files": (lambda m, d: files(d, a__py="", b__txt=""), "", "", ".gguf"),
    "zip": (lambda m, d: zipped(d), "m.safetensors", "m.safetensors", "unpack"),
    "gzip": (lambda m, d: files(d, m__gguf=b"\x1f\x8b\x08"), "m.gguf", "m.gguf", "unpack"),
    "web page": (lambda m, d: files(d, m__gguf="<!doctype html><html>"), "m.gguf", "m.gguf", "download link"),
    "text": (lambda m, d: files(d, passwd="root:x:0:0:root:/root:/bin/bash\n"), "passwd", "passwd", ".gguf"),
    "empty file": (lambda m, d: files(d, m__safetensors=b""), "m.safetensors", "m.safetensors", "again"),
    "configuration": (lambda m, d: shutil.copytree(m / "one", d), "config.json", "config.json", "name its folder"),
    "pointer for weights": (
        lambda m, d: (shutil.copytree(m / "one", d), files(d, model__safetensors=POINTER)),
        "", "model.safetensors", "git lfs pull",
    ),
    "pointer for a shard": (
        lambda m, d: (shutil.copytree(m / "many", d), (d / SHARD).write_bytes(POINTER)),
        "", SHARD, "git lfs pull",
    ),
    "pointer for a tokenizer": (
        lambda m, d: (shutil.copytree(m / "one", d), files(d, tokenizer__model=POINTER)), "", "tokenizer.model",
        "git lfs pull",
    ),
    "pointer for a configuration": (
        lambda m, d: (shutil.copytree(m / "one", d), files(d, config__json=POINTER)), "", "config.json",
        "git lfs pull",
    ),
    "pointer for a GGUF file": (lambda m, d: files(d, m__gguf=POINTER), "m.gguf", "m.gguf", "git lfs pull"),
    "pointer for a folder's GGUF file": (lambda m, d: files(d, m__gguf=POINTER), "", "m.gguf", "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "opened", "place", "hint"), CASES.values(), ids=CASES)
def test_what_is_no_checkpoint_is_named(
    models: pathlib.Path, tmp_path: pathlib.Path, make: Make, opened: str, place: str, hint: str
) -> None:
    folder = tmp_path / "it"
    make(models, folder)
    for attempt in (read_args, Mistral7B.from_pretrained):
        with refused(CheckpointError, place=folder / place) as error:
            attempt(folder / opened)
        assert hint in str(error.value.hint)


@pytest.mark.parametrize("command", ["info", "generate"])
def test_the_command_line_prints_the_sentence(
    tmp_path: pathlib.Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files(tmp_path / "it", **ADAPTER)
    assert main([command, str(tmp_path / "it"), *(["--prompt", "a"] if command == "generate" else [])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert BASE in err


def test_a_model_folder_with_an_adapters_configuration_opens(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Left behind by a merge."""
    shutil.copytree(models / "one", tmp_path / "it")
    files(tmp_path / "it", adapter_config__json="{}")
    assert Mistral7B.from_pretrained(tmp_path / "it").args == tiny_model().args


def test_the_only_shard_needs_no_index(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(models / "one", tmp_path / "it")
    only = (tmp_path / "it" / "model.safetensors").rename(tmp_path / "it" / "model-00001-of-00001.safetensors")
    for path in (tmp_path / "it", only):
        assert Mistral7B.from_pretrained(path).args == tiny_model().args


def test_pickled_shards_open(models: pathlib.Path) -> None:
    model = Mistral7B.from_pretrained(models / "pickles", dtype=torch.float32)
    wanted = tiny_model().state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_damaged_pickled_shards_are_named(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shard = "pytorch_model-00003-of-00005.bin"
    shutil.copytree(models / "pickles", tmp_path / "it")
    whole = (tmp_path / "it" / shard).read_bytes()
    for content in (whole[: len(whole) // 2], b"", POINTER, b"not weights at all", None):
        path = tmp_path / "it" / shard
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with refused(CheckpointError, place=path):
            Mistral7B.from_pretrained(tmp_path / "it")
