"""What the routes of Ollama's API share: bodies of any content type, documented errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response

from ..http.json_bodies import JsonRoute
from .answers import ErrorAnswer

STATUSES = (400, 401, 403, 404, 408, 413, 422, 429, 500, 503, 504)


class OllamaRoute(JsonRoute):
    """A route that reads its body as JSON, whatever its content-type says: Ollama's own examples send none."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_any(request: HttpRequest) -> Response:
            others = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
            request.scope["headers"] = [*others, (b"content-type", b"application/json")]
            return await handle(HttpRequest(request.scope, request.receive))

        return handle_any


def documented(answer: Any, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route: its success model and the errors."""
    out: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer} for status in STATUSES}
    out[200] = {"model": answer}
    if stream:
        out[200]["content"] = {"application/x-ndjson": {"schema": {"type": "string"}}}
    return out
