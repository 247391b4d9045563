"""The points of a forward pass at which activations can be recorded or changed, in the order of computation.

B sequences · T tokens · D width · H query heads · G key/value heads · K head width · F feed-forward width
S positions up to the last token's · V vocabulary

The point of a layer is ("residual", 3) or "residual.3", or as in TransformerLens "blocks.3.hook_resid_post" or
("resid_post", 3).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import InterpretError


class Point(NamedTuple):
    """A point: the shape of its activation for tokens (B, T), its name in TransformerLens, and what it is."""

    shape: str
    hook: str  # within "blocks.N.", if it is one of each layer
    layered: bool
    meaning: str

    @property
    def full_hook(self) -> str:
        """Its name in TransformerLens, with N for the layer."""
        return f"blocks.N.{self.hook}" if self.layered else self.hook

    @property
    def heads(self) -> bool:
        """Whether the activation has heads, as the dimension after the tokens'."""
        return "H" in self.shape or "G" in self.shape


POINTS = {
    "embedding": Point("B T D", "hook_embed", False, "the tokens' embeddings"),
    "residual_before": Point("B T D", "hook_resid_pre", True, "the residual stream before a layer"),
    "attention_norm": Point("B T D", "ln1.hook_normalized", True, "the norm's output, the input of q, k and v"),
    "q": Point("B T H K", "attn.hook_q", True, "queries, not rotated yet"),
    "k": Point("B T G K", "attn.hook_k", True, "keys, not rotated yet"),
    "v": Point("B T G K", "attn.hook_v", True, "values"),
    "rotated_q": Point("B T H K", "attn.hook_rot_q", True, "queries with the rotary embedding"),
    "rotated_k": Point("B T G K", "attn.hook_rot_k", True, "keys with the rotary embedding"),
    "attention": Point("B H T S", "attn.hook_pattern", True, "softmax weights; column j is position j"),
    "z": Point("B T H K", "attn.hook_z", True, "each head's output, the weights times the values"),
    "attn_out": Point("B T D", "hook_attn_out", True, "what attention adds to the residual stream"),
    "residual_mid": Point("B T D", "hook_resid_mid", True, "the residual stream after attention"),
    "ffn_norm": Point("B T D", "ln2.hook_normalized", True, "the norm's output, the feed-forward's input"),
    "ffn": Point("B T F", "mlp.hook_post", True, "the feed-forward's neurons, silu(w1 x) * w3 x"),
    "ffn_out": Point("B T D", "hook_mlp_out", True, "what the feed-forward adds to the residual stream"),
    "residual": Point("B T D", "hook_resid_post", True, "the residual stream after a layer"),
    "norm": Point("B T D", "ln_final.hook_normalized", False, "the final norm's output"),
    "logits": Point("B T V", "logits", False, "the logits, in float32"),
}
HOOKS = {(point.hook, point.layered): name for name, point in POINTS.items()}
SHORT = {point.hook.rsplit("hook_")[-1]: name for name, point in POINTS.items() if "normalized" not in point.hook}
OUTSIDE = POINTS["embedding"]
Place = tuple[str, int | None]  # a point's name and a layer, None for points outside the layers


def split_name(name: object) -> tuple[str, int | None]:
    """A point's name, and the layer that a name of TransformerLens contains. InterpretError for an unknown one."""
    if isinstance(name, str):
        if name in POINTS or name in SHORT:
            return SHORT.get(name, name), None
        if (found := re.fullmatch(r"(\w+)\.(\d{1,6})", name, re.ASCII)) and POINTS.get(found[1], OUTSIDE).layered:
            return found[1], int(found[2])
        found = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", name, re.ASCII)
        point = HOOKS.get((found[2], True)) if found else HOOKS.get((name, False))
        if point is not None:
            return point, int(found[1]) if found else None
    close = difflib.get_close_matches(str(name)[:200], POINTS, n=1)
    raise InterpretError(
        f"there is no activation {name!r:.200}",
        field="name",
        hint=f"use {close[0]!r}" if close else f"there are {', '.join(POINTS)}",
    )


def hook_name(point: str, layer: int | None) -> str:
    """The name of a place in TransformerLens."""
    return POINTS[point].hook if layer is None else f"blocks.{layer}.{POINTS[point].hook}"


def place_of(name: str, layer: int | None, n_layers: int) -> Place:
    """The place of a point in a model of n_layers; -1 is the last layer. InterpretError if there is none."""
    point, own = split_name(name)
    if own is not None and layer not in (None, own):
        raise InterpretError(f"{name!r} names layer {own}, and layer {layer} was given", field="layer")
    layer = own if layer is None else layer
    if not POINTS[point].layered:
        if layer is not None:
            raise InterpretError(f"{point!r} is outside the layers and takes no layer", field="layer")
        return point, None
    if layer is None:
        raise InterpretError(f"{point!r} needs a layer, 0 to {n_layers - 1}", field="layer")
    if type(layer) is not int or not -n_layers <= layer < n_layers:
        raise InterpretError(f"there is no layer {layer!r}: the model has 0 to {n_layers - 1}", field="layer")
    return point, layer % n_layers


def places_of(names: Sequence[str], layers: Sequence[int] | None, n_layers: int) -> list[Place]:
    """The places of these points, all points if none is named, in these layers (None: all), in order."""
    if layers is not None and not isinstance(layers, Iterable):
        raise InterpretError(f"layers are a list of numbers, not {layers!r:.200}", field="layers")
    found: dict[Place, None] = {}
    for name in names or POINTS:
        point, own = split_name(name)
        if own is not None or not POINTS[point].layered:
            found[place_of(name, None, n_layers)] = None
        else:
            found |= {place_of(name, n, n_layers): None for n in (range(n_layers) if layers is None else layers)}
    return list(found)
