"""Quantization schemes, and the detection of a model's scheme."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from tiny import TINY, tiny_args, tiny_model

from mistral_7b import QuantizationError
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.quantization.schemes import empty_model, random_model, scheme_of


@pytest.mark.parametrize(
    ("values", "field"),
    [(("int3",), "quantization"), (("int4", 64), "group_size"), (("int4", 0), "group_size")],
)
def test_invalid_schemes_are_refused(values: tuple, field: str) -> None:
    with refused(QuantizationError, field=field):
        Scheme(*values)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "scheme", [Scheme("int8"), Scheme("int4"), Scheme("int4", 32), Scheme("int4", 128, symmetric=True)], ids=str
)
def test_scheme_of_matches_the_empty_model(scheme: Scheme, tied: bool) -> None:
    args = tiny_args(tie_embeddings=tied)
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
    for scheme in (Scheme("int8"), Scheme("int4"), Scheme("int4", 32, symmetric=True)):
        assert scheme_of(random_model(TINY, scheme)) == scheme


def test_the_string_of_a_scheme() -> None:
    said = [str(s) for s in (Scheme("int8"), Scheme(), Scheme("int4", 32, symmetric=True))]
    assert said == ["int8", "int4 in groups of 128, asymmetric", "int4 in groups of 32, symmetric"]
