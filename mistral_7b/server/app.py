"""Builds the FastAPI application: routers, error handlers, middleware."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from .. import __version__
from ..engine.async_llm import AsyncLLM
from ..errors import ConfigError, Mistral7BError
from . import page
from .anthropic import messages as anthropic
from .config import ServerConfig
from .http.errors import HttpError, refusal
from .http.guard import Guard
from .http.json_bodies import json_answer
from .http.validation import invalid
from .ollama import router as ollama
from .openai import router as openai
from .openai import tokens
from .openai.answers import documented
from .operations import adapters, health, metrics
from .state import State

# FastAPI's own spans and logs quote request data and lack the model's attributes; tracing.py replaces them.
FASTAPI_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
ROUTERS = (openai, anthropic, ollama, tokens, adapters, metrics, health, page)


def build(llm: AsyncLLM, config: ServerConfig | None = None, model_name: str = "mistral-7b") -> FastAPI:
    """Return the application; its State is `app.state.serving`.

    Raises ConfigError for a model without a tokenizer.
    """
    if llm.tokenizer is None:
        raise ConfigError(f"the server needs the model's tokenizer: {llm.inputs.tokenizer_error}")
    state = State(llm, config or ServerConfig(), model_name)
    app = FastAPI(
        title="mistral_7b", version=__version__, docs_url=None, redoc_url=None,  # both load scripts from a CDN
        openapi_url=None, redirect_slashes=False, telemetry=FASTAPI_TELEMETRY,
        responses=documented(400, 401, 403, 404, 408, 413, 429, 500, 503), separate_input_output_schemas=False,
    )  # fmt: skip
    app.state.serving = state
    for module in ROUTERS:
        app.include_router(module.router(state))
    _install_openapi(app)
    _install_error_handlers(app)
    app.add_middleware(Guard, state=state)
    _answer_head(app)
    for route in app.routes:  # FastAPI prepares a route at its first match: do it now, not during a request
        route.matches({"type": "http", "method": "GET", "path": "/nowhere", "root_path": "", "headers": []})
    return app


def _answer_head(app: FastAPI) -> None:
    """Add HEAD to every route with GET; uvicorn leaves out the body. The OpenAPI schema does not list them."""
    for route in list(iter_route_contexts(app.routes)):
        if route.path is None or route.endpoint is None:
            continue
        if "GET" in (route.methods or ()) and "HEAD" not in (route.methods or ()):
            # Not by add_api_route, which would give it the application's documented answers.
            head = APIRoute(
                route.path, route.endpoint, methods=["HEAD"], include_in_schema=False, response_model=None
            )
            app.router.routes.append(head)


def _install_openapi(app: FastAPI) -> None:
    """Add GET /openapi.json.

    The schema takes a third of a second: it is built at the first request, on a worker thread, and cached.
    """
    cache: list[bytes] = []

    @app.api_route("/openapi.json", methods=["GET", "HEAD"], include_in_schema=False)
    async def openapi() -> Response:
        if not cache:
            cache.append(await asyncio.to_thread(lambda: to_json(app.openapi())))
        return json_answer(cache[0])


def _install_error_handlers(app: FastAPI) -> None:
    """Return every error in one JSON shape. Unexpected errors propagate to the guard, which logs them."""

    def respond(request: HttpRequest, why: HttpError) -> Response:
        return json_answer(why.body(request.url.path), why.status, why.headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: HttpRequest, error: RequestValidationError) -> Response:
        return respond(request, invalid(error.errors(), error.body, request.headers.get("content-type")))

    @app.exception_handler(HTTPException)
    async def http_exception(request: HttpRequest, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return respond(request, HttpError(404, f"there is no route {path:.200}", code="no_such_route"))
        if error.status_code == 405:
            why = f"{path:.200} does not allow the method {request.method}"
            return respond(request, HttpError(405, why, code="method_not_allowed", headers=error.headers))
        return respond(request, HttpError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Mistral7BError)
    async def package_error(request: HttpRequest, error: Mistral7BError) -> Response:
        why = refusal(error)
        if why.status >= 500 and why is not error:
            raise error
        return respond(request, why)
