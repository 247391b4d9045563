"""Compilation of all kernels to machine code for GPUs; run by test_triton_kernels.py.

The interpreter lets pass what the compiler refuses: shapes, types, masks. Block sizes are those in use.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from mistral_7b.kernels.block_formats import FORMATS
from mistral_7b.kernels.gpu import decode_attention as decode
from mistral_7b.kernels.gpu import (
    paged,
    triton_decode,
    triton_elementwise,
    triton_linear,
    triton_paged,
)
from mistral_7b.kernels.gpu import weight_only as w

KINDS = ("bf16", "fp16", "fp32")
# Multiples of 16 in a real model; Triton specializes on them.
WHOLE = ("N", "K", "M", "G", "B", "D", "row_q", "row_k", "row_v")


def assembly(kernel: Any, capability: int, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    """The PTX of a kernel, see `stages`."""
    return stages(kernel, capability, pointers, constants)["ptx"]


def stages(
    kernel: Any, capability: int, pointers: dict[str, str], constants: dict[str, Any], **how: Any
) -> dict[str, Any]:
    """All stages of a kernel with these types of pointers; other arguments are int32, but eps and scale by name.

    Pointers are multiples of 16, and so is what WHOLE names, unless the kernel wants to know nothing of it.
    """
    varied = {p.name for p in kernel.params if p.do_not_specialize}
    rest = [a for a in kernel.arg_names if a not in pointers and a not in constants]
    floats = {"eps", "scale"}
    types = {**{a: "fp32" if a in floats else "i32" for a in rest}, **{a: f"*{t}" for a, t in pointers.items()}}
    signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if a in pointers or (a in WHOLE and a not in varied)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=how)
    assert len(built.asm["cubin"]) > 0
    return {**built.asm, "shared": built.metadata.shared}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", ["Q8_0", "Q4_1", "Q4_K", "Q6_K"])
def test_block_formats(weight: str, kind: str, capability: int) -> None:
    """Q4_K has all arguments; of the others, one has no minimum, one no integer scales, one neither."""
    f = w.format_of(weight)
    scales: dict[str, Any] = {} if FORMATS[weight].scales else {"scales": None}
    held = {"x": kind, "d": "fp16", **({} if scales else {"scales": "i8"})}
    for splits, result in ((1, kind), (4, "fp32")):
        constants = {**f, **scales, "SPLITS": splits}
        ptx = assembly(
            triton_linear.matvec, capability, {**held, "words": "i32", "out": result}, {**constants, **w.MATVEC}
        )
        assert "ld.global.v4.b32" in ptx  # 16 bytes per thread
        ptx = assembly(
            triton_linear.tile, capability, {**held, "codes": "u8", "out": result}, {**constants, **w.TILE}
        )
        # 16 rows use mma.sync, whose order of sums is fixed; wgmma, used from 64 rows, must not occur.
        assert ("mma.sync" in ptx) == (kind != "fp32")
        assert "wgmma" not in ptx
        assert "tf32" not in ptx
    del held["x"]
    pointers = {**held, "codes": "u8", "out": kind}
    assembly(triton_linear.dequantize, capability, pointers, {**f, **scales, **w.DEQUANTIZE})


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_partial_sums(kind: str, capability: int) -> None:
    constants = {"SPLITS": 4, "BLOCK": 256}
    unscaled = {"scale": None, "x_scale": None, **constants}
    assembly(triton_linear.combine, capability, {"partials": "fp32", "out": kind}, unscaled)
    scaled = {"partials": "fp32", "scale": "fp32", "x_scale": "fp32", "out": kind}
    assembly(triton_linear.combine, capability, scaled, constants)


@pytest.mark.parametrize("capability", [89, 90])
def test_fp8(capability: int) -> None:
    pointers = {"x": "fp8e4nv", "w": "fp8e4nv", "scale": "fp32", "x_scale": "fp32", "out": "bf16"}
    assembly(triton_linear.matvec_fp8, capability, pointers, {"SPLITS": 1, **w.MATVEC_FP8})
    assert "mma.sync" in assembly(triton_linear.tile_fp8, capability, pointers, {"SPLITS": 1, **w.TILE})
    for kind in KINDS:
        rounded = {"x": kind, "q": "fp8e4nv", "scale": "fp32"}
        assert "e4m3x2" in assembly(triton_linear.quantize_fp8, capability, rounded, {"BLOCK": 4096})
    expand = {"w": "fp8e4nv", "scale": "fp32", "out": "fp32"}
    assembly(triton_linear.dequantize_fp8, capability, expand, w.DEQUANTIZE)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_fused(kind: str, capability: int) -> None:
    f = triton_elementwise
    assembly(f.rms_norm, capability, {"x": kind, "weight": kind, "out": kind}, {"BLOCK": 4096})
    assembly(f.silu_mul, capability, {"gate": kind, "up": kind, "out": kind}, {"BLOCK": 1024})
    rope = {"x": kind, "cos": "fp32", "sin": "fp32", "out": kind}
    assembly(f.rotate, capability, rope, {"BLOCK_H": 8, "BLOCK_P": 64})
    partials = {"maxima": "fp32", "totals": "fp32", "sums": "fp32"}
    for masked in (True, False):
        blocks = {
            "SPLIT": decode.SPLIT,
            "BLOCK_S": decode.BLOCK_S,
            "BLOCK_R": 16,
            "BLOCK_K": 128,
        }
        pointers = {"q": kind, "k": kind, "v": kind, "seen": "u8", **partials}
        ptx = assembly(triton_decode.attend_split, capability, pointers, {"MASKED": masked, **blocks})
        assert ("mma.sync" in ptx) == (kind != "fp32")
    assembly(
        triton_decode.attend_merge, capability, {**partials, "out": kind}, {"BLOCK_SPLITS": 16, "BLOCK_K": 128}
    )


def layouts_of_sums(ttgir: str) -> list[tuple[str, str]]:
    """Shapes and layouts of reductions over columns: they determine the order of a row's sums."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = re.findall(r"\}\) : \(tensor<(\d+x\d+xf32), (#\w+)>\)", ttgir)
    return [(shape, named[layout]) for shape, layout in found]


PAGED = {"G": 8, "R": 4, "K": 128}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kind", "int8"), [("bf16", False), ("bf16", True), ("fp16", False), ("fp16", True), ("fp32", False)]
)
def test_paged(kind: str, int8: bool, capability: int) -> None:
    t, kept, unit = triton_paged, "i8" if int8 else kind, "fp32" if int8 else kind
    where = dict.fromkeys(("start", "held", "offsets", "table"), "i64")
    partials = dict.fromkeys(("maxima", "totals", "sums"), "fp32")
    entries = {**dict.fromkeys(("k", "v", "old_k", "old_v"), kept)}
    entries |= dict.fromkeys(("k_scale", "v_scale", "old_k_scale", "old_v_scale"), unit)
    pages = {"PAGE": 16, "INT8": int8}
    blocks = {"BLOCK_M": paged.BLOCK_M, "BLOCK_S": paged.BLOCK_S // (1 + (kind == "fp32")), "BLOCK_K": 128}
    constants = {**PAGED, **pages, **blocks, "SPLIT": paged.SPLIT}
    pointers = {"q": kind, "out": kind, **entries, **where, **partials}
    layouts = []
    for shared in (False, True):
        built = stages(
            t.attend_tiles, capability, pointers, {**constants, "SHARED": shared}, **paged.LAUNCH_OPTIONS
        )
        ptx = built["ptx"]
        assert ("mma.sync" in ptx) == (kind != "fp32")
        assert "wgmma" not in ptx
        assert "tf32" not in ptx
        assert built["shared"] <= 99 * 1024  # of any GPU from 8.0 on
        # Keys and values are loaded 16 bytes at a time, although each has two possible sources.
        assert len(re.findall(r"cp\.async\.cg.*0x10", ptx)) >= 8
        assert kind == "fp32" or "fma.rn.f32" not in ptx
        layouts.append(layouts_of_sums(built["ttgir"]))
    assert len(layouts[0]) == 2  # the maximum, and the sum
    assert layouts[0] == layouts[1]
    last = {"SPLIT": paged.SPLIT, "BLOCK_R": 4, "BLOCK_K": 128}
    merge = {"out": kind, **{n: where[n] for n in ("start", "held", "offsets")}, **partials}
    assert (
        "fma.rn.f32"
        not in stages(t.merge_splits, capability, merge, {**PAGED, **last}, **paged.LAUNCH_OPTIONS)["ptx"]
    )
    kept_at = {**entries, **{n: where[n] for n in ("start", "offsets", "table")}}
    sizes = {"G": 8, "K": 128, **pages, "BLOCK": 1024, "BLOCK_G": 8}
    stages(t.write_kv, capability, kept_at, sizes, **paged.LAUNCH_OPTIONS)
