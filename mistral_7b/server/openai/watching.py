"""Fields `record` and `steer`: this server's own, for requests with an admin key. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictFloat, StrictInt

from .body import Body, First

MOST_NAMES = 1024
MOST_STEERS = 64
WIDEST = 1 << 16  # numbers of a vector

Position = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class SteerVector(Body):
    """Adds scale * vector to the residual stream after a layer, at positions start <= p < stop."""

    layer: Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)]
    vector: Annotated[list[StrictFloat], First(), Field(min_length=1, max_length=WIDEST)]
    scale: StrictFloat = 1.0
    start: Position = 0
    stop: Position | None = None


class Watching(Body):
    """`record` names activations, in all layers ("residual") or in one ("residual.3")."""

    record: Annotated[list[str], First(), Field(min_length=1, max_length=MOST_NAMES)] | None = None
    steer: Annotated[list[SteerVector], First(), Field(min_length=1, max_length=MOST_STEERS)] | None = None

    @property
    def watches(self) -> str | None:
        """The first field that needs an admin key; None without one."""
        return next((name for name in ("record", "steer") if getattr(self, name) is not None), None)
