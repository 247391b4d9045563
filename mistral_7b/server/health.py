"""GET /health/live, /health/ready: whether the process runs, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter, Response

from .answers import Health, documented
from .routes import json_answer
from .state import State


def router(state: State) -> APIRouter:
    """The routes; /health is /health/ready."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/health/live", responses=documented(answer=Health))
    async def live() -> Health:
        """Always, as long as there is somebody to answer."""
        return {"status": "live"}

    @routes.get("/health", responses={**documented(answer=Health), 503: {"model": Health}})
    @routes.get("/health/ready", responses={**documented(answer=Health), 503: {"model": Health}})
    async def ready() -> Response:
        """Whether requests are taken: not while the server shuts down, nor after its engine broke."""
        if state.llm.broken is not None:
            return json_answer({"status": "broken"}, 503)
        if state.draining:
            return json_answer({"status": "draining"}, 503, {"retry-after": "5"})
        return json_answer({"status": "ready"})

    return routes
