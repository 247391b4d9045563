"""Recording, patching and steering of a model's calls within a `with` block.

Contexts nest. Edits apply in the order in which they were entered, and recordings see the result: a tape holds
what the model went on with. They concern only the calls of their own thread (or task), so another thread can use
the model meanwhile. After the last one, the model is exactly as before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

from ..activations.edits import Edit, Steer, Value, checked_positions
from ..activations.points import POINTS, Place, place_of, places_of
from ..activations.recorder import Recorder
from ..activations.tape import Tape
from ..activations.watched import Part, Taps, Watched, Watcher
from ..cache import Cache
from ..errors import InterpretError
from ..model import Mistral7B

Key = str | tuple[str, int | None]
Positions = int | Sequence[int] | slice | None


@contextmanager
def record(model: Mistral7B, *points: str, layers: Sequence[int] | None = None) -> Iterator[Tape]:
    """Keep activations of the model's calls within, by name: all points if none is named.

    points   names of activations/points.py, or TransformerLens's, which may contain the layer
    layers   of the points without a layer in their name; None: all

    The tape keeps what was asked for and nothing else; it can be read within and after. InterpretError for an
    unknown name or layer.
    """
    tape = Tape(places_of(points, layers, model.args.n_layers), model.args.n_layers)
    with watching(model, tape):
        yield tape


@contextmanager
def patch(
    model: Mistral7B,
    values: Mapping[Any, Value],
    *,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
) -> Iterator[None]:
    """Replace activations in the model's calls within.

    values      by (point, layer), or by TransformerLens's name: a tensor, a number, or a function of the
                activation. It is broadcast to the selected part: (B, P, D), or (B, P, heads, K); attention weights
                are (B, P, heads, S) here, and are used as given: they need not sum to 1.
    positions   absolute positions to replace: numbers, or a slice with an end; None: all
    heads       numbers of heads, for points with heads; None: all

    A function gets the selected part, (rows, ...) with positions. InterpretError for an unknown place, and in the
    call for a value that does not fit.
    """
    if not isinstance(values, Mapping):
        raise InterpretError(f"patch takes a mapping of places to values, not {values!r:.80}", field="values")
    n_layers, places = model.args.n_layers, dict[Place, Value]()
    for key, value in values.items():
        name, layer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        places[place_of(name, layer, n_layers)] = value
    if heads is not None:
        heads = _heads((heads,) if isinstance(heads, int) else heads, places, model)
    chosen = checked_positions(positions)
    assert not isinstance(chosen, slice)
    with watching(model, Edit(places, chosen, heads)):
        yield


@contextmanager
def steer(
    model: Mistral7B, layer: int, vector: Tensor, *, scale: float = 1.0, positions: Positions = None
) -> Iterator[None]:
    """Add scale * vector (D,) to the residual stream after `layer`, in the model's calls within.

    `positions` as in `patch`, or a slice without an end. InterpretError for a layer that is not there, a vector
    of another size or with values that are not finite.
    """
    _, number = place_of("residual", layer, model.args.n_layers)
    assert number is not None
    places = checked_positions(positions, end=False)
    with watching(model, Steer(number, vector, model.args.dim, scale, places)):
        yield


def _heads(heads: Sequence[int], places: Mapping[Place, Value], model: Mistral7B) -> list[int]:
    for point, _ in places:
        if not POINTS[point].heads:
            raise InterpretError(f"{point!r} has no heads", field="heads")
        held = model.args.n_heads if "H" in POINTS[point].shape else model.args.n_kv_heads
        if wrong := [h for h in heads if type(h) is not int or not 0 <= h < held]:
            raise InterpretError(f"{point!r} has heads 0 to {held - 1}, not {wrong[0]!r}", field="heads")
    return list(heads)


# ---------------------------------------------------------------------- around a model

_entered: ContextVar[tuple[tuple[Mistral7B, Watcher, Taps], ...]] = ContextVar("entered", default=())
_lock = threading.Lock()
_contexts: dict[Mistral7B, int] = {}  # open contexts of each model, in all threads


@contextmanager
def watching(model: Mistral7B, watcher: Watcher) -> Iterator[None]:
    """Show the activations of this model's calls within, in this thread, to a watcher."""
    watchers = sorted(
        [*(w for m, w, _ in _entered.get() if m is model), watcher], key=lambda w: isinstance(w, Recorder)
    )
    token = _entered.set((*_entered.get(), (model, watcher, Taps([Part(..., watchers)]))))
    try:
        with _lock:
            if model not in _contexts:
                model.hidden = partial(_hidden, model)  # type: ignore[method-assign]
                model.logits = partial(_logits, model)  # type: ignore[method-assign]
            _contexts[model] = _contexts.get(model, 0) + 1
        yield
    finally:
        _entered.reset(token)
        with _lock:
            _contexts[model] -= 1
            if not _contexts[model]:
                del _contexts[model], model.hidden, model.logits


def _taps(model: Mistral7B) -> Taps | None:
    """The taps of this thread's innermost context of the model."""
    return next((taps for m, _, taps in reversed(_entered.get()) if m is model), None)


def _hidden(model: Mistral7B, tokens: Tensor, cache: Cache, sequence_ids: Tensor | None = None) -> Tensor:
    taps = _taps(model)
    if taps is None:
        return type(model).hidden(model, tokens, cache, sequence_ids)
    return Watched(model, taps).hidden(tokens, cache, sequence_ids)


def _logits(model: Mistral7B, hidden: Tensor) -> Tensor:
    taps, logits = _taps(model), type(model).logits(model, hidden)
    return logits if taps is None else taps.see("logits", None, logits)
