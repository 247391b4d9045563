"""POST /v1/messages and /v1/messages/count_tokens, for clients of Anthropic's Messages API.

What is sent is read in anthropic_wire.py, what is answered made in anthropic_events.py.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine.reading import Asked
from ..engine.request import Request
from ..errors import GenerationError
from . import anthropic_wire as wire
from .answers import documented
from .anthropic_events import Answer, CountAnswer, MessageAnswer
from .routes import JsonRoute, json_answer
from .sse import event_stream, frame
from .state import State, answer, left, read

ERRORS = (400, 404, 422, 429, 500, 503, 504)


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Anthropic"], route_class=JsonRoute)

    @routes.post("/v1/messages", responses=documented(*ERRORS, answer=MessageAnswer, stream=True))
    async def messages(http_request: HttpRequest, asked: wire.MessagesRequest) -> Response:
        """Answer a conversation, as Anthropic's Messages API does."""
        adapter = state.adapter(asked.model)
        make = partial(_request, state, asked, adapter, left(http_request))
        request = await read(state, make, "messages")
        told = Answer(f"msg_{uuid.uuid4().hex}", asked.model or state.model_name, wire.most_calls(asked))
        if asked.stream:
            return await event_stream(_events(state, http_request, request, told))
        async with aclosing(answer(state, http_request, request)) as pieces:
            async for piece in pieces:
                for _ in told.take(piece):
                    pass
                if told.full:
                    break
        return json_answer(told.message(len(request.ids), request.cached or 0))

    @routes.post("/v1/messages/count_tokens", responses=documented(*ERRORS, answer=CountAnswer))
    async def count_tokens(asked: wire.CountRequest) -> Response:
        """How many tokens a conversation has, in this model's own template."""
        state.adapter(asked.model)
        return json_answer({"input_tokens": await asyncio.to_thread(_count, state, asked)})

    return routes


def _request(
    state: State, asked: wire.MessagesRequest, adapter: str | None, gone: threading.Event | None
) -> Request:
    """The engine's request; errors name a message by its place in the client's own."""
    talk = wire.conversation(asked)
    return state.llm.reader.chat(
        talk.messages, asked.params(), Asked(adapter=adapter, gone=gone), tools=wire.offered(asked),
        tool_choice=wire.chosen(asked), parallel=wire.most_calls(asked) is None, labels=talk.labels,
    )  # fmt: skip


def _count(state: State, asked: wire.CountRequest) -> int:
    if state.llm.tokenizer is None:
        raise GenerationError("this model has no tokenizer: it cannot count tokens")
    talk = wire.conversation(asked)
    return len(state.llm.tokenizer.encode_chat(talk.messages, wire.offered(asked), talk.labels))


async def _events(
    state: State, http_request: HttpRequest, request: Request, told: Answer
) -> AsyncGenerator[bytes, None]:
    """The answer's events on the wire. The first comes with the first token: by then the cache has been asked."""
    begun = False
    async with aclosing(answer(state, http_request, request)) as pieces:
        async for piece in pieces:
            if not begun:
                begun = True
                yield frame(told.begin(len(request.ids), request.cached or 0), "message_start")
            for event in told.take(piece):
                yield frame(event, event["type"])
            if told.full:
                break
    for event in told.end(len(request.ids), request.cached or 0):
        yield frame(event, event["type"])
