"""Products of many rows on the matrix unit, which is emulated here, are bit-identical to the twin."""

from __future__ import annotations

import ctypes

import pytest
import torch
from test_linear import activations, twin, weight

from mistral_7b import machine
from mistral_7b.kernels.block_formats import FORMATS
from mistral_7b.kernels.cpu import compiler

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="no C++ compiler on this machine")

ROWS = (1, 4, 5, 16, 17, 33, 64, 100)
RIGHT, WRONG = "-DEMULATE_AMX=0", "-DEMULATE_AMX=1"  # amx.h


def emulated(monkeypatch: pytest.MonkeyPatch, emulation: str, instructions: str = "scalar") -> ctypes.CDLL:
    """The kernels compiled with an emulation of the matrix unit, without optimization, which takes much longer."""
    monkeypatch.setitem(
        compiler.INSTRUCTIONS, "emulated", (*compiler.INSTRUCTIONS[instructions], "-O0", emulation)
    )
    path, why = compiler._build("emulated")
    assert path is not None, why
    library = compiler._load(path)
    assert library is not None
    monkeypatch.setattr(compiler, "library", lambda: library)
    return library


@pytest.mark.parametrize("instructions", ["avx512", "scalar"])  # registers of 16 outputs, as with AMX
@pytest.mark.parametrize("kind", FORMATS)
def test_products_match_the_twin(monkeypatch: pytest.MonkeyPatch, kind: str, instructions: str) -> None:
    """With an odd number of tiles, outputs that do not fill one, and last blocks of each length modulo 64."""
    if instructions == "avx512" and "avx512_vnni" not in machine.cpu_flags():
        pytest.skip("this CPU has no AVX-512 VNNI")
    emulated(monkeypatch, RIGHT, instructions)
    for n, k in ((1, 20), (16, 256), (35, 288), (100, 480), (67, 1100)):
        linear = weight(kind, n, k)
        for m in ROWS:
            x = activations(m, k, torch.bfloat16 if m % 2 else torch.float32)
            assert torch.equal(linear(x), twin(x, linear)), (n, k, m)


@pytest.mark.parametrize("fill", [0, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_largest_products_fit(monkeypatch: pytest.MonkeyPatch, kind: str, fill: int) -> None:
    """A digit of an integer scale times a code fits in a byte."""
    emulated(monkeypatch, RIGHT)
    linear = weight(kind, 17, 512, fill)
    x = torch.ones(6, 512)
    x[1::2] = -1
    x[4:, 5::7] *= -1
    assert torch.equal(linear(x), twin(x, linear))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_more_rows_than_a_strip(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    emulated(monkeypatch, RIGHT)
    linear, x = weight(kind, 32, 64), activations(530, 64)
    assert torch.equal(linear(x), twin(x, linear))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_matrix_unit_multiplies_more_than_four_rows(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Else the comparisons with the twin would prove nothing. IQ4_XS does not use it."""
    emulated(monkeypatch, WRONG)
    linear = weight(kind, 35, 288)
    for m in (4, 5):
        x = activations(m, 288)
        assert torch.equal(linear(x), twin(x, linear)) == (m == 4 or kind == "IQ4_XS")


def test_wrong_products_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert emulated(monkeypatch, RIGHT).m7b_check()
    assert not emulated(monkeypatch, WRONG).m7b_check()


def test_a_wrong_matrix_unit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiler.VARIABLE, raising=False)
    for name, emulation in (("native", WRONG), ("avx512", RIGHT)):
        monkeypatch.setitem(compiler.INSTRUCTIONS, name, (*compiler.INSTRUCTIONS["scalar"], "-O0", emulation))
    with pytest.warns(UserWarning, match="AMX gives other products") as warned:
        library = compiler.library.__wrapped__()
    assert len(warned) == 1
    assert library is not None
    assert library.m7b_check()
