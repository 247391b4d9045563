"""Modules that replace Linears: the same product with quantized or packed weights.

All satisfy the contract of surgery.py: `in_features`, `out_features` and `forward`. Weights are stored in the
tiles of kernels/layout.py, on disk and in memory, so that a file only needs to be memory-mapped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import block_formats, layout
from ..kernels.backend import PACKED_LINEAR, Backend, uses
from ..kernels.block_linear import block_linear, block_weights
from ..kernels.cpu import huge_pages
from ..kernels.cpu.arguments import Weights
from ..kernels.linear import (
    int4_linear,
    int4_weights,
    int8_linear,
    int8_weights,
    int_weight,
)
from .rounding import Int4Codes, Int8Codes, round_int8


class Compressed(nn.Module):
    """A Linear whose compressed weight the kernels use directly."""

    in_features: int
    out_features: int
    bits: int  # of a code

    def described(self) -> Weights:
        """The kernels' descriptor of the weight; it holds pointers to the tensors."""
        raise NotImplementedError

    def described_by(self) -> list[Tensor]:
        """The tensors that `described` points to; if one is replaced, the descriptor is invalid."""
        return [t for t in self._buffers.values() if t is not None]

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        raise NotImplementedError


class Int8Linear(Compressed):
    """y = x W^T with int8 weights, a float scale per output, and activations quantized to int8 per row."""

    bits = 8

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        rows, columns = layout.padded(out_features, layout.TILE), layout.padded(in_features, layout.WIDE)
        shape = (rows // layout.TILE, columns // 4, layout.TILE, 4)
        self.register_buffer("codes", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(rows, device=device))

    codes: Tensor
    scale: Tensor

    @classmethod
    def from_codes(cls, q: Int8Codes) -> Int8Linear:
        """From the result of `round_int8`."""
        out, tensors = cls(q.q.shape[1], q.q.shape[0], "meta"), {}
        rows, columns = out.codes.shape[0] * layout.TILE, out.codes.shape[1] * 4
        tensors["codes"] = huge_pages.copied(layout.tile_int8(layout.pad(q.q, rows, columns, 128)))
        tensors["scale"] = nn.functional.pad(q.scale, (0, rows - len(q.scale)))
        out.load_state_dict(tensors, assign=True)
        return out

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return int8_linear(x, self.codes, self.scale, self.out_features)

    def integers(self) -> Tensor:
        """The int8 weights, (N, K)."""
        return int_weight(self.codes, None)[: self.out_features, : self.in_features]

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return self.integers() * self.scale[: self.out_features, None]

    def described(self) -> Weights:
        return int8_weights(self.codes, self.scale, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8"


class Int4Linear(Compressed):
    """y = x W^T with grouped int4 weights, which are compressed int8 weights (rounding.py)."""

    bits = 4

    def __init__(
        self, in_features: int, out_features: int, group_size: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        rows = layout.padded(out_features, layout.TILE)
        columns = layout.padded(in_features, max(group_size, layout.WIDE))
        tiles = rows // layout.TILE
        codes = torch.empty(tiles, columns // 8, layout.TILE, 4, dtype=torch.uint8, device=device)
        groups = torch.empty(tiles, columns // group_size, layout.TILE, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("groups", groups)
        self.register_buffer("scale", torch.empty(rows, device=device))

    codes: Tensor
    groups: Tensor
    scale: Tensor

    @classmethod
    def from_codes(cls, q: Int4Codes, in_features: int) -> Int4Linear:
        """From the result of `round_int4`; `in_features` is K without padding."""
        group_size = q.q.shape[1] // q.m.shape[1]
        out, tensors = cls(in_features, q.q.shape[0], group_size, "meta"), {}
        rows, columns = out.codes.shape[0] * layout.TILE, out.codes.shape[1] * 8
        tensors["codes"] = huge_pages.copied(layout.tile_int4(layout.pad(q.q, rows, columns, 8)))
        m, z = (layout.pad(t, rows, columns // group_size, value) for t, value in ((q.m, 1), (q.z, 8)))
        tensors["groups"] = layout.tile_groups(m, z)
        tensors["scale"] = nn.functional.pad(q.scale, (0, rows - len(q.scale)))
        out.load_state_dict(tensors, assign=True)
        return out

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return int4_linear(x, self.codes, self.groups, self.scale, self.out_features, self.group_size)

    def integers(self) -> Tensor:
        """The decompressed int8 weights, (N, K)."""
        return int_weight(self.codes, self.groups, self.group_size)[: self.out_features, : self.in_features]

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return self.integers() * self.scale[: self.out_features, None]

    def described(self) -> Weights:
        return int4_weights(self.codes, self.groups, self.scale, self.out_features, self.group_size)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int4 in groups of {self.group_size}"


class BlockLinear(Compressed):
    """y = x W^T in one of GGUF's block formats, with activations quantized to int8 per block."""

    def __init__(self, kind: str, codes: Tensor, d: Tensor, out_features: int) -> None:
        """From the tiles of block_formats.py."""
        super().__init__()
        f = block_formats.FORMATS[kind]
        self.kind, self.bits = kind, f.low + f.high
        self.in_features, self.out_features = codes.shape[1] * f.block, out_features
        self.register_buffer("codes", codes)
        self.register_buffer("d", d)

    codes: Tensor
    d: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return block_linear(x, self.codes, self.d, self.out_features, self.kind)

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return block_formats.dequantize(self.kind, self.codes, self.d)[: self.out_features]

    def described(self) -> Weights:
        return block_weights(self.kind, self.codes, self.d, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class Int8Embedding(nn.Module):
    """An embedding with int8 rows and a scale per row; rows are dequantized after the lookup."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = rows, dim, dtype
        self.register_buffer("codes", torch.empty(rows, dim, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(rows, device=device))

    codes: Tensor
    scale: Tensor

    @classmethod
    def from_weight(cls, weight: Tensor) -> Int8Embedding:
        """Quantize an embedding's weight (V, D), whose type becomes the output type."""
        q = round_int8(weight)
        out = cls(weight.shape[0], weight.shape[1], weight.dtype, "meta")
        out.load_state_dict({"codes": q.integers(), "scale": q.scale}, assign=True)
        return out

    def forward(self, tokens: Tensor) -> Tensor:  # (...) -> (..., D)
        return (self.codes[tokens] * self.scale[tokens][..., None]).to(self.dtype)

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (V, D)."""
        return self.codes * self.scale[:, None]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


class PackedLinear(nn.Module):
    """A bfloat16 Linear whose weight is packed once for oneDNN; `F.linear` packs it in every call.

    oneDNN selects its kernel by the number of rows, so the last bits of a row depend on it. `deterministic`
    processes 32 rows at a time, padded with zeros, to avoid this. oneDNN packs bfloat16 for AVX-512 and for
    AVX-NE-CONVERT; on a CPU with neither, the weight is not packed.
    """

    ROWS = 32

    def __init__(self, weight: Tensor, deterministic: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.deterministic = deterministic
        weight = weight.detach()
        self.packs = uses(Backend.ONEDNN, PACKED_LINEAR, weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, self.ROWS) if self.packs else weight

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        if not self.deterministic:
            return self._product(x)
        flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
        parts = []
        for rows in flat.split(self.ROWS):
            padded_rows = nn.functional.pad(rows, (0, 0, 0, self.ROWS - len(rows)))
            parts.append(self._product(padded_rows)[: len(rows)])
        return torch.cat(parts).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        if not self.packs:
            return nn.functional.linear(x, self.packed)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, packed bfloat16"
