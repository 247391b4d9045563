"""Modules that replace Linears: the same product with quantized or packed weights.

All satisfy the contract of surgery.py: `in_features`, `out_features` and `forward`. Weights are stored in the
tiles of kernels/block_formats.py, on disk and in memory, so that a file only needs to be memory-mapped.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..kernels import block_formats
from ..kernels.backend import PACKED_LINEAR, Backend, uses
from ..kernels.cpu import huge_pages
from ..kernels.cpu.arguments import Weights
from ..kernels.frozen import frozen_product
from ..kernels.linear import block_linear, block_weights
from .rounding import Blocks, round_blocks


class Stored(nn.Module):
    """Weights in a storage format. `.to()`, `.half()` and the like may move them, and never change their types."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)

        return super()._apply(moved, recurse)


class Compressed(Stored):
    """A Linear whose compressed weight the kernels use directly."""

    in_features: int
    out_features: int

    def described(self) -> Weights:
        """The kernels' descriptor of the weight; it holds pointers to the tensors."""
        raise NotImplementedError

    def described_by(self) -> list[Tensor]:
        """The tensors that `described` points to; if one is replaced, the descriptor is invalid."""
        return [t for t in self._buffers.values() if t is not None]

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        raise NotImplementedError


class BlockLinear(Compressed):
    """y = x W^T in one of GGUF's block formats, with activations quantized to int8 per block."""

    def __init__(
        self, kind: str, in_features: int, out_features: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        f = block_formats.FORMATS[kind]
        self.kind = kind
        self.in_features, self.out_features = in_features, out_features
        tiles = -(-out_features // block_formats.TILE)
        codes = torch.empty(tiles, f.lines(in_features), 64, dtype=torch.uint8, device=device)
        d = torch.empty(
            tiles, f.blocks(in_features), 1 + f.minimum, block_formats.TILE, dtype=torch.float16, device=device
        )
        self.register_buffer("codes", codes)
        self.register_buffer("d", d)

    codes: Tensor
    d: Tensor

    @classmethod
    def of_tiles(cls, kind: str, codes: Tensor, d: Tensor, in_features: int, out_features: int) -> BlockLinear:
        """From the tiles of block_formats.py, codes (T, L, 64) and d (T, B, 1 or 2, 16)."""
        out = cls(kind, in_features, out_features, "meta")
        out.load_state_dict({"codes": codes, "d": d}, assign=True)
        return out

    @classmethod
    def of_blocks(cls, kind: str, blocks: Blocks, in_features: int) -> BlockLinear:
        """From the result of `round_blocks`."""
        codes, d = block_formats.tile(kind, *blocks)
        return cls.of_tiles(kind, huge_pages.copied(codes), d, in_features, len(blocks.q))

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return block_linear(x, self.codes, self.d, self.out_features, self.kind)

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return block_formats.dequantize(self.kind, self.codes, self.d, self.in_features)[: self.out_features]

    def described(self) -> Weights:
        return block_weights(self.kind, self.codes, self.d, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class Int8Embedding(Stored):
    """An embedding with int8 rows and a scale per 32 values; rows are dequantized after the lookup."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = rows, dim, dtype
        self.register_buffer("codes", torch.empty(rows, dim, dtype=torch.int8, device=device))
        self.register_buffer(
            "scale", torch.empty(rows, -(-dim // block_formats.UNIT), dtype=torch.float16, device=device)
        )

    codes: Tensor
    scale: Tensor

    @classmethod
    def from_weight(cls, weight: Tensor) -> Int8Embedding:
        """Quantize an embedding's weight (V, D), whose type becomes the output type."""
        out = cls(weight.shape[0], weight.shape[1], weight.dtype, "meta")
        blocks = round_blocks(weight, "Q8_0")
        codes = (blocks.q[:, : weight.shape[1]] ^ 128).view(torch.int8).contiguous()
        out.load_state_dict({"codes": codes, "scale": blocks.d[..., 0].contiguous()}, assign=True)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, tokens: Tensor) -> Tensor:  # (...) -> (..., D)
        return self._dequantized(self.codes[tokens], self.scale[tokens]).to(self.dtype)

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (V, D)."""
        return self._dequantized(self.codes, self.scale)

    def _dequantized(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes * scale.float().repeat_interleave(block_formats.UNIT, -1)[..., : self.embedding_dim]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


# Rows of a block whose order of sums others must have.
ROWS = {torch.bfloat16: 32, torch.float32: 16, torch.float16: 16, torch.float64: 16}
BLOCKS = ((2, 4, 8, 16, 32), (64, 128), (256, 512))  # their rows; those of a tuple are checked together
PATTERN = 61  # outputs with weights of their own in the check; the others repeat them


def _packed(weight: Tensor) -> Tensor:
    """The weight (N, K) in oneDNN's own layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS[weight.dtype])


def _product(x: Tensor, weight: Tensor, packs: bool) -> Tensor:
    if not packs:
        return nn.functional.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def equal_blocks(
    dtype: torch.dtype,
    device: torch.device,
    packs: bool,
    n: int,
    inputs: int,
    sizes: tuple[int, ...],
    threads: int,
) -> frozenset[int]:
    """Those of the sizes of blocks with the bits of blocks of ROWS rows, in products with weights (n, inputs).

    Measured with random numbers: the order of a sum, which decides, is a matter of shapes and threads alone.
    """
    draw, rows = torch.Generator("cpu").manual_seed(0), ROWS[dtype]
    x = torch.randn(max(sizes), inputs, generator=draw, device="cpu").to(device, dtype)
    weight = torch.randn(PATTERN, inputs, generator=draw, device="cpu").to(device, dtype)
    weight = weight.repeat(-(-n // PATTERN), 1)[:n]
    weight = _packed(weight) if packs else weight
    wanted = torch.cat([_product(block, weight, packs) for block in x.split(rows)])

    def equal(size: int) -> bool:
        pairs = zip(x.split(size), wanted.split(size), strict=True)
        return all(torch.equal(_product(block, weight, packs), part) for block, part in pairs)

    return frozenset(size for size in sizes if size == rows or equal(size))


class PackedLinear(nn.Module):
    """A bfloat16 or float32 Linear whose weight is packed once for oneDNN; `F.linear` packs it in every call.

    oneDNN selects its kernel by the number of rows, so the last bits of a row may depend on it. `deterministic`
    avoids this: rows are multiplied in blocks of ROWS, padded with zeros, and of the BLOCKS with equal bits.
    oneDNN packs bfloat16 for AVX-512 and for AVX-NE-CONVERT; on a CPU with neither, the weight is not packed.
    """

    def __init__(self, weight: Tensor, deterministic: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.deterministic = deterministic
        self._pack(weight.detach())

    def _pack(self, weight: Tensor) -> None:
        """Hold a weight (N, K): packed if oneDNN packs its type on its device."""
        self.packs = uses(Backend.ONEDNN, PACKED_LINEAR, weight)
        self.dtype = weight.dtype
        self.packed = _packed(weight) if self.packs else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to()`, `.half()` and the like: the weight is packed again if its type or device changes."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device))
        if (probe.dtype, probe.device) != (self.dtype, self.packed.device):
            self._pack(fn(self.dense()))
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a packed tensor has no storage that could be copied."""
        return {**self.__dict__, "packed": self.dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack(self.packed)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.dense()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        strict, missing, unexpected, errors = args[-4:]
        weight = state_dict.get(f"{prefix}weight")
        if strict:
            unexpected.extend(name for name in state_dict if name.startswith(prefix) and name != f"{prefix}weight")
        if weight is None:
            missing.extend([f"{prefix}weight"] if strict else [])
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            errors.append(
                f"{prefix}weight is {tuple(weight.shape)}, not ({self.out_features}, {self.in_features})"
            )
        else:
            self._pack(weight.detach().to(self.packed.device, self.dtype, copy=True))

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return frozen_product(x, self._rows, lambda grad: grad @ self.dense())

    def dense(self) -> Tensor:
        """The weight (N, K), copied if it is packed."""
        return self.packed.to_dense() if self.packs else self.packed

    def _rows(self, x: Tensor) -> Tensor:
        if not self.deterministic:
            return self._product(x)
        flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
        n, blocks = len(flat), self._blocks(max(1, len(flat)))
        if sum(blocks) > n:
            flat = nn.functional.pad(flat, (0, 0, 0, sum(blocks) - n))
        parts = [self._product(rows) for rows in flat.split(blocks)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out[:n].view(*x.shape[:-1], self.out_features)

    def _blocks(self, rows: int) -> list[int]:
        """Sizes of the blocks of so many rows, of which the last one may be padded."""
        small = sorted(self._equal(BLOCKS[0]))
        sizes = []
        while rows > small[-1]:
            known = (size for some in reversed(BLOCKS) if some[0] <= rows for size in self._equal(some))
            sizes.append(max(size for size in known if size <= rows))
            rows -= sizes[-1]
        return [*sizes, next(size for size in small if size >= rows)] if rows else sizes

    def _equal(self, sizes: tuple[int, ...]) -> frozenset[int]:
        kind = self.dtype, self.packed.device, self.packs
        return equal_blocks(*kind, self.out_features, self.in_features, sizes, torch.get_num_threads())

    def _product(self, x: Tensor) -> Tensor:
        return _product(x, self.packed, self.packs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, packed {str(self.dtype).removeprefix('torch.')}"


def unpacked_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, without packed weights, which `state_dict` would unpack all at once."""
    held = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: value.detach() for name, value in held}
