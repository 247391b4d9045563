"""The table of tensor names in every format, and the row order of wq and wk.

Inside the package every tensor has Mistral's name and layout. Names are translated by this table alone,
when a checkpoint is read or written. Hugging Face rotates element i of a head with element i + K/2
(half-split). Mistral and GGUF rotate neighbours 2i and 2i + 1 (interleaved). The rows of wq and wk, and of
no other tensor, are therefore permuted within each head:

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
    """A kind of tensor: shape, and name without ".weight" in each format ({} is the layer)."""

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

# Rotary frequencies, stored by early converters. They are computed from theta, so they are ignored.
DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope\.freqs|rope_freqs\.weight)")

_LAYER = re.compile(r"\.(0|[1-9]\d*)\.")
_ROWS = {fmt: {getattr(row, fmt): row for row in TABLE} for fmt in FORMATS}


def _split(name: str) -> tuple[str, str]:
    """Return the table's name of a tensor ({} for the layer) and the layer ("" if none)."""
    name, suffix, rest = name.rpartition(".weight")
    if not suffix or rest or "{" in name:
        return "", ""
    found = _LAYER.search(name)
    if found is None:
        return name, ""
    return f"{name[: found.start()]}.{{}}.{name[found.end() :]}", found.group(1)


def rename(name: str, source: str, target: str) -> str | None:
    """Translate a tensor name from format `source` to `target`; None if `source` has no such name."""
    pattern, layer = _split(name)
    row = _ROWS[source].get(pattern)
    return None if row is None else getattr(row, target).format(layer) + ".weight"


def layout_of(names: Iterable[str]) -> str | None:
    """Return the format that knows most of these names; None if no format knows any."""
    patterns = [_split(name)[0] for name in names]
    count = {fmt: sum(p in _ROWS[fmt] for p in patterns) for fmt in FORMATS}
    best = max(count, key=lambda fmt: count[fmt])
    return best if count[best] else None


def expected(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name (Mistral's) and shape of every tensor, in the order of the forward pass.

    `output.weight` is included even when it is tied to the embedding.
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
    """Return the number of heads in a rotated tensor (wq: H, wk: G), None for others."""
    if ".attention.wq." in name:
        return args.n_heads
    return args.n_kv_heads if ".attention.wk." in name else None


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Permute rows (heads * K, ...) from interleaved to half-split; returns a copy."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Permute rows (heads * K, ...) from half-split to interleaved; returns a copy."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
