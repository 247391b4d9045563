"""Linears for a GPU have the same weights as those for a CPU, repacked. Tested anywhere with the twins."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import TINY, tiny_model, tokens_of

from mistral_7b.kernels import block_formats
from mistral_7b.kernels.block_formats import FORMATS
from mistral_7b.kernels.gpu import weight_only
from mistral_7b.quantization import quantize
from mistral_7b.quantization.gpu import Fp8Linear, GpuBlockLinear, to_gpu
from mistral_7b.quantization.linear import BlockLinear
from mistral_7b.quantization.rounding import round_blocks
from mistral_7b.quantization.schemes import KINDS
from mistral_7b.surgery import replace_linears


def random_tiles(kind: str, n: int, k: int) -> BlockLinear:
    """A weight with random bits of codes and integer scales."""
    f = FORMATS[kind]
    q = torch.randint(0, 2 ** (f.low + f.high), (n, block_formats.padded(k)), dtype=torch.uint8)
    scales = torch.randint(0, 256, (n, f.blocks(k), 4 * f.scales), dtype=torch.uint8) if f.scales else None
    d = torch.randn(n, f.blocks(k), 1 + f.minimum).half()
    return BlockLinear.of_tiles(kind, *block_formats.tile(kind, q, scales, d), k, n)


@pytest.mark.parametrize("k", [1, 70, 256, 300, 576])
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_are_identical(kind: str, k: int) -> None:
    tiled = random_tiles(kind, 37, k)
    linear = GpuBlockLinear.of(tiled)
    assert torch.equal(linear.dequantized(), tiled.dequantized())
    x = torch.randn(3, k, dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ tiled.dequantized().double().T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [20, 256, 300])
@pytest.mark.parametrize("kind", sorted(set(KINDS.values())))
def test_tiles_of_a_gpu_weight_are_those_it_was_made_from(kind: str, k: int) -> None:
    tiled = BlockLinear.of_blocks(kind, round_blocks(torch.randn(37, k), kind), k)
    back = GpuBlockLinear.of(tiled).tiled()
    assert torch.equal(back.codes, tiled.codes)
    assert torch.equal(back.d, tiled.d)


def test_the_bits_of_a_weight_are_those_of_the_docstring() -> None:
    documented = (weight_only.__doc__ or "").split("at K = 4096:")[1].split("The kernel")[0].split()
    for kind, bits in zip(documented[::2], documented[1::2], strict=True):
        held = sum(t.nbytes for t in GpuBlockLinear.of(random_tiles(kind, 16, 4096)).buffers())
        assert 8 * held / (16 * 4096) == float(bits)
    assert sorted(documented[::2]) == sorted(FORMATS)


@pytest.mark.parametrize("scheme", KINDS)
def test_to_gpu_converts_a_model(scheme: str) -> None:
    """Compared with the model with dequantized weights, in float64."""
    model = quantize(tiny_model(TINY, torch.float64), scheme)
    plain = tiny_model(TINY, torch.float64)
    for name, module in plain.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight.copy_(model.get_submodule(name).dequantized())
    names = to_gpu(model, "cpu")
    assert len(names) == 7 * TINY.n_layers + 1
    assert not any(isinstance(m, BlockLinear) for m in model.modules())
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
