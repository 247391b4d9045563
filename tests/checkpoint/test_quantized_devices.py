"""Quantized models on other devices: their Linears, and errors. Meta stands in for a GPU."""

from __future__ import annotations

import pathlib
from collections import Counter

import pytest
import torch
from refusals import refused
from tiny import TINY, tiny_model, tokens_of
from torch import nn

from mistral_7b import Mistral7B, QuantizationError
from mistral_7b.checkpoint import load, quantize
from mistral_7b.quantization import Scheme, random_model, schemes
from mistral_7b.quantization import quantize as quantize_model
from mistral_7b.quantization.gpu import Fp8Linear, GpuInt4Linear, GpuInt8Linear, row_by_row, to_gpu
from mistral_7b.quantization.linear import Int8Embedding

TEXT = tokens_of((3, 20))
MADE: dict[str, dict[type[nn.Module], int]] = {
    "int8": {GpuInt8Linear: 15, Int8Embedding: 1},
    "int4": {GpuInt4Linear: 14, GpuInt8Linear: 1, Int8Embedding: 1},
    "bf16": {nn.Linear: 15, nn.Embedding: 1},
    "fp8": {Fp8Linear: 15, nn.Embedding: 1},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("devices") / "plain"
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def products(model: Mistral7B) -> dict[type[nn.Module], int]:
    """Count each type of Linear and embedding."""
    kinds = (nn.Linear, nn.Embedding, GpuInt8Linear, GpuInt4Linear, Fp8Linear, Int8Embedding)
    return dict(Counter(type(m) for m in model.modules() if isinstance(m, kinds) or hasattr(m, "in_features")))


@pytest.mark.parametrize("scheme", MADE)
def test_a_model_loaded_on_a_gpu_has_gpu_linears(
    plain: pathlib.Path, tmp_path: pathlib.Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemes, "has_fp8", lambda device: device.type == "meta")
    models = [load(plain, quantization=scheme, device="meta")]
    if scheme in ("int8", "int4"):
        quantize(plain, tmp_path / "out", scheme, TEXT, "a text")
        models.append(load(tmp_path / "out", device="meta"))
        assert models[1].source == tmp_path / "out"
    for model in models:
        assert products(model) == MADE[scheme]
        assert all(t.is_meta for t in model.state_dict().values())
        assert model(TEXT.to("meta"))[0].shape == (3, 20, TINY.vocab_size)


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4"), Scheme("int4", 32, symmetric=True)], ids=str)
def test_gpu_quantization_equals_a_quantized_file(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme and `to_gpu` give the same modules with the same values."""
    monkeypatch.setattr(schemes, "row_by_row", lambda linear, device: row_by_row(linear, "cpu"))
    model = quantize_model(tiny_model(dtype=torch.bfloat16), scheme)
    to_gpu(model, "cpu")
    for name, linear in tiny_model(dtype=torch.bfloat16).named_modules():
        if isinstance(linear, nn.Linear):
            made, wanted = scheme.linear(linear.weight, name, "meta"), model.get_submodule(name)
            assert type(made) is type(wanted)
            for a, b in zip(made.buffers(), wanted.buffers(), strict=True):
                assert torch.equal(a, b)


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
