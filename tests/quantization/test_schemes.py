"""Quantization schemes, and the detection of a model's scheme."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model

from mistral_7b import QuantizationError
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.quantization.linear import BlockLinear
from mistral_7b.quantization.schemes import KINDS, empty_model, random_model, scheme_of


def test_invalid_schemes_are_refused() -> None:
    with refused(QuantizationError, field="quantization"):
        Scheme("int3")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", [Scheme(name) for name in KINDS], ids=str)
def test_scheme_of_matches_the_empty_model(scheme: Scheme, tied: bool) -> None:
    args = tiny_args(tie_embeddings=tied, n_layers=3)  # the third layer of q4_k_m has matrices of both types
    model = quantize(tiny_model(args, torch.bfloat16), scheme)
    assert scheme_of(model) == scheme
    empty = empty_model(args, scheme)
    assert all(t.is_meta for t in empty.state_dict().values())
    wanted = {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == wanted


def test_models_with_no_or_mixed_schemes() -> None:
    assert scheme_of(tiny_model()) is None
    assert scheme_of(quantize(tiny_model(dtype=torch.bfloat16), "bf16")) is None
    four, eight = (quantize(tiny_model(), name) for name in ("int4", "int8"))
    four.layers[0].feed_forward.w1 = eight.layers[0].feed_forward.w1
    assert scheme_of(four) is None
    eight.tok_embeddings = tiny_model().tok_embeddings
    assert scheme_of(eight) is None


def test_random_models_have_their_scheme() -> None:
    for name in KINDS:
        model = random_model(tiny_args(n_layers=3), name)
        assert scheme_of(model) == Scheme(name)
        linears = [module for module in model.modules() if isinstance(module, BlockLinear)]
        for linear in linears:  # near zero on average, so that activations stay near 1
            weight = linear.dequantized()
            assert weight.mean().abs() < 0.2 * weight.std()
            assert 0.005 < weight.std() < 0.05


def test_the_mixture_is_that_of_llama_cpp() -> None:
    """The outer eighths of the layers and each third one between: 16 of 32 layers for wv and w2."""
    scheme = Scheme("q4_k_m")
    kinds = {scheme.kind(f"layers.{i}.feed_forward.w2", 32): i for i in range(32)}
    assert set(kinds) == {"Q4_K", "Q6_K"}
    six = [i for i in range(32) if scheme.kind(f"layers.{i}.attention.wv", 32) == "Q6_K"]
    assert six == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert {scheme.kind(f"layers.{i}.attention.{name}", 32) for i in range(32) for name in ("wq", "wk", "wo")} == {
        "Q4_K"
    }
    assert scheme.kind("output", 32) == "Q8_0"
