"""Weights quantized by GPTQ, AWQ and compressed-tensors, dequantized one matrix at a time.

N outputs, K inputs, G groups of inputs; a 32-bit integer holds P = 32 / bits codes, the first in its lowest bits.

    GPTQ                qweight (K/P, N) int32 along K, qzeros (G, N/P) int32, scales (G, N), g_idx (K,) the group
                        of each input; in format "gptq" qzeros hold the zero point less one, in "gptq_v2" itself
    AWQ (gemm)          qweight (K, N/8) int32 along N in the order AWQ_ORDER, qzeros (G, N/8) alike, scales (G, N)
    compressed-tensors  int-quantized: weight (N, K) int8, weight_scale (N, 1) or (N, G);
                        pack-quantized: weight_packed (N, K/P) int32 of code + 2^(bits-1), weight_scale (N, G)

The weight is (code - zero) * scale, with one rounding to the type of the scales (float16, or bfloat16), as those
libraries compute it. They do not fit the int4 format of this package without loss: its scales are four-bit
multiples of one scale for each output, theirs are free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .packing import INSTEAD, Packing
from .stored import StoredTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight, whose code lies in each place of an integer
SUFFIXES = (
    "qweight", "qzeros", "scales", "g_idx",
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
)  # fmt: skip
INPUTS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class PackedMatrix(StoredTensor):
    """A quantized matrix (N, K), stored as several tensors; its values have the type of the scales."""

    parts: Mapping[str, StoredTensor] = dataclasses.field(kw_only=True)  # by suffix
    packing: Packing = dataclasses.field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """The size of all parts, in bytes."""
        return sum(part.nbytes for part in self.parts.values())

    def view(self) -> Tensor:
        """Return the dequantized values; unlike `StoredTensor.view`, a copy."""
        read = _by_outputs if self.packing.method == "compressed-tensors" else _by_inputs
        out = read(self)
        self.release()
        return out

    def release(self) -> None:
        for part in self.parts.values():
            part.release()

    def part(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a part, of this shape (-1 for any) and type. CheckpointError if it is missing or differs."""
        if name not in self.parts:
            raise self.fault(f"lacks its {name!r}")
        stored = self.parts[name]
        fits = len(stored.shape) == len(shape) and all(
            n in (-1, m) for n, m in zip(shape, stored.shape, strict=True)
        )
        if not fits:
            raise stored.fault(f"has shape {stored.shape}; the quantization requires {shape}")
        if (dtype is None and not stored.dtype.is_floating_point) or (dtype is not None and stored.dtype != dtype):
            raise stored.fault(f"has type {stored.dtype}, not {dtype or 'a floating-point type'}")
        return stored.view()


def combine(raw: Mapping[str, StoredTensor], packing: Packing) -> dict[str, StoredTensor]:
    """Return the tensors of a quantized checkpoint by the names of the unquantized one.

    A bias of zeros, as early AutoGPTQ wrote for layers without one, is dropped.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    out: dict[str, StoredTensor] = {}
    for name, stored in raw.items():
        module, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES:
            parts.setdefault(module, {})[suffix] = stored
        else:
            out[name] = stored
    for module, found in parts.items():
        name = f"{module}.weight"
        if name in out:  # int-quantized: the int8 codes
            found["weight"] = out[name]
        bias = out.get(f"{module}.bias")
        if bias is not None and not bool(bias.view().any()):
            del out[f"{module}.bias"]
        out[name] = _matrix(name, found, packing)
    return out


def _matrix(name: str, parts: dict[str, StoredTensor], packing: Packing) -> PackedMatrix:
    """Return a matrix with its shape and type, from the shapes of its parts."""
    main = next((parts[n] for n in ("qweight", "weight_packed", "weight") if n in parts), None)
    scales = parts.get("weight_scale" if packing.method == "compressed-tensors" else "scales")
    if main is None or scales is None:
        have = next(iter(parts.values()))
        raise have.fault(f"has no {'scales' if main else 'codes'} beside it, as {packing.method} stores them")
    if len(main.shape) != 2:
        raise main.fault(f"has shape {main.shape}, not that of a matrix")
    a, b = main.shape
    shape: tuple[int, ...]
    if packing.method == "gptq":
        shape = (b, a * 32 // packing.bits)
    elif packing.method == "awq":
        shape = (b * 8, a)
    else:
        shape = (a, b)
        if "weight_packed" in parts:
            size = parts.get("weight_shape")
            if size is None or size.shape != (2,):
                raise main.fault("has no 'weight_shape' of two numbers beside it")
            shape = tuple(int(n) for n in size.view())
    return PackedMatrix(main.file, name, scales.dtype, shape, main.offset, parts=parts, packing=packing)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unpack int32 (...): (..., 32 / bits) int32 codes, those of the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed[..., None] >> shifts) & (2**bits - 1)


def _by_inputs(matrix: PackedMatrix) -> Tensor:
    """Dequantize GPTQ or AWQ, some inputs at a time."""
    packing, (outputs, inputs) = matrix.packing, matrix.shape
    scales = matrix.part("scales", (-1, outputs))
    groups = len(scales)
    codes_of, zeros = (_gptq_codes if packing.method == "gptq" else _awq_codes)(matrix, groups)
    group_of = _group_of(matrix, groups)
    out = torch.empty(outputs, inputs, dtype=scales.dtype)
    for begin in range(0, inputs, INPUTS_AT_ONCE):
        end = min(begin + INPUTS_AT_ONCE, inputs)
        group = group_of[begin:end]
        out[:, begin:end] = ((codes_of(begin, end) - zeros[group]).to(scales.dtype) * scales[group]).t()
    return out


def _gptq_codes(matrix: PackedMatrix, groups: int) -> tuple[Callable[[int, int], Tensor], Tensor]:
    """Return a function of the codes (end - begin, N) of some inputs, and the zero points (G, N)."""
    bits, (outputs, inputs) = matrix.packing.bits, matrix.shape
    packed = matrix.part("qweight", (inputs * bits // 32, outputs), torch.int32)
    zeros = _unpacked(matrix.part("qzeros", (groups, outputs * bits // 32), torch.int32), bits).flatten(1)
    if zeros.shape[1] != outputs:
        raise matrix.fault(f"has {outputs} outputs, not a multiple of the {32 // bits} codes in an integer")

    def codes_of(begin: int, end: int) -> Tensor:
        rows = packed[begin * bits // 32 : end * bits // 32]
        return _unpacked(rows, bits).transpose(1, 2).flatten(0, 1)

    return codes_of, zeros + matrix.packing.zero_offset


def _awq_codes(matrix: PackedMatrix, groups: int) -> tuple[Callable[[int, int], Tensor], Tensor]:
    """As `_gptq_codes`, for AWQ."""
    outputs, inputs = matrix.shape
    packed = matrix.part("qweight", (inputs, outputs // 8), torch.int32)
    place = torch.tensor([AWQ_ORDER.index(n) for n in range(8)])

    def codes(integers: Tensor) -> Tensor:
        return _unpacked(integers, 4)[..., place].flatten(-2)

    zeros = codes(matrix.part("qzeros", (groups, outputs // 8), torch.int32))
    return lambda begin, end: codes(packed[begin:end]), zeros


def _group_of(matrix: PackedMatrix, groups: int, name: str = "g_idx") -> Tensor:
    """Return the group of each input, (K,)."""
    inputs, size = matrix.shape[1], matrix.packing.group_size
    if name in matrix.parts:
        found = matrix.part(name, (inputs,), torch.int32).long()
        if bool((found < 0).any()) or bool((found >= groups).any()):
            raise matrix.parts[name].fault(f"names groups other than 0 to {groups - 1}")
        return found
    size = inputs if size == -1 else size
    if -(-inputs // size) != groups:
        raise matrix.fault(
            f"has {groups} groups; {inputs} inputs in groups of {size} require {-(-inputs // size)}"
        )
    return torch.arange(inputs) // size


def _by_outputs(matrix: PackedMatrix) -> Tensor:
    """Dequantize compressed-tensors, some outputs at a time."""
    outputs, inputs = matrix.shape
    scale = _for_outputs(matrix, "weight_scale")
    groups = scale.shape[1]
    if groups == 0 or inputs % groups:
        raise matrix.fault(f"has {groups} groups, which do not divide {inputs} inputs")
    group = torch.arange(inputs) // (inputs // groups)
    if "weight_g_idx" in matrix.parts and bool((matrix.part("weight_g_idx", (inputs,), torch.int32) >= 0).all()):
        group = _group_of(matrix, groups, "weight_g_idx")  # -1 throughout: not reordered
    if "weight_packed" in matrix.parts:
        integers, bits = _packed_rows(matrix)
        zero = torch.full((outputs, 1), 2 ** (bits - 1), dtype=torch.int8 if bits < 8 else torch.int32)
    else:
        integers, bits = matrix.part("weight", (outputs, inputs), torch.int8), 0
        zero = torch.zeros(outputs, 1, dtype=torch.int8)
        if "weight_zero_point" in matrix.parts:
            zero = _for_outputs(matrix, "weight_zero_point", torch.int8)
    out = torch.empty(outputs, inputs, dtype=scale.dtype)
    for begin in range(0, outputs, INPUTS_AT_ONCE):
        rows = slice(begin, begin + INPUTS_AT_ONCE)
        codes = _unpacked(integers[rows], bits).flatten(1) if bits else integers[rows].int()
        zeros = zero[rows] if zero.shape[1] == 1 else zero[rows][:, group]
        out[rows] = (codes - zeros).to(scale.dtype) * scale[rows][:, group]
    return out


def _for_outputs(matrix: PackedMatrix, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return scales or zero points as (N, G): G is 1 for one an output, or one for the whole matrix."""
    shape = matrix.parts[name].shape
    if shape in ((), (1,), (1, 1)):
        return matrix.part(name, shape, dtype).reshape(1, 1).expand(matrix.shape[0], 1)
    return matrix.part(name, (matrix.shape[0], -1), dtype)


def _packed_rows(matrix: PackedMatrix) -> tuple[Tensor, int]:
    """Return the packed integers (N, K/P) of compressed-tensors, and the bits of a code."""
    outputs, inputs = matrix.shape
    packed = matrix.part("weight_packed", (outputs, -1), torch.int32)
    bits = 32 * packed.shape[1] // max(inputs, 1)
    if bits not in (4, 8) or inputs * bits != 32 * packed.shape[1]:
        raise matrix.fault(f"has {packed.shape[1]} packed integers an output, which do not hold {inputs} codes")
    if "weight_zero_point" in matrix.parts:
        raise matrix.parts["weight_zero_point"].fault(
            "is a packed zero point, which cannot be opened", hint=INSTEAD
        )
    return packed, bits
