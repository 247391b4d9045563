"""TransformerLens's two calls with its hook names, so that code written for it runs on a Mistral7B.

    logits, cache = run_with_cache(model, tokens)
    cache["blocks.3.attn.hook_pattern"]                  (B, H, T, S)
    logits = run_with_hooks(model, tokens, fwd_hooks=[("blocks.3.hook_resid_post", fn)])

Weights are never folded into others here. So `ln1.hook_normalized` is the norm's output with its weight, which is
what the next matrices read, and unembedding is `model.output` after `model.norm`.
https://transformerlensorg.github.io/TransformerLens
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..activations.points import Place, hook_name, place_of, places_of
from ..activations.tape import Tape
from ..errors import InterpretError
from ..model import Mistral7B
from .contexts import record, watching


class HookPoint(NamedTuple):
    """What a hook function is told of its place."""

    name: str
    number: int | None

    def layer(self) -> int:
        """The layer's number. InterpretError outside the layers."""
        if self.number is None:
            raise InterpretError(f"{self.name} is outside the layers", field="layer")
        return self.number


Name = str | Callable[[str], bool]
Hook = Callable[[Tensor, HookPoint], Tensor | None]


def run_with_cache(
    model: Mistral7B, tokens: Tensor, names_filter: Name | Sequence[str] | None = None
) -> tuple[Tensor, Tape]:
    """Logits (B, T, V) of tokens (B, T), and the activations that `names_filter` names; None: all."""
    names = [hook_name(*place) for place in _matching(model, names_filter or (lambda name: True))]
    with record(model, *names) as tape:
        logits, _ = model(tokens)
    return logits, tape


def run_with_hooks(model: Mistral7B, tokens: Tensor, fwd_hooks: Iterable[tuple[Name, Hook]] = ()) -> Tensor:
    """Logits (B, T, V) of tokens (B, T), with a function called as fn(activation, hook=hook) at each hook.

    What it returns replaces the activation. If that is None, the activation is used with what the function changed
    in place. A hook's name may be a function that picks names, as in TransformerLens.
    """
    hooks: dict[Place, list[Hook]] = {}
    for name, fn in fwd_hooks:
        for place in _matching(model, name):
            hooks.setdefault(place, []).append(fn)
    with watching(model, _Hooks(hooks)):
        return model(tokens)[0]


def _matching(model: Mistral7B, names: Name | Sequence[str]) -> list[Place]:
    """The places that a name, names or a function of names picks. InterpretError for an unknown name."""
    n = model.args.n_layers
    if callable(names):
        return [place for place in places_of((), None, n) if names(hook_name(*place))]
    return [place_of(name, None, n) for name in ([names] if isinstance(names, str) else names)]


class _Hooks:
    """A watcher that calls hook functions, each with a copy of the activation in TransformerLens's shape."""

    def __init__(self, hooks: dict[Place, list[Hook]]) -> None:
        self.hooks = hooks

    def wants(self, point: str, layer: int | None) -> bool:
        return (point, layer) in self.hooks

    def see(self, point: str, layer: int | None, x: Tensor, positions: Tensor) -> Tensor:
        hook = HookPoint(hook_name(point, layer), layer)
        shown = (x.transpose(-3, -2) if point == "attention" else x).clone()
        for fn in self.hooks[point, layer]:
            new = fn(shown, hook=hook)  # type: ignore[call-arg]
            if new is not None and new.shape != shown.shape:
                raise InterpretError(
                    f"{hook.name} is {tuple(shown.shape)}, and its hook returned {tuple(new.shape)}"
                )
            shown = shown if new is None else new.to(shown.dtype)
        return shown.transpose(-3, -2) if point == "attention" else shown
