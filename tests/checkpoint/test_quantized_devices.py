"""Quantized models on other devices: their Linears, and errors. Meta stands in for a GPU."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter

import pytest
import torch
from refusals import refused
from tiny import TINY, tiny_model, tokens_of
from torch import nn

from mistral_7b import CheckpointError, Mistral7B, QuantizationError
from mistral_7b.checkpoint import load, quantize
from mistral_7b.checkpoint.gguf import modules
from mistral_7b.quantization import Scheme, random_model, schemes
from mistral_7b.quantization import quantize as quantize_model
from mistral_7b.quantization.gpu import Fp8Linear, GpuBlockLinear, row_by_row, to_gpu
from mistral_7b.quantization.linear import Int8Embedding
from mistral_7b.server.openai.model_info import precision

TEXT = tokens_of((3, 20))
INTEGERS: dict[type[nn.Module], int] = {GpuBlockLinear: 15, Int8Embedding: 1}
MADE: dict[str, dict[type[nn.Module], int]] = {
    **dict.fromkeys(schemes.KINDS, INTEGERS),
    "bf16": {nn.Linear: 15, nn.Embedding: 1},
    "fp8": {Fp8Linear: 15, nn.Embedding: 1},
}
WIDE = dataclasses.replace(TINY, dim=256, hidden_dim=256, head_dim=64, n_heads=4, n_kv_heads=1)  # of whole blocks
DISTANCE = {
    "kl": 0.1, "top1_agreement": 0.9, "perplexity_original": 5.0, "perplexity": 5.1, "tokens": 10, "text": "a text"
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("devices") / "plain"
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def products(model: Mistral7B) -> dict[type[nn.Module], int]:
    """Count each type of Linear and embedding."""
    kinds = (nn.Linear, nn.Embedding, GpuBlockLinear, Fp8Linear, Int8Embedding)
    return dict(Counter(type(m) for m in model.modules() if isinstance(m, kinds) or hasattr(m, "in_features")))


@pytest.mark.parametrize("scheme", MADE)
def test_a_model_loaded_on_a_gpu_has_gpu_linears(
    plain: pathlib.Path, tmp_path: pathlib.Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemes, "has_fp8", lambda device: device.type == "meta")
    models = [load(plain, quantization=scheme, device="meta")]
    if scheme in schemes.KINDS:
        quantize(plain, tmp_path / "out", scheme, TEXT, "a text")
        models.append(load(tmp_path / "out", device="meta"))
        assert models[1].source == tmp_path / "out"
    for model in models:
        assert products(model) == MADE[scheme]
        assert precision(model) == ("bfloat16" if scheme == "bf16" else scheme)
        assert all(t.is_meta for t in model.state_dict().values())
        assert model(TEXT.to("meta"))[0].shape == (3, 20, TINY.vocab_size)


@pytest.mark.parametrize("scheme", [Scheme(name) for name in schemes.KINDS], ids=str)
def test_gpu_quantization_equals_a_quantized_file(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme and `to_gpu` give the same modules with the same values."""
    monkeypatch.setattr(schemes, "row_by_row", lambda linear, device: row_by_row(linear, "cpu"))
    model = quantize_model(tiny_model(dtype=torch.bfloat16), scheme)
    to_gpu(model, "cpu")
    for name, linear in tiny_model(dtype=torch.bfloat16).named_modules():
        if isinstance(linear, nn.Linear):
            made, wanted = scheme.linear(linear.weight, name, TINY.n_layers, "meta"), model.get_submodule(name)
            assert type(made) is type(wanted)
            for a, b in zip(made.buffers(), wanted.buffers(), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("scheme", schemes.KINDS)
def test_a_model_on_a_gpu_is_saved_as_one_on_a_cpu(tmp_path: pathlib.Path, scheme: str) -> None:
    model = quantize_model(tiny_model(dtype=torch.bfloat16), scheme)
    model.save_pretrained(tmp_path / "tiles", format="quantized", distance=DISTANCE)
    assert torch.equal(load(tmp_path / "tiles")(TEXT)[0], model(TEXT)[0])
    to_gpu(model, "cpu")
    model.save_pretrained(tmp_path / "rows", format="quantized", distance=DISTANCE)
    for file in (tmp_path / "tiles").iterdir():
        assert (tmp_path / "rows" / file.name).read_bytes() == file.read_bytes()
    with refused(CheckpointError, field="format"):
        model.save_pretrained(tmp_path / "plain")
    model.layers[0].attention.wq = nn.Linear(TINY.dim, TINY.n_heads * TINY.head_dim, bias=False)
    with refused(QuantizationError, field="format"):
        model.save_pretrained(tmp_path / "mixed", format="quantized", distance=DISTANCE)


@pytest.mark.parametrize("type", ["q8_0", "q4_k_m"])
def test_a_gguf_file_keeps_its_blocks_on_a_gpu(
    tmp_path: pathlib.Path, type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the embedding, which is dequantized."""
    tiny_model(WIDE, dtype=torch.bfloat16).save_pretrained(tmp_path / "gguf", format="gguf", type=type)
    here, meta = load(tmp_path / "gguf", dtype=torch.float32), load(tmp_path / "gguf", device="meta")
    monkeypatch.setattr(modules, "weight_layout", lambda device: "rows")
    there = load(tmp_path / "gguf", dtype=torch.float32)
    assert products(there) == products(meta) == {GpuBlockLinear: 15, nn.Embedding: 1}
    assert precision(there) == precision(here) == ("Q8_0" if type == "q8_0" else "Q4_K")
    assert all(t.is_meta for t in meta.state_dict().values())
    for name, module in there.named_modules():
        if isinstance(module, GpuBlockLinear):
            assert torch.equal(module.dequantized(), here.get_submodule(name).dequantized())
    assert torch.equal(there.tok_embeddings.weight, here.tok_embeddings.dequantized())
    wanted, got = here(TEXT)[0], there(TEXT)[0]
    assert (got - wanted).norm() / wanted.norm() < 0.1  # on a CPU, activations are rounded to int8


def test_fp8_computes_close_to_the_original(plain: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "has_fp8", lambda device: True)
    model = load(plain, quantization="fp8")
    assert products(model) == MADE["fp8"]
    with torch.inference_mode():
        wanted, got = load(plain)(TEXT)[0], model(TEXT)[0]
    assert 1e-3 < (got - wanted).norm() / wanted.norm() < 0.3  # random weights are the worst case


def test_schemes_a_device_does_not_support_are_refused(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    for act in (
        lambda: load(plain, quantization="fp8"),
        lambda: load(plain, quantization="fp8", device="meta"),
        lambda: random_model(TINY, "fp8"),
        lambda: quantize_model(model, "fp8"),
    ):
        with refused(QuantizationError, field="quantization"):
            act()
    assert isinstance(model.output, nn.Linear)
    quantize(plain, tmp_path / "int8", "int8", TEXT, "a text")
    for act in (
        lambda: load(plain, quantization="int4", device="mps"),
        lambda: load(tmp_path / "int8", device="mps"),
    ):
        with refused(QuantizationError, field="device"):
            act()
