"""Dequantizing and quantizing blocks, bit-identical to the gguf package (the reference)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_counts import FEW
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from mistral_7b.checkpoint.gguf import blocks as gguf_blocks
from mistral_7b.checkpoint.gguf import quantizing
from mistral_7b.checkpoint.gguf.file import KINDS, Kind
from mistral_7b.kernels import block_formats
from mistral_7b.kernels.block_formats import FORMATS

BLOCKED = [kind for kind in KINDS.values() if kind.block > 1]
WRITTEN = [KINDS[name] for name in quantizing.WRITTEN]
AS_THE_PACKAGE = [KINDS["Q8_0"], KINDS["Q4_0"], KINDS["Q5_0"]]
SEARCHED = [KINDS["Q4_K"], KINDS["Q6_K"]]


def bits(values: np.ndarray) -> np.ndarray:
    """Return the bits to compare; all NaNs are equal."""
    return np.where(np.isnan(values), 0x7FC00000, values.view(np.uint32))


def random_rows(kind: Kind, seed: int, rows: int = 37, blocks: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * kind.size), dtype=np.uint8)


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
@given(seed=st.integers(0, 2**32))
@FEW
def test_any_bytes_dequantize_as_in_the_gguf_package(kind: Kind, seed: int) -> None:
    """Random bytes include scales of every kind: negative, subnormal, infinite, NaN."""
    raw = random_rows(kind, seed)
    with np.errstate(all="ignore"):
        wanted = dequantize(raw, GGMLQuantizationType[kind.name])
    ours = gguf_blocks.dequantize(kind, torch.from_numpy(raw)).numpy()
    assert ours.shape == wanted.shape == (37, 3 * kind.block)
    assert np.array_equal(bits(ours), bits(wanted))


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
def test_chunked_rounded_dequantization_is_the_same(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.from_numpy(random_rows(kind, 1))
    whole = gguf_blocks.dequantize(kind, raw)
    monkeypatch.setattr(gguf_blocks, "VALUES_AT_ONCE", 5 * 3 * kind.block)
    for dtype in (torch.float32, torch.bfloat16):
        chunked = gguf_blocks.dequantize_to(kind, raw, dtype)
        assert torch.equal(chunked.nan_to_num(), whole.to(dtype).nan_to_num())


@pytest.mark.parametrize("kind", [KINDS[name] for name in FORMATS], ids=lambda kind: kind.name)
def test_tiles_hold_the_same_weight_in_the_same_bits(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one tile, the last of them partial."""
    monkeypatch.setattr(gguf_blocks, "VALUES_AT_ONCE", 1)
    raw = torch.from_numpy(random_rows(kind, 2))
    codes, d = gguf_blocks.tiles(kind, raw)
    assert codes.shape == (3, block_formats.FORMATS[kind.name].lines(3 * kind.block), 64)  # of 37 rows, 3 blocks
    assert d.shape[:2] == (3, 3)
    widened = 8 if kind.name == "IQ4_XS" else 6  # 6-bit scales are stored as bytes
    assert codes.nbytes + d.nbytes == 48 * 3 * (kind.size + widened - 6)
    values = block_formats.dequantize(kind.name, codes, d, 3 * kind.block)
    assert torch.equal(values[:37].nan_to_num(), gguf_blocks.dequantize(kind, raw).nan_to_num())
    assert not values[37:].any()


def awkward(seed: int) -> np.ndarray:
    """Rows of various magnitudes, with zeros, ties of magnitude, and values halfway between codes."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((41, 96)) * 10.0 ** draw.uniform(-12, 4, (41, 1))
    x[0] = 0
    x[1, ::2], x[1, 1::2] = 1, -1
    x[2] = np.arange(96) / 2 - 20
    x[3] = draw.integers(-127, 128, 96) + 0.5
    x[4] = 1e-30
    x[5, :5] = -0.0
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", AS_THE_PACKAGE, ids=lambda kind: kind.name)
@given(seed=st.integers(0, 2**32))
@FEW
def test_quantized_bytes_equal_those_of_the_gguf_package(kind: Kind, seed: int) -> None:
    x = awkward(seed)
    for source in (torch.from_numpy(x), torch.from_numpy(x).bfloat16()):
        wanted = quantize(source.float().numpy(), GGMLQuantizationType[kind.name])
        assert np.array_equal(quantizing.quantize(kind, source).numpy(), wanted)


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_values_beyond_the_scales_are_refused(kind: Kind, bad: float) -> None:
    x = torch.ones(2, 256)
    x[1, 40] = bad
    with pytest.raises(ValueError, match="not finite, or larger"):
        quantizing.quantize(kind, x)


def nearest(kind: Kind, x: torch.Tensor) -> torch.Tensor:
    """The plain quantization: the range of each group from its minimum and maximum, scales rounded to nearest."""
    if kind.name == "Q6_K":
        g = x.view(-1, 16, 16)
        scale = g.gather(-1, g.abs().argmax(-1, keepdim=True)) / -32
        d = (scale.gather(1, scale.abs().argmax(1, keepdim=True)) / -128).half().float()
        step = d * (scale / d).round()
        return (step * (g / step).round().clamp(-32, 31)).view(x.shape)
    g = x.view(-1, 8, 32)
    low = g.amin(-1, keepdim=True).clamp(max=0)
    scale = (g.amax(-1, keepdim=True) - low) / 15
    d, m = (v.amax(1, keepdim=True).div(63).half().float() for v in (scale, -low))
    step, minimum = d * (scale / d).round(), m * (-low / m).round()
    return (step * ((g + minimum) / step).round().clamp(0, 15) - minimum).view(x.shape)


@pytest.mark.parametrize(("kind", "most"), [(SEARCHED[0], 0.93), (SEARCHED[1], 0.97)], ids=["Q4_K", "Q6_K"])
@pytest.mark.parametrize("tail", [False, True], ids=["normal", "long tails"])
def test_the_search_reduces_the_error(kind: Kind, most: float, tail: bool) -> None:
    torch.manual_seed(0)
    x = 0.02 * (torch.distributions.StudentT(4.0).sample((64, 1024)) if tail else torch.randn(64, 1024))
    error = (gguf_blocks.dequantize(kind, quantizing.quantize(kind, x)) - x).norm() / x.norm()
    plain = (nearest(kind, x) - x).norm() / x.norm()
    print(f"{kind.name}: relative error {error:.5f}, without a search {plain:.5f}")
    assert error < most * plain


@pytest.mark.parametrize(("kind", "steps"), [(SEARCHED[0], 15), (SEARCHED[1], 32)], ids=["Q4_K", "Q6_K"])
def test_awkward_rows_are_quantized_within_half_a_step(kind: Kind, steps: int) -> None:
    x = torch.zeros(9, 256)
    x[1] = 0.25
    x[2] = -0.25
    x[3, 7] = 3.0
    x[4, ::5] = -1.5
    x[5] = torch.arange(256) % 16 / 16
    x[6] = x[5] - 0.5
    x[7] = 1e-30  # less than any scale
    x[8] = 1e4 * x[6]
    values = gguf_blocks.dequantize(kind, quantizing.quantize(kind, x))
    error, reach = (values - x).abs().amax(1), x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    assert (error <= 0.51 / steps * reach + 1e-7).all()
    assert not values[[0, 7]].any()
