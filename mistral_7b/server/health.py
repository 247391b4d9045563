"""GET /health/live, /health/ready: whether the process can go on, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter, Response

from .answers import Health, documented
from .routes import json_answer
from .state import State


def router(state: State) -> APIRouter:
    """The routes; /health is /health/ready."""
    routes = APIRouter(tags=["operations"])

    answers = {**documented(answer=Health), 503: {"model": Health}}

    @routes.get("/health/live", responses=answers)
    async def live() -> Response:
        """Whether the process is of any use: not after its engine broke, when only a restart helps."""
        if state.llm.broken is not None:
            return json_answer({"status": "broken"}, 503)
        return json_answer({"status": "live"})

    @routes.get("/health", responses=answers)
    @routes.get("/health/ready", responses=answers)
    async def ready() -> Response:
        """Whether requests are taken: not while the server shuts down, nor after its engine broke."""
        if state.llm.broken is not None:
            return json_answer({"status": "broken"}, 503)
        if state.draining:
            return json_answer({"status": "draining"}, 503, {"retry-after": "5"})
        return json_answer({"status": "ready"})

    return routes
