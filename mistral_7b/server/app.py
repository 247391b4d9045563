"""All of it as one application."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from .. import __version__
from ..engine.async_llm import AsyncLLM
from ..errors import ConfigError, Mistral7BError
from . import adapters, anthropic, health, metrics, openai, page, tokens
from .answers import documented
from .config import ServerConfig
from .guard import Guard
from .problems import Refusal, invalid, refusal
from .routes import json_answer
from .state import State

# FastAPI's own spans and logs quote what clients send, and know nothing of models: tracing.py has ours.
OWN_SPANS: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
ROUTERS = (openai, anthropic, tokens, adapters, metrics, health, page)


def build(llm: AsyncLLM, config: ServerConfig | None = None, model_name: str = "mistral-7b") -> FastAPI:
    """The application; its State is `app.state.serving`. ConfigError for a model without a tokenizer."""
    if llm.tokenizer is None:
        raise ConfigError(f"the server needs the model's tokenizer, and {llm.reader.why}")
    state = State(llm, config or ServerConfig(), model_name)
    app = FastAPI(
        title="mistral_7b", version=__version__, docs_url=None, redoc_url=None,  # they load scripts from outside
        openapi_url=None, telemetry=OWN_SPANS,
        responses=documented(400, 401, 403, 404, 408, 413, 429, 500, 503), separate_input_output_schemas=False,
    )  # fmt: skip
    app.state.serving = state
    for room in ROUTERS:
        app.include_router(room.router(state))
    _install_document(app)
    _install_problems(app)
    app.add_middleware(Guard, state=state)
    for route in app.routes:  # FastAPI makes them ready when it first looks at them: not while somebody waits
        route.matches({"type": "http", "method": "GET", "path": "/nowhere", "root_path": "", "headers": []})
    return app


def _install_document(app: FastAPI) -> None:
    """GET /openapi.json, made when it is first asked for, and in a thread: it takes a third of a second."""
    made: list[bytes] = []

    @app.api_route("/openapi.json", methods=["GET", "HEAD"], include_in_schema=False)
    async def document() -> Response:
        if not made:
            made.append(await asyncio.to_thread(lambda: to_json(app.openapi())))
        return json_answer(made[0])


def _install_problems(app: FastAPI) -> None:
    """Every error in one shape. What is unforeseen goes on to the guard, which logs it."""

    def told(request: HttpRequest, why: Refusal) -> Response:
        return json_answer(why.body(request.url.path), why.status, why.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_field(request: HttpRequest, error: RequestValidationError) -> Response:
        return told(request, invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def no_route(request: HttpRequest, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return told(request, Refusal(404, f"there is nothing at {path:.200}", code="no_such_route"))
        if error.status_code == 405:
            why = f"{request.method} is not what {path:.200} takes"
            return told(request, Refusal(405, why, code="method_not_allowed", headers=error.headers))
        return told(request, Refusal(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Mistral7BError)
    async def refused(request: HttpRequest, error: Mistral7BError) -> Response:
        why = refusal(error)
        if why.status >= 500 and why is not error:
            raise error
        return told(request, why)
