"""Run several models over tokens together, layer by layer: one block of one model is in memory at a time.

The hidden states of all are kept, so that their distance is measured after each half of each block. A probe runs a
block of the first model on that model's own input with other settings: what a setting does is then not mixed with
what came before.

R rows · T tokens · D width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...cache import Stateless
from ...checkpoint.names import EMBEDDING, OUTPUT
from ...model import ModelArgs, RMSNorm, Rope, TransformerBlock, rope_phases
from .figures import Figures
from .sides import Side

ROWS = 256  # logits at a time
Progress = Callable[[int, int, str], None]  # blocks done, of all, and what is next


class Stream(NamedTuple):
    """A model and the tokens (R, T) that it runs on; with `logits` (R, T, V) of another engine, it is not run.

    states    the engine's hidden states (R, T, D), after the embedding and after each half of each layer; or none
    """

    side: Side
    tokens: Tensor
    logits: Tensor | None = None
    states: Sequence[Tensor] = ()


class Pair(NamedTuple):
    """Two streams that are compared, by number, at their last `width` positions; None: all that both have."""

    a: int
    b: int
    width: int | None = None


class Place(NamedTuple):
    """A point in the forward pass, and the error there relative to the size of the first model's states."""

    module: str
    error: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a run found: figures and growth of each pair, and the largest effect of each probe."""

    figures: list[Figures]
    growth: list[list[Place]]
    effects: Mapping[str, Place]


@torch.inference_mode()
def run(
    streams: Sequence[Stream],
    pairs: Sequence[Pair],
    probes: Mapping[str, ModelArgs] | None = None,
    progress: Progress = lambda done, total, name: None,
) -> Trace:
    """Run all streams, those with logits last; `probes` are other settings of the first stream, by name."""
    computed = [stream for stream in streams if stream.logits is None]
    given = [stream.states for stream in streams if stream.logits is not None]
    settings = [settings_of(stream.side.args, stream.tokens) for stream in computed]
    probed = {name: (args, *settings_of(args, streams[0].tokens)) for name, args in (probes or {}).items()}
    growth: list[list[Place]] = [[] for _ in pairs]
    effects = {name: Place("", 0.0) for name in probed}
    states: list[Tensor] = []
    for side, numbers in _by_side(computed):
        table = side.weight(EMBEDDING)
        states += [table[streams[n].tokens] for n in numbers]
        del table
        side.release(EMBEDDING)
    _measure(growth, pairs, [*states, *_at(given, 0)], "tok_embeddings")
    n_layers = streams[0].side.args.n_layers
    for layer in range(n_layers):
        progress(layer, n_layers + 1, f"layers.{layer}")
        middle: list[Tensor] = []
        after: list[Tensor] = []
        for side, numbers in _by_side(computed):
            block = block_of(side, layer)
            for n in numbers:
                if n == 0:
                    _probe(effects, probed, block, states[0], settings[0], layer)
                x = states[n] + block.attention(block.attention_norm(states[n]), *settings[n])
                middle.append(x)
                after.append(x + block.feed_forward(block.ffn_norm(x)))
            for key in block.state_dict():
                side.release(f"layers.{layer}.{key}")
            del block
        _measure(growth, pairs, [*middle, *_at(given, 2 * layer + 1)], f"layers.{layer}.attention")
        _measure(growth, pairs, [*after, *_at(given, 2 * layer + 2)], f"layers.{layer}.feed_forward")
        states = after
    progress(n_layers, n_layers + 1, "output")
    states += [stream.logits for stream in streams if stream.logits is not None]
    figures = [_compare(streams[pair.a], streams[pair.b], states[pair.a], states[pair.b], pair) for pair in pairs]
    return Trace(figures, growth, effects)


def settings_of(args: ModelArgs, tokens: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Rope, Stateless]:
    """The rotary phases and the memory of a forward without a cache."""
    memory = Stateless(args.sliding_window)
    return rope_phases(memory.extend(tokens), args, dtype), memory


def _by_side(streams: Sequence[Stream]) -> list[tuple[Side, list[int]]]:
    """The streams' numbers by model; those of a model must be neighbours."""
    out: list[tuple[Side, list[int]]] = []
    for n, stream in enumerate(streams):
        if out and out[-1][0] is stream.side:
            out[-1][1].append(n)
        else:
            out.append((stream.side, [n]))
    return out


def block_of(side: Side, layer: int) -> TransformerBlock:
    """A block of a side, in float32."""
    block = TransformerBlock(side.args, dtype=torch.float32, device="meta")
    weights = {key: side.weight(f"layers.{layer}.{key}") for key in block.state_dict()}
    block.load_state_dict(weights, assign=True)
    return block


def _probe(
    effects: dict[str, Place],
    probed: Mapping[str, tuple[ModelArgs, Rope, Stateless]],
    block: TransformerBlock,
    x: Tensor,
    settings: tuple[Rope, Stateless],
    layer: int,
) -> None:
    """Note the largest effect of each probe on the attention of a block."""
    if not probed:
        return
    wanted = block.attention(block.attention_norm(x), *settings)
    for name, (args, rope, memory) in probed.items():
        eps = block.attention_norm.eps
        block.attention_norm.eps = args.norm_eps
        error = _relative(wanted, block.attention(block.attention_norm(x), rope, memory))
        block.attention_norm.eps = eps
        if error > effects[name].error:
            effects[name] = Place(f"layers.{layer}.attention", error)


def _at(given: Sequence[Sequence[Tensor]], n: int) -> list[Tensor]:
    """The n-th states of the engines that have any."""
    return [states[n] for states in given if states]


def _measure(growth: list[list[Place]], pairs: Sequence[Pair], states: Sequence[Tensor], module: str) -> None:
    for places, pair in zip(growth, pairs, strict=True):
        if pair.b >= len(states):  # logits only
            continue
        a, b = _aligned(states[pair.a], states[pair.b], pair)
        places.append(Place(module, _relative(a, b)))


def _aligned(a: Tensor, b: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """The positions (R, T, ...) that are compared: rows that differ in their beginnings have equal ends."""
    width = pair.width or min(a.shape[1], b.shape[1])
    return a[:, -width:], b[:, -width:]


def _relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a|; infinity where b is not finite."""
    error = ((a - b).norm() / a.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def _compare(one: Stream, other: Stream, a: Tensor, b: Tensor, pair: Pair) -> Figures:
    """The figures of two streams from their last states; the last token of a row has no target."""
    heads = [_head(stream.side) if stream.logits is None else nn.Identity() for stream in (one, other)]
    a, b = _aligned(a, b, pair)
    figures = Figures()
    if pair.width is not None:  # no text, but the choice of the next token
        logits = [head(x.flatten(0, 1)) for head, x in zip(heads, (a, b), strict=True)]
        figures.add(logits[0], logits[1], logits[0].argmax(-1))
        return figures
    targets = one.tokens[:, -a.shape[1] :][:, 1:].flatten()
    places = (t[:, :-1].flatten(0, 1).split(ROWS) for t in (a, b))
    for x, y, wanted in zip(*places, targets.split(ROWS), strict=True):
        figures.add(heads[0](x), heads[1](y), wanted)
    return figures


def _head(side: Side) -> nn.Module:
    args = side.args
    norm = RMSNorm(args.dim, args.norm_eps, dtype=torch.float32, device="meta")
    output = nn.Linear(args.dim, args.vocab_size, bias=False, dtype=torch.float32, device="meta")
    norm.load_state_dict({"weight": side.weight("norm.weight")}, assign=True)
    output.load_state_dict({"weight": side.weight(OUTPUT)}, assign=True)
    side.release("norm.weight")
    side.release(OUTPUT)
    return nn.Sequential(norm, output)
