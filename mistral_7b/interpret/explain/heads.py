"""Attention maps: which tokens each head of each layer reads, in a few megabytes for thousands of tokens.

T tokens · H query heads · G key/value heads · K head width · W window · N layers shown

    weights (T, T) of a head  ->  a map of n x n tiles, each the largest weight in it  (all, if n = T fits)
                              ->  where tiles hold several tokens, also the head's largest weights one by one

Weights come from the recorded queries and keys, by the one visibility rule of attention.py, a block of queries at
a time: all of them would be N H T^2 numbers. They are kept as codes of 8 bits, c = 255 sqrt(w), so that small
weights stay apart; a weight read back is off by at most 0.004.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import visible
from ...cache import Stateless
from ...model import Mistral7B
from ...text.tokenizer import Tokenizer
from ..contexts import record
from .page import Picture, deflate, plotted
from .prompts import Prompt, encode, layers_of, pieces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGET = 2_800_000  # bytes of all parts: 3.7 MB in base64
MAP_SHARE = 0.4  # of the budget, for the maps where they do not hold all weights
BYTES_PER_TILE, BYTES_PER_ENTRY = 0.6, 2.2  # estimates of what deflate leaves
BLOCK = 512  # queries computed at once
LEAST = 0.02  # a smaller weight is never kept one by one: a row has at most 50 that are larger


@dataclass(frozen=True)
class Head:
    """What a head does, averaged over the queries from the second on."""

    first: float  # weight on the first token
    own: float  # weight on the query's own token
    previous: float  # weight on the token before
    distance: float  # mean distance in tokens
    entropy: float  # bits
    threshold: float  # weights from here on are kept one by one; 0: all are kept
    covered: float  # the share of all weight that is kept one by one


@dataclass(frozen=True)
class AttentionMaps(Picture):
    """Attention weights of layers `layers`, made by `attention_maps`."""

    view = "attention"
    title = "Attention"
    figsize = (9.5, 8.0)

    tokens: Sequence[str]
    window: int | None
    n_heads: int
    n_kv_heads: int
    layers: Sequence[int]
    tile: int  # tokens per side of a tile
    heads: Sequence[Sequence[Head]] = field(repr=False)  # [layer][head]
    maps: Sequence[np.ndarray] = field(repr=False)  # per layer (H, n, n) uint8 codes
    packed: Sequence[bytes] = field(repr=False)  # per layer, as the page reads it

    def data(self) -> dict[str, Any]:
        T, W = len(self.tokens), self.window
        rule = "every earlier token" if W is None or W >= T else f"the last {W} tokens, its own included"
        kept = (
            "All weights are in this file, in 8 bits each."
            if self.tile == 1
            else f"A tile of the map covers {self.tile} x {self.tile} tokens and shows the largest weight in it; "
            "the largest weights of each head are kept one by one."
        )
        return {
            "about": f"Each of {T} tokens (rows) reads {rule} (columns). {self.n_heads} query heads share "
            f"{self.n_kv_heads} key/value heads. {kept}",
            "tokens": list(self.tokens),
            "window": W,
            "groups": self.n_kv_heads,
            "layers": list(self.layers),
            "tile": self.tile,
            "heads": [
                [[round(float(x), 4) for x in vars(head).values()] for head in layer] for layer in self.heads
            ],
        }

    def parts(self) -> dict[str, bytes]:
        return {f"layer-{n}": part for n, part in zip(self.layers, self.packed, strict=True)}

    def draw(self, figure: Figure) -> None:
        """All heads of the first layer shown."""
        from matplotlib.colors import PowerNorm

        columns = math.ceil(math.sqrt(self.n_heads))
        rows = math.ceil(self.n_heads / columns)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        n, T = self.maps[0].shape[-1], len(self.tokens)
        few = T <= 24
        for h, ax in enumerate(axes.flat):
            if h >= self.n_heads:
                ax.set_axis_off()
                continue
            weights = np.where(np.tri(n, dtype=bool), (self.maps[0][h] / 255.0) ** 2, np.nan)
            image = ax.imshow(
                weights, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest",
                extent=(0, n * self.tile, n * self.tile, 0),
            )  # fmt: skip
            ax.set_facecolor("0.88")
            ax.set_title(f"head {h}, keys {h * self.n_kv_heads // self.n_heads}", fontsize=8)
            if self.window is not None and self.window < T:
                ax.plot([0, T - self.window], [self.window, T], "--", color="0.35", lw=0.8)
            if few:
                labels = [plotted(t, 10) for t in self.tokens]
                ax.set_xticks(np.arange(T) + 0.5, labels, rotation=90, fontsize=6)
                ax.set_yticks(np.arange(T) + 0.5, labels, fontsize=6)
            else:
                ax.tick_params(labelsize=6)
        figure.suptitle(f"Attention weights of layer {self.layers[0]}: query (row) to key (column)", fontsize=11)
        figure.colorbar(
            image, ax=axes, shrink=0.6, label="weight" if self.tile == 1 else "largest weight in a tile"
        )


@torch.inference_mode()
def attention_maps(
    model: Mistral7B, tokenizer: Tokenizer, prompt: Prompt, *, layers: Sequence[int] | None = None
) -> AttentionMaps:
    """The attention of a prompt in these layers (None: all). Fewer layers leave more room for the weights of each.

    InterpretError for an empty prompt, or a layer that is not there.
    """
    ids = encode(model, tokenizer, prompt)
    chosen = layers_of(model, layers)
    tokens = torch.tensor(ids, device=model.norm.weight.device)
    with record(model, "rotated_q", "rotated_k", layers=chosen) as tape:
        model.hidden(tokens, Stateless(model.args.sliding_window))
    recorded = [(n, tape["rotated_q", n], tape["rotated_k", n]) for n in chosen]
    return pack(pieces(tokenizer, ids), recorded, model.args.sliding_window)


def pack(tokens: Sequence[str], layers: Sequence[tuple[int, Tensor, Tensor]], window: int | None) -> AttentionMaps:
    """The picture of rotated queries (T, H, K) and keys (T, G, K) of each (layer, queries, keys)."""
    _, q, k = layers[0]
    T, H = q.shape[:2]
    share = BUDGET / (len(layers) * H)  # bytes for a head
    n, tile = grid(T, share)
    wanted = 0 if tile == 1 else max(1, int(share * (1 - MAP_SHARE) / BYTES_PER_ENTRY))
    maps, heads, packed = [], [], []
    for _, q, k in layers:
        codes, found, statistics = _measure(q, k, window, n, tile, wanted)
        part, kept = _fit(codes, found, T, share * H)
        maps.append(codes)
        packed.append(part)
        heads.append([
            Head(*numbers, *_coverage(entries, count, T, tile))  # type: ignore[call-arg]
            for numbers, entries, count in zip(statistics, found, kept, strict=True)
        ])  # fmt: skip
    return AttentionMaps(tokens, window, H, k.shape[1], [n for n, _, _ in layers], tile, heads, maps, packed)


def grid(T: int, share: float) -> tuple[int, int]:
    """Tiles per side of a map, and tokens per side of a tile, so that a map takes about `share` bytes."""
    if share >= T * (T + 1) / 2 * BYTES_PER_TILE:
        return T, 1
    widest = max(16, int(math.sqrt(2 * MAP_SHARE * share / BYTES_PER_TILE)))
    tile = max(2, math.ceil(T / widest))
    return math.ceil(T / tile), tile


def weights(q: Tensor, k: Tensor, window: int | None) -> Iterator[tuple[int, Tensor]]:
    """Softmax weights (H, t, stop) of blocks of queries from `start` on, over the keys up to the block's last."""
    T, H, K = q.shape
    k = k.repeat_interleave(H // k.shape[1], 1).float()
    positions = torch.arange(T, device=q.device)
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        scores = torch.einsum("thk,shk->hts", q[start:stop].float(), k[:stop]) / math.sqrt(K)
        mask = visible(positions[start:stop], positions[:stop], window)
        yield start, scores.masked_fill_(~mask, -math.inf).softmax(-1)


Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # queries, keys and weights, the largest weight first


def _measure(
    q: Tensor, k: Tensor, window: int | None, n: int, tile: int, wanted: int
) -> tuple[np.ndarray, list[Entries], list[list[float]]]:
    """Codes (H, n, n) of the map, each head's `wanted` largest weights, and its statistics."""
    T, H = q.shape[:2]
    whole = torch.zeros(H, n * tile, n, device=q.device)
    sums = torch.zeros(H, 5, dtype=torch.float64, device=q.device)
    parts: list[list[Tensor]] = [[] for _ in range(H)]
    for start, block in weights(q, k, window):
        t, s = block.shape[1:]
        wide = F.pad(block, (0, n * tile - s))
        whole[:, start : start + t] = wide if tile == 1 else F.max_pool2d(wide, (1, tile))
        sums += _sums(block, start)
        if wanted:
            for h in range(H):
                rows, keys = (block[h] >= LEAST).nonzero(as_tuple=True)
                values = block[h, rows, keys]
                best = values.topk(min(wanted, len(values))).indices
                parts[h].append(torch.stack([(rows[best] + start).float(), keys[best].float(), values[best]]))
    largest = whole if tile == 1 else F.max_pool2d(whole, (tile, 1))
    found = []
    for part in parts:
        joined = torch.cat(part, 1) if part else torch.zeros(3, 0)
        joined = joined[:, joined[2].argsort(descending=True, stable=True)[:wanted]]
        found.append(tuple(joined.cpu().numpy()))
    return codes_of(largest.cpu().numpy()), found, (sums / max(1, T - 1)).tolist()


def _sums(block: Tensor, start: int) -> Tensor:
    """Sums over the block's queries, but for position 0, (H, 5): weight on the first, own and previous token, mean
    distance, entropy in bits."""
    t, s = block.shape[1:]
    p_q, p_k = torch.arange(start, start + t, device=block.device), torch.arange(s, device=block.device)
    distance = (p_q[:, None] - p_k).float()
    entropy = -torch.special.xlogy(block, block).sum(-1) / math.log(2)
    rows = [
        block[:, :, 0], block.diagonal(start, 1, 2), (block * (distance == 1)).sum(-1), (block * distance).sum(-1),
        entropy,
    ]  # fmt: skip
    return torch.stack([row[:, 1 if start == 0 else 0 :].double().sum(-1) for row in rows], -1)


def codes_of(weights: np.ndarray) -> np.ndarray:
    """Weights from 0 to 1 as codes of 8 bits; a code c stands for (c / 255)^2."""
    return np.rint(255 * np.sqrt(weights)).astype(np.uint8)


def _fit(codes: np.ndarray, found: list[Entries], T: int, most: float) -> tuple[bytes, list[int]]:
    """A layer as the page reads it, in at most `most` bytes, and how many entries of each head that leaves."""
    counts = [len(values) for _, _, values in found]
    while True:
        part = deflate(b"".join(_bytes(c, e, n, T) for c, e, n in zip(codes, found, counts, strict=True)))
        if len(part) <= most or not any(counts):
            return part, counts
        counts = [int(n * min(0.9, most / len(part))) for n in counts]


def _bytes(codes: np.ndarray, entries: Entries, count: int, T: int) -> bytes:
    """A head: the map's lower triangle by rows; then the entries in order of query and key: how many each query
    has, then planes of the distance's low and high byte, and of the weights."""
    triangle = codes[np.tril_indices(len(codes))].tobytes()
    rows, keys, values = (column[:count] for column in entries)
    if len(codes) == T:
        return triangle
    order = np.lexsort((keys, rows))
    rows, distance = rows[order].astype(np.int64), (rows - keys)[order].astype(np.int64)
    per_query = np.bincount(rows, minlength=T).astype(np.uint8)  # at most 1 / LEAST
    planes = (distance & 255, distance >> 8, codes_of(values[order]))
    return triangle + per_query.tobytes() + b"".join(plane.astype(np.uint8).tobytes() for plane in planes)


def _coverage(entries: Entries, count: int, T: int, tile: int) -> tuple[float, float]:
    """The smallest weight that is kept one by one, and the share of all weight."""
    if tile == 1:
        return 0.0, 1.0
    values = entries[2][:count]
    return (float(values[-1]) if count else 1.0), float(values.sum()) / T
