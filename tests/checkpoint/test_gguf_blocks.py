"""Dequantizing and quantizing blocks, bit-identical to the gguf package (the reference)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_7b.checkpoint.gguf import blocks as gguf_blocks
from mistral_7b.checkpoint.gguf.file import KINDS, Kind

BLOCKED = [kind for kind in KINDS.values() if kind.block > 1]
WRITTEN = [KINDS["Q8_0"], KINDS["Q4_0"]]


def bits(values: np.ndarray) -> np.ndarray:
    """Return the bits to compare; all NaNs are equal."""
    return np.where(np.isnan(values), 0x7FC00000, values.view(np.uint32))


def random_rows(kind: Kind, seed: int, rows: int = 37, blocks: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * kind.size), dtype=np.uint8)


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
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


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_codes_and_scales_give_the_dequantized_values(kind: Kind) -> None:
    raw = torch.from_numpy(random_rows(kind, 2))
    d, q = gguf_blocks.codes(kind, raw)
    assert (d.dtype, q.dtype) == (torch.float16, torch.uint8)
    assert (tuple(d.shape), tuple(q.shape)) == ((37, 3), (37, 96))
    zero = gguf_blocks.ZERO_POINTS[kind.name]
    values = d.float().repeat_interleave(32, 1) * (q.float() - zero)
    assert torch.equal(values.nan_to_num(), gguf_blocks.dequantize(kind, raw).nan_to_num())


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


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_quantized_bytes_equal_those_of_the_gguf_package(kind: Kind, seed: int) -> None:
    x = awkward(seed)
    for source in (torch.from_numpy(x), torch.from_numpy(x).bfloat16()):
        wanted = quantize(source.float().numpy(), GGMLQuantizationType[kind.name])
        assert np.array_equal(gguf_blocks.quantize(kind, source).numpy(), wanted)


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_values_beyond_the_scales_are_refused(kind: Kind, bad: float) -> None:
    x = torch.ones(2, 64)
    x[1, 40] = bad
    with pytest.raises(ValueError, match="not finite, or larger"):
        gguf_blocks.quantize(kind, x)
