"""JSON bodies: strict parsing of requests, and JSON responses."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.routing import APIRoute
from pydantic_core import from_json, to_json

LARGE = 1 << 16  # bytes: a body of this size takes milliseconds to parse, and as long again to validate


class _JsonRequest(HttpRequest):
    """A request with strict JSON parsing: UTF-8 only, no NaN, no lone surrogates, limited nesting depth."""

    async def json(self) -> Any:
        try:
            body = await self.body()
            data = _parse(body)
        except ValueError as e:
            raise json.JSONDecodeError(str(e), "", 0) from None
        if len(body) > LARGE:
            await asyncio.sleep(0)  # let other tasks run between parsing and validation
        return data


def _parse(body: bytes) -> Any:
    """Parse a body. The garbage collector is off meanwhile: it would scan the growing tree and free nothing."""
    gc_enabled = gc.isenabled()
    gc.disable()
    try:
        return from_json(body, allow_inf_nan=False, cache_strings=False)
    finally:
        if gc_enabled:
            gc.enable()


class JsonRoute(APIRoute):
    """A FastAPI route whose body is parsed by _JsonRequest."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: HttpRequest) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


def json_answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response. `content` is encoded JSON as bytes, or an object to encode."""
    data = content if isinstance(content, bytes) else to_json(content)
    return Response(data, status, headers, "application/json")
