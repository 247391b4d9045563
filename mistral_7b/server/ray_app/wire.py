"""What passes between the server and the engines' replicas, all of it pickled by Ray Serve.

    server    generate(server, job, route)  ---->  replica     a call for each request: the replica's name, silence
    server    listen(server, replica)       <----  replica     a call for each replica: News of all its requests

One message with the news of 32 requests costs as much as one of a single request, some 0.6 ms of CPU time.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch

from ...engine.completion import TextPiece
from ...engine.request import Request
from ...errors import EngineError, Mistral7BError

NAME = 8  # bytes of a page's key by which routes name it
ROUTERS: WeakSet[Any] = WeakSet()  # of this process


class ReplicaLostError(EngineError):
    """A replica that is not there any more, or not the one that was called."""


@dataclass(frozen=True)
class Route:
    """What the router needs of a job: the keys of its prompt's full pages, shortened, and the model's window."""

    pages: tuple[bytes, ...]
    window: int | None
    page: int


def route_of(request: Request, window: int | None, page: int) -> Route:
    """The route of a request; `page` is the number of tokens in a page."""
    first = request.sequences[0]
    keys = (first.key_of(i, page) for i in range((len(request.ids) - 1) // page))
    return Route(tuple(key[:NAME] for key in keys), window, page)


@dataclass(frozen=True)
class News:
    """New pieces of a job, or its end. `facts`: attributes of its Request that are known by now."""

    id: str
    pieces: Sequence[TextPiece] = ()
    facts: dict[str, Any] | None = None
    queue_time: float | None = None
    ended: bool = False
    error: Mistral7BError | None = None


def told_metrics() -> Iterator[tuple[str, list[Any]]]:
    """The name and the metrics of each replica that this process routes to."""
    for router in list(ROUTERS):
        for replica in list(router.curr_replicas.values()):
            if metrics := replica.routing_stats.get("metrics"):
                yield replica.replica_id.unique_id, metrics


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, saved: Any) -> torch.Tensor:
        return torch.empty(saved[0], dtype=saved[1], device="meta")


def without_data(value: object) -> bytes:
    """Pickle a value, such as a model, with the shapes and types of its tensors instead of their data."""
    out = io.BytesIO()
    _Pickler(out).dump(value)
    return out.getvalue()


def on_meta(data: bytes) -> Any:
    """The inverse of `without_data`; the tensors are on the meta device."""
    return _Unpickler(io.BytesIO(data)).load()
