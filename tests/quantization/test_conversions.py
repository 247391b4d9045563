"""Models with packed or quantized weights under .to(dtype), copies, pickles and state_dict, as any module."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from tiny import tiny_args, tiny_model
from torch import Tensor

from mistral_7b import Mistral7B
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.quantization.gpu import Fp8Linear, GpuBlockLinear
from mistral_7b.quantization.linear import BlockLinear, PackedLinear

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9, 10]])
SCHEMES = [Scheme("bf16", deterministic=True), Scheme("int8"), Scheme("int4"), Scheme("q4_k_m")]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def model_of(scheme: Scheme, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Mistral7B:
    """Quantized from bfloat16 values in the type `dtype`."""
    return quantize(tiny_model(tiny_args(n_layers=3), torch.bfloat16, seed=seed).to(dtype), scheme)


def logits(model: Mistral7B) -> Tensor:
    return model(TOKENS)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_another_type_keeps_the_weights(scheme: Scheme, dtype: torch.dtype) -> None:
    model, wanted = model_of(scheme), logits(model_of(scheme))
    found = logits(model.to(dtype))
    assert (found - wanted).norm() < 0.1 * wanted.norm()  # activations were in bfloat16
    if scheme.whole or dtype is not torch.float16:  # float16 holds no weights below 6e-8
        assert torch.equal(logits(model.bfloat16()), wanted)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_in_float32_it_is_the_model_that_was_made_in_float32(scheme: Scheme) -> None:
    assert torch.equal(logits(model_of(scheme).float()), logits(model_of(scheme, torch.float32)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_copies_and_pickles(scheme: Scheme) -> None:
    model = model_of(scheme)
    wanted = logits(model)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(same), wanted)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_state_dict_has_all_weights(scheme: Scheme) -> None:
    model, other = model_of(scheme), model_of(scheme, seed=1)
    wanted = logits(model)
    assert not torch.equal(logits(other), wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), wanted)


def test_the_state_of_packed_weights_is_the_plain_models() -> None:
    plain, packed = tiny_model(dtype=torch.bfloat16), quantize(tiny_model(dtype=torch.bfloat16), SCHEMES[0])
    state = packed.state_dict()
    assert {n: t.tolist() for n, t in state.items()} == {n: t.tolist() for n, t in plain.state_dict().items()}
    linear = packed.layers[0].attention.wq
    assert isinstance(linear, PackedLinear)
    with pytest.raises(RuntimeError, match="Missing key"):
        linear.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        linear.load_state_dict({"weight": linear.dense(), "bias": torch.ones(2)})
    with pytest.raises(RuntimeError, match="weight is"):
        linear.load_state_dict({"weight": torch.ones(2, 2)})


def test_opening_packed_weights_unpacks_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(PackedLinear, "dense", lambda self: pytest.fail("a weight is unpacked"))
    model = Mistral7B.from_pretrained(tmp_path, quantization="bf16")
    assert isinstance(model.layers[0].attention.wq, PackedLinear)


def test_weights_for_a_gpu_keep_their_types() -> None:
    block = model_of(SCHEMES[1]).layers[0].attention.wq
    assert isinstance(block, BlockLinear)
    for linear in (GpuBlockLinear.of(block), Fp8Linear.from_weight(torch.randn(16, 32))):
        wanted = {name: t.clone() for name, t in linear.state_dict().items()}
        for dtype in DTYPES:
            linear.to(dtype)
            for name, t in linear.state_dict().items():
                assert t.dtype == wanted[name].dtype
                assert torch.equal(t.view(torch.uint8), wanted[name].view(torch.uint8))
