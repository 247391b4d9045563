"""The one table of tensor names, and the one difference in layout: the order of q's and k's rows.

Within the package a tensor bears Mistral's name and layout. Names change at the door, by this table
alone. Hugging Face rotates element i of a head with element i + K/2 (half-split); Mistral and GGUF
rotate neighbours 2i and 2i + 1 (interleaved). So the rows of wq and wk, and of nothing else, are
permuted within each head:

    Mistral        x0 y0 x1 y1 x2 y2        Hugging Face        x0 x1 x2 y0 y1 y2

D width · V vocabulary · F feed-forward width · H query heads · G key/value heads · K head width
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import ModelArgs

FORMATS = ("mistral", "huggingface", "gguf")


class Row(NamedTuple):
    """One kind of tensor: its shape, and its names without ".weight" in three formats ({} is the layer)."""

    mistral: str
    huggingface: str
    gguf: str
    shape: tuple[str, ...]


TABLE = (
    Row("tok_embeddings", "model.embed_tokens", "token_embd", ("V", "D")),
    Row("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "blk.{}.attn_norm", ("D",)),
    Row("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q", ("HK", "D")),
    Row("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k", ("GK", "D")),
    Row("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v", ("GK", "D")),
    Row("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output", ("D", "HK")),
    Row("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm", ("D",)),
    Row("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate", ("F", "D")),
    Row("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down", ("D", "F")),
    Row("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up", ("F", "D")),
    Row("norm", "model.norm", "output_norm", ("D",)),
    Row("output", "lm_head", "output", ("V", "D")),
)
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"

# Rotary frequencies that early converters stored: they follow from theta and are no weights.
DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope\.freqs|rope_freqs\.weight)")

_LAYER = re.compile(r"\.(0|[1-9]\d*)\.")
_ROWS = {fmt: {getattr(row, fmt): row for row in TABLE} for fmt in FORMATS}


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as the table has it, and its layer's number ("" if it has none)."""
    name, suffix, rest = name.rpartition(".weight")
    if not suffix or rest or "{" in name:
        return "", ""
    found = _LAYER.search(name)
    if found is None:
        return name, ""
    return f"{name[: found.start()]}.{{}}.{name[found.end() :]}", found.group(1)


def rename(name: str, source: str, target: str) -> str | None:
    """A tensor's name in format `target`, given that in `source`; None if `source` has no such name."""
    pattern, layer = _split(name)
    row = _ROWS[source].get(pattern)
    return None if row is None else getattr(row, target).format(layer) + ".weight"


def layout_of(names: Iterable[str]) -> str | None:
    """The format in which most of these are names of tensors; None if in none of them any is."""
    patterns = [_split(name)[0] for name in names]
    count = {fmt: sum(p in _ROWS[fmt] for p in patterns) for fmt in FORMATS}
    best = max(count, key=lambda fmt: count[fmt])
    return best if count[best] else None


def expected(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Mistral's name and the shape of every tensor of a model, in the order of the forward pass.

    With tied embeddings `output.weight` is among them: it is the same tensor as the embedding.
    """
    size = {
        "D": args.dim,
        "V": args.vocab_size,
        "F": args.hidden_dim,
        "HK": args.n_heads * args.head_dim,
        "GK": args.n_kv_heads * args.head_dim,
    }
    layer_rows = [row for row in TABLE if "{}" in row.mistral]
    yield EMBEDDING, (size["V"], size["D"])
    for layer in range(args.n_layers):
        for row in layer_rows:
            yield row.mistral.format(layer) + ".weight", tuple(size[s] for s in row.shape)
    for row in TABLE[-2:]:
        yield f"{row.mistral}.weight", tuple(size[s] for s in row.shape)


def rotated_heads(name: str, args: ModelArgs) -> int | None:
    """How many heads' rows the tensor of this (Mistral) name holds, if it is rotated: wq H, wk G."""
    if ".attention.wq." in name:
        return args.n_heads
    return args.n_kv_heads if ".attention.wk." in name else None


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * K, ...) from Mistral's interleaved order to Hugging Face's: a new tensor."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * K, ...) from Hugging Face's half-split order to Mistral's: a new tensor."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
