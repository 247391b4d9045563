"""Linears for a GPU have the same weights as those for a CPU, repacked. Tested anywhere with the twins."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import TINY, tiny_model, tokens_of

from mistral_7b.quantization import quantize
from mistral_7b.quantization.gpu import Fp8Linear, GpuInt4Linear, GpuInt8Linear, to_gpu
from mistral_7b.quantization.linear import Int4Linear, Int8Linear
from mistral_7b.quantization.rounding import round_int4, round_int8
from mistral_7b.quantization.schemes import Scheme
from mistral_7b.surgery import replace_linears


def test_int8_weights_are_identical() -> None:
    tiled = Int8Linear.from_codes(round_int8(torch.randn(37, 70)))
    linear = GpuInt8Linear.of(tiled)
    assert torch.equal(linear.dequantized(), tiled.dequantized())
    x = torch.randn(3, 70, dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ tiled.dequantized().double().T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_int4_weights_are_identical(group: int, symmetric: bool) -> None:
    tiled = Int4Linear.from_codes(round_int4(torch.randn(37, 270), group, symmetric), 270)
    linear = GpuInt4Linear.of(tiled)
    assert torch.equal(linear.dequantized(), tiled.dequantized())
    assert linear.packed.numel() < 37 * 270 // 2 + 37 * 16
    x = torch.randn(3, 270, dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ tiled.dequantized().double().T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32), Scheme("int4", 32, symmetric=True)])
def test_to_gpu_converts_a_model(scheme: Scheme) -> None:
    """Compared with the model with dequantized weights, in float64."""
    model = quantize(tiny_model(TINY, torch.float64), scheme)
    plain = tiny_model(TINY, torch.float64)
    for name, module in plain.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight.copy_(model.get_submodule(name).dequantized())
    names = to_gpu(model, "cpu")
    assert len(names) == 7 * TINY.n_layers + 1
    assert not any(isinstance(m, (Int8Linear, Int4Linear)) for m in model.modules())
    tokens = tokens_of((2, 20))
    torch.testing.assert_close(model(tokens)[0], plain(tokens)[0], rtol=1e-5, atol=1e-5)


def test_fp8_is_close_to_the_model() -> None:
    args = dataclasses.replace(TINY, dim=64, hidden_dim=128)
    plain, model = tiny_model(args), tiny_model(args)
    replace_linears(model, lambda linear, name: Fp8Linear.from_weight(linear.weight))
    tokens = tokens_of((2, 20), args)
    far = (model(tokens)[0] - plain(tokens)[0]).pow(2).mean() / plain(tokens)[0].pow(2).mean()
    assert 1e-5 < far < 0.05  # rounded, but close
    linear = model.output
    assert isinstance(linear, Fp8Linear)
    assert linear.dequantized().shape == (args.vocab_size, args.dim)
    assert (linear.dequantized() - plain.output.weight).abs().max() <= plain.output.weight.abs().max() / 16
