"""What takes a Linear's place: the same product with compressed weights.

Each keeps the contract of surgery.py: `in_features`, `out_features` and `forward`. Weights lie in the tiles of
kernels/layout.py, on disk as in memory, so that opening a file maps it and no more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import layout
from ..kernels.backend import PACKED_LINEAR, Backend, uses
from ..kernels.cpu import huge_pages
from ..kernels.cpu.arguments import Weights
from ..kernels.linear import (
    block_linear,
    block_weights,
    int4_linear,
    int4_weights,
    int8_linear,
    int8_weights,
    int_weight,
)
from .rounding import Int4Codes, Int8Codes, round_int8


class Compressed(nn.Module):
    """A Linear whose weight the kernels multiply with as it is compressed."""

    in_features: int
    out_features: int
    bits: int  # of a code

    def described(self) -> Weights:
        """Itself as the kernels take it: it points at the tensors."""
        raise NotImplementedError

    def described_by(self) -> list[Tensor]:
        """The tensors at which that points: with others it is no longer true."""
        return [t for t in self._buffers.values() if t is not None]

    def dequantized(self) -> Tensor:
        """The weight that it stands for, float32 (N, K)."""
        raise NotImplementedError


class Int8Linear(Compressed):
    """y = x W^T with int8 weights, a float scale for each output, and activations that become int8 by row."""

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
        """A Linear of what `round_int8` returns."""
        out, made = cls(q.q.shape[1], q.q.shape[0], "meta"), {}
        rows, columns = out.codes.shape[0] * layout.TILE, out.codes.shape[1] * 4
        made["codes"] = huge_pages.copied(layout.tile_int8(layout.pad(q.q, rows, columns, 128)))
        made["scale"] = nn.functional.pad(q.scale, (0, rows - len(q.scale)))
        out.load_state_dict(made, assign=True)
        return out

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return int8_linear(x, self.codes, self.scale, self.out_features)

    def integers(self) -> Tensor:
        """The int8 weights, (N, K)."""
        return int_weight(self.codes, None)[: self.out_features, : self.in_features]

    def dequantized(self) -> Tensor:
        """The weight that it stands for, float32 (N, K)."""
        return self.integers() * self.scale[: self.out_features, None]

    def described(self) -> Weights:
        return int8_weights(self.codes, self.scale, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8"


class Int4Linear(Compressed):
    """y = x W^T with int4 weights in groups, each an int8 weight in compressed form (rounding.py)."""

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
        """A Linear of what `round_int4` returns; `in_features` is K without its padding."""
        group_size = q.q.shape[1] // q.m.shape[1]
        out, made = cls(in_features, q.q.shape[0], group_size, "meta"), {}
        rows, columns = out.codes.shape[0] * layout.TILE, out.codes.shape[1] * 8
        made["codes"] = huge_pages.copied(layout.tile_int4(layout.pad(q.q, rows, columns, 8)))
        m, z = (layout.pad(t, rows, columns // group_size, value) for t, value in ((q.m, 1), (q.z, 8)))
        made["groups"] = layout.tile_groups(m, z)
        made["scale"] = nn.functional.pad(q.scale, (0, rows - len(q.scale)))
        out.load_state_dict(made, assign=True)
        return out

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return int4_linear(x, self.codes, self.groups, self.scale, self.out_features, self.group_size)

    def integers(self) -> Tensor:
        """The int8 weights that the codes stand for, (N, K)."""
        return int_weight(self.codes, self.groups, self.group_size)[: self.out_features, : self.in_features]

    def dequantized(self) -> Tensor:
        """The weight that it stands for, float32 (N, K)."""
        return self.integers() * self.scale[: self.out_features, None]

    def described(self) -> Weights:
        return int4_weights(self.codes, self.groups, self.scale, self.out_features, self.group_size)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int4 in groups of {self.group_size}"


class BlockLinear(Compressed):
    """y = x W^T with GGUF's Q8_0 or Q4_0 as they stand: codes of 8 or 4 bits, a float16 scale for 32 inputs."""

    def __init__(self, d: Tensor, q: Tensor, bits: int) -> None:
        """From d float16 (N, K/32) and q uint8 (N, K), whose zero is 128 or 8."""
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.bits = bits
        rows = layout.padded(self.out_features, layout.TILE)
        q = layout.pad(q, rows, self.in_features, 128 if bits == 8 else 8)
        self.register_buffer("codes", huge_pages.copied(layout.tile_int8(q) if bits == 8 else layout.tile_int4(q)))
        d = nn.functional.pad(d, (0, 0, 0, rows - self.out_features))
        self.register_buffer("d", d.unflatten(0, (-1, layout.TILE)).transpose(1, 2).contiguous())

    codes: Tensor
    d: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return block_linear(x, self.codes, self.d, self.out_features, self.bits)

    def dequantized(self) -> Tensor:
        """The weight that it stands for, float32 (N, K)."""
        untiled = layout.untile_int8(self.codes) if self.bits == 8 else layout.untile_int4(self.codes)
        q = untiled.float() - (128 if self.bits == 8 else 8)
        d = self.d.transpose(1, 2).flatten(0, 1).float()
        weight = (q.unflatten(1, (-1, 32)) * d[..., None]).flatten(1)
        return weight[: self.out_features]

    def described(self) -> Weights:
        return block_weights(self.codes, self.d, self.out_features, self.bits)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {'Q8_0' if self.bits == 8 else 'Q4_0'}"


class Int8Embedding(nn.Module):
    """Rows of int8 with a scale each, gathered as they lie and dequantized after."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = rows, dim, dtype
        self.register_buffer("codes", torch.empty(rows, dim, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(rows, device=device))

    codes: Tensor
    scale: Tensor

    @classmethod
    def from_weight(cls, weight: Tensor) -> Int8Embedding:
        """Of an embedding's weight (V, D), whose type is that of what comes out."""
        q = round_int8(weight)
        out = cls(weight.shape[0], weight.shape[1], weight.dtype, "meta")
        out.load_state_dict({"codes": q.integers(), "scale": q.scale}, assign=True)
        return out

    def forward(self, tokens: Tensor) -> Tensor:  # (...) -> (..., D)
        return (self.codes[tokens] * self.scale[tokens][..., None]).to(self.dtype)

    def dequantized(self) -> Tensor:
        """The weight that it stands for, float32 (V, D)."""
        return self.codes * self.scale[:, None]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


class PackedLinear(nn.Module):
    """A bfloat16 Linear whose weight is packed once for oneDNN; `F.linear` packs it again at every call.

    A product's last bits depend on the number of rows, as oneDNN chooses its kernel by it. `deterministic`
    works on 32 rows at a time, filled up with zeros: then they do not. oneDNN packs bfloat16 for AVX-512 and for
    AVX-NE-CONVERT; a CPU with neither keeps the weight as it is.
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
            full = nn.functional.pad(rows, (0, 0, 0, self.ROWS - len(rows)))
            parts.append(self._product(full)[: len(rows)])
        return torch.cat(parts).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        if not self.packs:
            return nn.functional.linear(x, self.packed)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, packed bfloat16"
