"""Recording and steering of single requests within the running batch.

    llm.generate(prompts, record=["residual", ("attention", 3)], steer=[Steering(3, vector, scale=4)])

A step with such a request runs a watched model (activations/watched.py), which shows each request its own rows
only; the results of the other rows keep their bits. Without one, a step is as if this module were not there.

Each position is recorded once, however it was computed: prefill in chunks, rejected draft tokens and recomputation
after a preemption overwrite what was there. An error within a request's watchers ends that request alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..activations.edits import Steer, checked_positions
from ..activations.keys import Keys
from ..activations.points import POINTS, Place, place_of, places_of
from ..activations.tape import Tape
from ..activations.watched import Part, Taps, Watched, Watcher
from ..attention import visible
from ..cache import Cache, KeysAndValues, Memory
from ..cache.entries import compressed, expanded
from ..errors import InterpretError
from ..model import Mistral7B, ModelArgs
from .batch import PagedBatch
from .parallel import check_alone

if TYPE_CHECKING:
    from .in_flight import Plan

Name = str | tuple[str, int]  # a point in all layers, or in one


@dataclass(frozen=True)
class Steering:
    """Adds scale * vector (D,) to a request's residual stream after a layer.

    `vector` is a tensor or a list of numbers. `positions` are those of the request's tokens concerned: numbers, or
    a slice, which may be without an end; None: all.
    """

    layer: int
    vector: Tensor | Sequence[float]
    scale: float = 1.0
    positions: Sequence[int] | slice | None = None


class Watching:
    """The watchers of one request: its steering, then its recording."""

    def __init__(self, steers: Sequence[Steer], recording: PositionRecorder | None, key: str | None) -> None:
        self.watchers: list[Watcher] = [*steers, *([] if recording is None else [recording])]
        self.recording, self.key = recording, key  # the key is that of its steering, None without
        self.error: Exception | None = None

    def wants(self, point: str, layer: int | None) -> bool:
        return self.error is None and any(w.wants(point, layer) for w in self.watchers)

    def see(self, point: str, layer: int | None, x: Tensor, positions: Tensor) -> Tensor:
        try:
            for i, w in enumerate(self.watchers):  # the steering ones first, as in the request
                with nullcontext() if w is self.recording else _named(f"steer[{i}]"):
                    x = w.see(point, layer, x, positions) if w.wants(point, layer) else x
        except Exception as e:
            self.error = e
        return x

    def check(self) -> None:
        """Raise the error of the request's own watchers, if there was one."""
        if self.error is not None:
            raise self.error


class PositionRecorder:
    """Keeps a request's activations by position."""

    def __init__(self, places: Sequence[Place], n_layers: int) -> None:
        self.n_layers = n_layers
        self.runs: dict[Place, list[tuple[int, Tensor]]] = {place: [] for place in places}

    def wants(self, point: str, layer: int | None) -> bool:
        return (point, layer) in self.runs

    def see(self, point: str, layer: int | None, x: Tensor, positions: Tensor) -> Tensor:
        runs, start = self.runs[point, layer], int(positions[0])
        runs[:] = [run for run in runs if run[0] < start or run[0] + len(run[1]) > start + len(x)]
        runs.append((start, x.clone()))  # a copy, because x is a view of the whole step's
        return x

    def nbytes(self, length: int, args: ModelArgs, dtype: torch.dtype) -> int:
        """The size of a tape of `length` positions of a model of these arguments and this type."""
        numbers = {
            "B": 1, "T": length, "S": length, "D": args.dim, "H": args.n_heads, "G": args.n_kv_heads,
            "K": args.head_dim, "F": args.hidden_dim,
        }  # fmt: skip
        total = 0
        for point, _ in self.runs:
            size = 4 if point == "attention" else dtype.itemsize
            total += size * math.prod(numbers[letter] for letter in POINTS[point].shape.split())
        return total

    def tape(self, length: int) -> Tape:
        """The activations of the first `length` positions, as far as they were computed, on the CPU."""
        tape = Tape(list(self.runs), self.n_layers)
        for (point, layer), runs in self.runs.items():
            if not runs or length < 1:
                continue
            T = min(length, max(start + len(x) for start, x in runs))
            last = runs[-1][1]
            out = last.new_zeros(T, *last.shape[1:-1], T if point == "attention" else last.shape[-1], device="cpu")
            for start, x in runs:
                rows = x[: max(0, T - start), ..., : out.shape[-1]]
                out[start : start + len(rows), ..., : rows.shape[-1]] = rows
                out[start : start + len(rows), ..., rows.shape[-1] :] = 0
            tape.kept[point, layer].append(out)
        return tape


def watching_of(
    record: Name | Sequence[Name] | None, steer: Steering | Sequence[Steering] | None, args: ModelArgs, n: int
) -> Watching | None:
    """The watchers of a request with n completions; None if it has none. InterpretError for what cannot be."""
    steers, key = [], hashlib.sha256()
    with _named("record"):
        recording = _recording(record, args.n_layers, n) if record else None
    if steer is not None and not isinstance(steer, (Steering, list, tuple)):
        raise InterpretError(f"steer takes a Steering, or a list of them, not {steer!r:.80}", field="steer")
    for i, one in enumerate([steer] if isinstance(steer, Steering) else steer or ()):
        with _named(f"steer[{i}]"):
            if not isinstance(one, Steering):
                raise InterpretError(f"steer takes Steering(layer, vector), not {one!r:.80}")
            layer = place_of("residual", one.layer, args.n_layers)[1]
            assert layer is not None
            positions = checked_positions(one.positions, end=False)
            steers.append(Steer(layer, _vector(one.vector), args.dim, one.scale, positions))
        key.update(repr((layer, positions)).encode() + steers[-1].added.double().cpu().numpy().tobytes())
    if recording is None and not steers:
        return None
    check_alone("steer" if steers else "record", InterpretError)
    return Watching(steers, recording, key.hexdigest() if steers else None)


def _vector(vector: object) -> Tensor:
    try:
        return torch.as_tensor(vector)
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise InterpretError(f"a steering vector is a list of numbers ({e})", field="vector") from e


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Errors within name the request's option."""
    try:
        yield
    except InterpretError as e:
        within = f".{e.field}" if e.field and option.startswith("steer") else ""
        raise InterpretError.of(e, field=option + within) from e


def _recording(record: Name | Sequence[Name], n_layers: int, n: int) -> PositionRecorder:
    names = [record] if isinstance(record, (str, tuple)) else record
    if not isinstance(names, (list, set, frozenset)):
        raise InterpretError(f"record takes the name of an activation, or a list of them, not {record!r:.80}")
    places = dict.fromkeys(place for name in names for place in _places(name, n_layers))
    if ("logits", None) in places:
        raise InterpretError("a request does not record logits", hint="use logprobs and prompt_logprobs")
    if n > 1:
        raise InterpretError(f"a request that records has one completion, not {n}", hint="send several requests")
    return PositionRecorder(list(places), n_layers)


def _places(name: Name, n_layers: int) -> list[Place]:
    if isinstance(name, tuple) and len(name) == 2:
        return [place_of(*name, n_layers)]
    return places_of([name], None, n_layers)


def watched(model: Mistral7B, plan: Plan, batch: PagedBatch) -> Mistral7B:
    """The model to run a step with: the model itself, unless a request of the plan records or steers."""
    if all(s.request.watching is None for s, _ in plan):
        return model
    parts, which, start = [], [], 0
    for i, (s, n) in enumerate(plan):
        if s.request.watching is not None:
            parts.append(Part(slice(start, start + n), [s.request.watching]))
            which.append(i)
        start += n
    return Watched(model, Taps(parts), PagedKeys(batch, which))


class PagedKeys:
    """Reads the keys of sequences in pages; part number j is sequence which[j] of the batch."""

    def __init__(self, batch: PagedBatch, which: Sequence[int]) -> None:
        self.batch, self.which = batch, which

    def before(self, cache: Cache) -> None:
        pass

    def after(self, positions: Tensor, sequence_ids: Tensor | None) -> None:
        pass

    def read(self, memory: Memory, k: Tensor, v: Tensor, part: int) -> Keys:
        assert isinstance(memory, KeysAndValues)
        batch, i = self.batch, self.which[part]
        start, before, n = batch.runs[i]
        p, size = torch.arange(start - before, start + n, device=k.device), batch.pool.page
        rows = batch.table[i, p[:before] // size] * size + p[:before] % size
        new, held = compressed(k, v, batch.pool.int8), [t.flatten(0, 1)[rows] for t in memory.entries]
        k, v = expanded(tuple(torch.cat(pair) for pair in zip(held, new, strict=True)), k.dtype)
        return Keys(k, v, p, visible(p[before:], p, batch.window))
