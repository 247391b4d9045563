"""Products with quantized weights: all instruction sets are bit-identical to the twin, for irregular shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral_7b.kernels import backend, layout
from mistral_7b.kernels.cpu import compiler
from mistral_7b.kernels.linear import (
    int4_linear,
    int8_linear,
    int_weight,
    linear_twin,
    quantize_rows,
)

ROWS = (1, 2, 3, 4, 5, 16, 17, 64, 300)
# N no multiple of 16, K no multiple of 64 or of a group; one tile, and more than one AMX block of each.
SHAPES = [(1, 1), (5, 7), (16, 64), (33, 100), (48, 320), (67, 130), (130, 1100), (300, 2050)]
if os.environ.get(compiler.VARIABLE):  # not the best instruction set: its loops, and no AMX blocks
    SHAPES = [(1, 1), (33, 100), (67, 330)]


def weights(n: int, k: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random int4 codes, groups and scale in tiles; z and m cover their ranges."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = layout.padded(n, 16), layout.padded(k, max(group, 64))
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=draw)
    z = torch.randint(0, 16, (rows, columns // group), generator=draw)
    m = 1 + torch.randint(0, 1000, z.shape, generator=draw) % (127 // torch.maximum(z, 15 - z))
    groups = layout.tile_groups(m.to(torch.uint8), z.to(torch.uint8))
    return layout.tile_int4(q), groups, torch.rand(rows, generator=draw)


def activations(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int4_and_its_int8_weight_match_the_twin(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    codes, groups, scale = weights(n, k, group)
    whole = int_weight(codes, groups, group)
    as_int8 = layout.tile_int8((whole.short() + 128).to(torch.uint8))
    assert torch.equal(int_weight(as_int8, None), whole)
    for m in ROWS:
        x = activations(m, k, dtype)
        wanted = linear_twin(x, whole[:n, :k], scale[:n])
        assert wanted.dtype == dtype
        assert torch.equal(int4_linear(x, codes, groups, scale, n, group), wanted)
        assert torch.equal(int8_linear(x, as_int8, scale, n), wanted)


@pytest.mark.parametrize("code", [0, 1, 128, 255])
def test_the_largest_products_do_not_saturate(code: int) -> None:
    """vpmaddubsw adds two products in 16 bits with saturation: the largest codes and activations."""
    n, k = 17, 128
    tiles = layout.tile_int8(torch.full((layout.padded(n, 16), k), code, dtype=torch.uint8))
    whole = torch.full((n, k), code - 128, dtype=torch.int8)
    for m in ROWS[:7]:
        x = torch.ones(m, k)
        x[1::2] = -1  # activations 127 and -127
        x[:, 5::7] *= -1
        wanted = linear_twin(x, whole, torch.ones(n))
        assert torch.equal(int8_linear(x, tiles, torch.ones(layout.padded(n, 16)), n), wanted)


def test_the_twin_is_close_to_the_float_product() -> None:
    codes, groups, scale = weights(33, 100, 32)
    x = activations(5, 100, torch.float32)
    weight = int_weight(codes, groups, 32)[:33, :100] * scale[:33, None]
    exact = x.double() @ weight.double().T
    got = int4_linear(x, codes, groups, scale, 33, 32)
    assert (got - exact).norm() < 0.01 * exact.norm()  # activations are rounded to 1 in 127
    assert (got - exact).norm() > 0.001 * exact.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_do_not_depend_on_the_batch(bits: int) -> None:
    n, k, group = 200, 1100, 128
    codes, groups, scale = weights(n, k, group)
    as_int8 = layout.tile_int8((int_weight(codes, groups, group).short() + 128).to(torch.uint8))
    x = activations(300, k, torch.bfloat16)

    def product(rows: Tensor) -> Tensor:
        if bits == 4:
            return int4_linear(rows, codes, groups, scale, n, group)
        return int8_linear(rows, as_int8, scale, n)

    alone = torch.cat([product(row[None]) for row in x])
    for m in (1, 2, 3, 16, 17, 64, 300):
        assert torch.equal(torch.cat([product(rows) for rows in x.split(m)]), alone)


def test_zero_infinite_and_nan_rows() -> None:
    codes, groups, scale = weights(16, 64, 32)
    x = torch.zeros(4, 64)
    x[1, 3], x[2, 3], x[3, 3] = torch.inf, torch.nan, 1e-42
    y = int4_linear(x, codes, groups, scale, 16, 32)
    assert torch.equal(y, linear_twin(x, int_weight(codes, groups, 32), scale)) or y[1:3].isnan().all()
    assert torch.equal(y[0], torch.zeros(16))
    assert not y[1].isfinite().any()  # invalid rows are visible in the result
    assert not y[2].isfinite().any()
    assert y[3].isfinite().all()


def test_leading_dimensions_are_kept() -> None:
    codes, groups, scale = weights(33, 100, 32)
    for shape in ((100,), (3, 100), (2, 3, 100), (0, 100), (2, 0, 100)):
        y = int4_linear(torch.ones(shape), codes, groups, scale, 33, 32)
        assert y.shape == (*shape[:-1], 33)
    transposed = torch.randn(100, 6).T  # not contiguous
    assert torch.equal(
        int4_linear(transposed, codes, groups, scale, 33, 32),
        int4_linear(transposed.contiguous(), codes, groups, scale, 33, 32),
    )


def test_activations_are_rounded_to_nearest_even() -> None:
    q, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]]))
    assert q.tolist() == [[127, 0, 2, -2, -127]]
    assert scale.item() == 1


def test_tiles_follow_the_layout() -> None:
    q = torch.arange(32 * 64, dtype=torch.int32).view(32, 64)
    tiles = layout.tile_int8(q)  # works for any type
    assert tiles.shape == (2, 16, 16, 4)
    assert tiles[1, 5, 3, 2] == q[16 + 3, 4 * 5 + 2]
    assert torch.equal(layout.untile_int8(tiles), q)
    q4 = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    tiles = layout.tile_int4(q4)
    assert tiles.shape == (2, 8, 16, 4)
    assert tiles[1, 5, 3, 2] & 15 == q4[19, 8 * 5 + 2]
    assert tiles[1, 5, 3, 2] >> 4 == q4[19, 8 * 5 + 4 + 2]
    assert torch.equal(layout.untile_int4(tiles), q4)


def test_torch_compile_supports_the_operators() -> None:
    codes, groups, scale = weights(33, 100, 32)
    x = activations(3, 100, torch.float32)

    def layer(x: Tensor) -> Tensor:
        return int4_linear(x * 2, codes, groups, scale, 33, 32) + 1

    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    args = (x, codes, groups, scale, 33, 32)
    torch.library.opcheck(torch.ops.mistral_7b.int4_linear.default, args, test_utils="test_schema")
    torch.library.opcheck(torch.ops.mistral_7b.int4_linear.default, args, test_utils="test_faketensor")


@pytest.mark.skipif(compiler.compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("instructions", ["avx512", "avx2", "scalar", "off"])
def test_instruction_sets_are_bit_identical(instructions: str) -> None:
    """Runs this file with fewer shapes in a process with another instruction set."""
    if os.environ.get(compiler.VARIABLE):
        pytest.skip("this is that process")
    if instructions in ("avx2", "avx512") and instructions not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {instructions}")
    here = Path(__file__).parent
    names = ("linear", "block_linear", "elementwise", "attend", "attend_packed", "low_rank")
    files = [str(here / f"test_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env={**os.environ, compiler.VARIABLE: instructions}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_requested_instruction_set_is_used() -> None:
    requested, found = compiler.requested(), backend.running()
    wanted = {"avx512": "AVX-512 VNNI", "avx2": "AVX2", "scalar": "scalar", "off": "PyTorch operators"}
    assert requested == "native" or found == wanted[requested]
