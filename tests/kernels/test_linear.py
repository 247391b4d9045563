"""Products with GGUF's block formats are bit-identical to the twin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral_7b.kernels import backend, block_formats
from mistral_7b.kernels.block_formats import FORMATS, SIX_BITS
from mistral_7b.kernels.cpu import calls, compiler
from mistral_7b.kernels.linear import block_linear, block_linear_twin, quantize_rows
from mistral_7b.quantization.linear import BlockLinear

ROWS = (1, 2, 3, 4, 5, 17, 33)


def weight(kind: str, n: int, k: int, fill: int | None = None) -> BlockLinear:
    """Random codes and scales; or all bits of codes and integer scales from the byte `fill`, with d = m = 1."""
    f, draw = FORMATS[kind], torch.Generator().manual_seed(n)
    shape, blocks = (n, block_formats.padded(k)), f.blocks(k)
    q = torch.randint(0, 2 ** (f.low + f.high), shape, dtype=torch.uint8, generator=draw)
    scales = torch.randint(0, 256, (n, blocks, 4 * f.scales), dtype=torch.uint8, generator=draw)
    d = torch.randn(n, blocks, 1 + f.minimum, generator=draw).mul(0.01).half()
    d[0, 0] = 2e-7  # subnormal in float16
    if fill is not None:
        q, scales, d = q.fill_(fill & (2 ** (f.low + f.high) - 1)), scales.fill_(fill), d.fill_(1)
    tiles = block_formats.tile(kind, q, scales if f.scales else None, d)
    return BlockLinear.of_tiles(kind, *tiles, k, n)


def activations(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def assert_close_to_dequantized(linear: BlockLinear, x: Tensor) -> None:
    dequantized = linear.dequantized().double()
    exact = x.double() @ dequantized.T
    size = (x.double().square() @ dequantized.square().T).sqrt()  # of a sum of independent terms
    assert ((linear(x).double() - exact).norm() / size.norm()) < 0.02  # activations are rounded to 1 in 127


def twin(x: Tensor, linear: BlockLinear) -> Tensor:
    return block_linear_twin(x, linear.codes, linear.d, linear.out_features, linear.kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 256), (33, 512), (67, 1280)])
@pytest.mark.parametrize("kind", FORMATS)
def test_products_match_the_twin(kind: str, n: int, k: int, dtype: torch.dtype) -> None:
    linear = weight(kind, n, k)
    for m in ROWS:
        x = activations(m, k, dtype)
        assert torch.equal(linear(x), twin(x, linear))
    assert_close_to_dequantized(linear, x)


@pytest.mark.parametrize("k", [1, 20, 32, 96, 128, 160, 224, 300, 576, 1000])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_last_block_may_be_short(kind: str, k: int) -> None:
    linear = weight(kind, 35, k)
    for m in ROWS:
        x = activations(m, k)
        assert torch.equal(linear(x), twin(x, linear))
    assert_close_to_dequantized(linear, activations(33, k))


@pytest.mark.parametrize("fill", [0, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_largest_products_do_not_overflow(kind: str, fill: int) -> None:
    """Of the same sign throughout: vpmaddubsw adds two products in 16 bits, and a block's sum has 32 bits."""
    linear = weight(kind, 17, 512, fill)
    for m in ROWS[:5]:
        x = torch.ones(m, 512)
        x[1::2] = -1  # activations 127 and -127
        assert torch.equal(linear(x), twin(x, linear))
        x[:, 5::7] *= -1
        assert torch.equal(linear(x), twin(x, linear))


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_do_not_depend_on_the_batch(kind: str) -> None:
    linear, x = weight(kind, 200, 768), activations(37, 768, torch.bfloat16)
    alone = torch.cat([linear(row[None]) for row in x])
    for m in (2, 3, 4, 5, 16, 37):
        assert torch.equal(torch.cat([linear(rows) for rows in x.split(m)]), alone)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q6_K"])
def test_zero_and_invalid_rows(kind: str) -> None:
    linear, x = weight(kind, 16, 256), torch.zeros(4, 256)
    x[1, 3], x[2, 3], x[3, 3] = torch.inf, torch.nan, 1e-42
    y = linear(x)
    assert torch.equal(y[0], torch.zeros(16))
    assert not y[1].isfinite().any()  # invalid rows are visible in the result
    assert not y[2].isfinite().any()
    assert y[3].isfinite().all()


@pytest.mark.parametrize("kind", FORMATS)
def test_tiles_follow_the_layout(kind: str) -> None:
    """The records of formats.h: weight (19, 41) of the second tile."""
    f, n, k = FORMATS[kind], 40, 512
    q = torch.randint(0, 2 ** (f.low + f.high), (n, k), dtype=torch.uint8)
    scales = torch.randint(0, 256, (n, k // f.block, 4 * f.scales), dtype=torch.uint8)
    d = torch.rand(n, k // f.block, 1 + f.minimum).half()
    codes, halves = block_formats.tile(kind, q, scales if f.scales else None, d)
    assert codes.shape == (3, f.lines(k), 64)
    assert halves.shape == (3, k // f.block, 1 + f.minimum, 16)
    row, inside, block = 19 - 16, 41 % f.block, 41 // f.block
    record = codes[1].view(k // f.block, -1, 16, 4)[block]
    byte = record[inside // (32 // f.low), row, inside % 4]
    code = byte if f.low == 8 else (byte >> (inside // 4 % 2 * 4)) & 15
    if f.high:
        inputs = 32 // f.high  # in a line
        byte = record[f.block * f.low // 32 + inside // inputs, row, inside % 4]
        code = code | ((byte >> (inside % inputs // 4 * f.high)) & (2**f.high - 1)) << 4
    assert code == q[19, 41]
    if f.scales:
        assert record[-f.scales + 1, row, 2] == scales[19, block, 6]
    assert torch.equal(halves[1, block, :, row], d[19, block])
    back, bytes_ = block_formats.untile(kind, codes, k)
    assert torch.equal(back[:n].flatten(1), q)
    assert bytes_ is None or torch.equal(bytes_[:n], scales)
    assert (f.scales == SIX_BITS) == (kind in ("Q4_K", "Q5_K"))


def test_torch_compile_supports_the_operator() -> None:
    linear, x = weight("Q4_K", 33, 256), activations(3, 256)
    compiled = torch.compile(lambda x: linear(x * 2) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x * 2) + 1)
    args = (x, linear.codes, linear.d, 33, "Q4_K")
    torch.library.opcheck(torch.ops.mistral_7b.block_linear.default, args, test_utils="test_schema")
    torch.library.opcheck(torch.ops.mistral_7b.block_linear.default, args, test_utils="test_faketensor")
    assert torch.equal(block_linear(x[0], linear.codes, linear.d, 33, "Q4_K"), linear(x)[0])  # one dimension


@pytest.mark.parametrize(("kind", "k", "bits"), [("Q8_0", 576, 8.5), ("Q4_K", 576, 4.62), ("Q4_K", 4096, 4.5)])
def test_tiles_have_the_bits_of_the_format(kind: str, k: int, bits: float) -> None:
    """The last block of Q4_K with 64 inputs has a third less of scales, not a whole block's."""
    linear = weight(kind, 32, k)
    assert 8 * (linear.codes.nbytes + linear.d.nbytes) / (32 * k) == pytest.approx(bits, abs=0.01)


def test_leading_dimensions_are_kept() -> None:
    linear = weight("Q4_K", 33, 100)
    for shape in ((100,), (3, 100), (2, 3, 100), (0, 100), (2, 0, 100)):
        assert linear(torch.ones(shape)).shape == (*shape[:-1], 33)
    transposed = torch.randn(100, 6).T  # not contiguous
    assert torch.equal(linear(transposed), linear(transposed.contiguous()))


def test_activations_are_rounded_to_nearest_even() -> None:
    q, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]]))
    assert q.tolist() == [[127, 0, 2, -2, -127]]
    assert scale.item() == 1


def test_the_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons with the twin would prove nothing."""
    if compiler.library() is None:
        pytest.skip("the kernels are off, or there is no compiler")
    called = []
    real = calls.linear
    monkeypatch.setattr(calls, "linear", lambda *args: called.append(args) or real(*args))
    weight("Q6_K", 16, 256)(activations(1, 256))
    assert len(called) == 1


@pytest.mark.slow
@pytest.mark.skipif(compiler.compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("instructions", ["avx512", "avx2", "scalar", "off"])
def test_instruction_sets_are_bit_identical(instructions: str) -> None:
    """Runs this file with fewer shapes in a process with another instruction set."""
    if os.environ.get(compiler.VARIABLE):
        pytest.skip("this is that process")
    if instructions in ("avx2", "avx512") and instructions not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {instructions}")
    if instructions == "avx512" and backend.running() == "AVX-512 VNNI":
        pytest.skip("without AMX the native library is this one, and the same tests run with it in this process")
    here = Path(__file__).parent
    names = ("linear", "elementwise", "attend", "attend_packed", "low_rank")
    files = [str(here / f"test_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not torch_compile", *files],
        env={**os.environ, compiler.VARIABLE: instructions, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_requested_instruction_set_is_used() -> None:
    requested, found = compiler.requested(), backend.running()
    wanted = {"avx512": "AVX-512 VNNI", "avx2": "AVX2", "scalar": "scalar", "off": "PyTorch operators"}
    assert requested == "native" or found == wanted[requested]
