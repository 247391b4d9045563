"""LoRA adapters in GGUF, as llama.cpp's converter writes them: the same logits as PEFT's files."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from refusals import refused
from test_adapters import adapter_of
from tiny import TINY, close, tiny_model, tokens_of
from torch import Tensor

from mistral_7b.checkpoint.names import rename
from mistral_7b.errors import CheckpointError
from mistral_7b.lora import read_adapter
from mistral_7b.lora.adapters import Adapters
from mistral_7b.lora.files import Adapter, save_adapter

gguf = pytest.importorskip("gguf", reason="pip install gguf to write GGUF files independently")
KEYS = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0}


def write(
    path: pathlib.Path, tensors: dict[str, Tensor], architecture: str = "llama", **keys: Any
) -> pathlib.Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def factors(adapter: Adapter) -> dict[str, Tensor]:
    out = {}
    for linear, f in adapter.targets.items():
        name = rename(f"{linear}.weight", "mistral", "gguf")
        out |= {f"{name}.lora_a": f.a.half(), f"{name}.lora_b": f.b.half()}
    return out


@pytest.fixture
def adapter() -> Adapter:
    halves = adapter_of(TINY, 4, 3).targets
    return Adapter(
        {n: f._replace(a=f.a.half().float(), b=f.b.half().float(), scale=1.5) for n, f in halves.items()}
    )


def logits(source: pathlib.Path | Adapter) -> Tensor:
    adapters, tokens = Adapters(tiny_model()), tokens_of((2, 21))
    adapters.load("it", source)
    with adapters.over([("it", 42)]) as adapted:
        return adapted(tokens)[0]


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 1.5), (0.0, 1.0)])
def test_it_is_the_adapter_it_was_made_of(
    alpha: float, scale: float, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    path = write(tmp_path / "a.gguf", factors(adapter), **{**KEYS, "adapter.lora.alpha": alpha})
    wanted = Adapter({name: f._replace(scale=scale) for name, f in adapter.targets.items()})
    close(logits(path), logits(wanted))
    close(logits(tmp_path), logits(wanted))  # the folder of the file


def test_a_norm_of_its_own_is_read(adapter: Adapter, tmp_path: pathlib.Path) -> None:
    norm = torch.rand(TINY.dim)
    path = write(tmp_path / "a.gguf", {**factors(adapter), "blk.1.ffn_norm.weight": norm}, **KEYS)
    (name, weight), *_ = read_adapter(path, TINY).weights.items()
    assert name == "layers.1.ffn_norm.weight"
    assert torch.equal(weight, norm)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", "model"), ("adapter.type", "control_vector"), ("adapter.lora.alpha", "six"),
        ("adapter.lora.alpha", -1.0), ("general.architecture", "gemma"),
    ],
)  # fmt: skip
def test_other_files_are_refused_by_key(key: str, value: Any, adapter: Adapter, tmp_path: pathlib.Path) -> None:
    architecture = value if key == "general.architecture" else "llama"
    keys = KEYS if key == "general.architecture" else {**KEYS, key: value}
    path = write(tmp_path / "a.gguf", factors(adapter), architecture, **keys)
    with refused(CheckpointError, field=key, place=path):
        read_adapter(path, TINY)


def test_factors_of_the_embedding_are_refused(adapter: Adapter, tmp_path: pathlib.Path) -> None:
    name = "token_embd.weight.lora_a"
    path = write(tmp_path / "a.gguf", {name: torch.zeros(TINY.vocab_size, 4), **factors(adapter)}, **KEYS)
    with refused(CheckpointError, field=name, place=path) as caught:
        read_adapter(path, TINY)
    assert caught.value.hint


def test_what_is_written_opens_here_and_in_the_gguf_package(adapter: Adapter, tmp_path: pathlib.Path) -> None:
    """An alpha for all: Linears of another one have their B rescaled."""
    first = next(iter(adapter.targets))
    mixed = Adapter({**adapter.targets, first: adapter.targets[first]._replace(scale=0.25)})
    save_adapter(mixed, tmp_path / "mixed.gguf", TINY, "gguf")
    close(logits(tmp_path / "mixed.gguf"), logits(mixed))
    reader = gguf.GGUFReader(tmp_path / "mixed.gguf")
    fields = {key: reader.fields[key].contents() for key in (*KEYS, "general.architecture")}
    assert fields == {**KEYS, "general.architecture": "llama"}
    stored = {t.name: torch.tensor(t.data) for t in reader.tensors}
    wanted = {f"{name}_{half}" for name in ("blk.1.attn_k.weight.lora", "output.weight.lora") for half in "ab"}
    assert wanted <= stored.keys()
    assert torch.equal(stored["blk.1.attn_k.weight.lora_b"], adapter.targets["layers.1.attention.wk"].b)
    assert not list(tmp_path.glob("*.partial*"))
    with refused(CheckpointError, place=tmp_path / "mixed.gguf"):
        save_adapter(mixed, tmp_path / "mixed.gguf", TINY, "gguf")
