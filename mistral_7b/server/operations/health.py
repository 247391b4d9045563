"""GET /health/live and /health/ready: liveness and readiness probes; /ping and /version, as in vLLM."""

from __future__ import annotations

from fastapi import APIRouter, Response

from ... import __version__
from ..http.json_bodies import json_answer
from ..openai.answers import Health, Version, documented
from ..state import State


def router(state: State) -> APIRouter:
    """The routes; /health is an alias of /health/ready."""
    routes = APIRouter(tags=["operations"])

    answers = {**documented(answer=Health), 503: {"model": Health}}

    @routes.get("/health/live", responses=answers)
    async def live() -> Response:
        """Liveness: 200, or 503 after an engine failure, when only a restart helps."""
        if state.llm.broken is not None:
            return json_answer({"status": "broken"}, 503)
        return json_answer({"status": "live"})

    @routes.get("/health", responses=answers)
    @routes.get("/health/ready", responses=answers)
    async def ready() -> Response:
        """Readiness: 200, or 503 once a signal has come to shut down and after an engine failure."""
        if state.llm.broken is not None:
            return json_answer({"status": "broken"}, 503)
        if state.stopping:
            return json_answer({"status": "draining"}, 503, {"retry-after": "5"})
        return json_answer({"status": "ready"})

    @routes.get("/ping", responses=answers)
    @routes.post("/ping", responses=answers)
    async def ping() -> Response:
        """Readiness, by the name that SageMaker uses."""
        return await ready()

    @routes.get("/version", responses=documented(answer=Version))
    async def version() -> Version:
        """The version of this package."""
        return {"version": __version__}

    return routes
