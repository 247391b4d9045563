"""How routes read JSON, and answer it."""

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

LARGE = 1 << 16  # bytes of a body that take milliseconds to read, and as many again to look at


class _JsonRequest(HttpRequest):
    """A request whose JSON is JSON: UTF-8, no NaN, no half characters, no deeper than a parser's stack."""

    async def json(self) -> Any:
        try:
            body = await self.body()
            data = _parsed(body)
        except ValueError as e:
            raise json.JSONDecodeError(f"the body is no JSON: {e}", "", 0) from None
        if len(body) > LARGE:
            await asyncio.sleep(0)  # others have a turn before what was read is looked at
        return data


def _parsed(body: bytes) -> Any:
    """What a body says. While it is read the collector would look through it again and again, and find nothing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return from_json(body, allow_inf_nan=False, cache_strings=False)
    finally:
        if collecting:
            gc.enable()


class JsonRoute(APIRoute):
    """A route whose body is read by _JsonRequest."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: HttpRequest) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


def json_answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A body that is JSON already or becomes it."""
    data = content if isinstance(content, bytes) else to_json(content)
    return Response(data, status, headers, "application/json")
