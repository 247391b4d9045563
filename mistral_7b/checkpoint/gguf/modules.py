"""The modules of a model that keep GGUF's blocks: Linears for the kernels, the embedding as in the file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...kernels.backend import weight_layout
from ...quantization.gpu import row_by_row
from ...quantization.linear import BlockLinear
from ...surgery import replace_linears
from ..names import EMBEDDING, OUTPUT
from ..stored import StoredTensor
from . import blocks as gguf_blocks
from .file import KINDS
from .reading import StoredBlocks


class BlockEmbedding(nn.Module):
    """An embedding whose rows are dequantized after the lookup; they may be a view of the mapped file."""

    def __init__(self, kind: str, raw: Tensor, dtype: torch.dtype) -> None:
        """From rows of blocks (V, D / block * size) uint8; `dtype` is the output type."""
        super().__init__()
        self.kind, self.dtype = KINDS[kind], dtype
        self.num_embeddings, self.embedding_dim = raw.shape[0], raw.shape[1] // self.kind.size * self.kind.block
        self.register_buffer("blocks", raw)

    blocks: Tensor

    def forward(self, tokens: Tensor) -> Tensor:  # (...) -> (..., D)
        rows = gguf_blocks.dequantize_to(self.kind, self.blocks[tokens.flatten()], self.dtype)
        return rows.view(*tokens.shape, self.embedding_dim)

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (V, D)."""
        return gguf_blocks.dequantize_to(self.kind, self.blocks, torch.float32)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind.name}"


def keep_blocks(
    model: nn.Module, tensors: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device | str
) -> set[str]:
    """Replace the Linears in formats of the kernels, and then the embedding, by modules that keep the blocks.

    `tensors` are those of the file by Mistral's names, `dtype` is the type of the embedding's rows. On a GPU the
    embedding is not kept: its dequantization may copy from the host, which a CUDA graph cannot capture. Returns
    the names of the weights that are kept. Without a kept Linear there is none: the model is a plain one then.
    """
    tied, tiled = OUTPUT not in tensors, weight_layout(device) == "tiles"

    def stored(name: str) -> StoredTensor:
        return tensors[EMBEDDING if tied and name == "output" else f"{name}.weight"]

    def build(linear: nn.Module, name: str) -> nn.Module:
        weight = stored(name)
        assert isinstance(weight, StoredBlocks)  # guaranteed by `kept`
        codes, d = gguf_blocks.tiles(weight.kind, weight.raw())
        weight.release()
        linear = BlockLinear.of_tiles(weight.kind.name, codes, d, weight.shape[1], weight.shape[0])
        return linear if tiled else row_by_row(linear, device)

    def kept(name: str, module: nn.Module) -> bool:
        weight = stored(name) if isinstance(module, nn.Linear) else None
        return isinstance(weight, StoredBlocks) and weight.kernel_ready

    names = {f"{name}.weight" for name in replace_linears(model, build, kept)}
    embedding = tensors[EMBEDDING]
    # A tied output that is not kept needs the embedding's dequantized weight.
    if names and tiled and isinstance(embedding, StoredBlocks) and not (tied and OUTPUT not in names):
        model.set_submodule("tok_embeddings", BlockEmbedding(embedding.kind.name, embedding.raw(), dtype))
        names.add(EMBEDDING)
    return names
