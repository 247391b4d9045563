"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API.

Request bodies are in bodies.py, their conversion in wire.py, responses and events in events.py.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...engine.inputs import RequestOptions
from ...engine.request import Request
from ...errors import GenerationError
from ...sampling.params import SamplingParams
from ..http.json_bodies import JsonRoute, json_answer
from ..http.sse import event_stream, frame
from ..openai.answers import documented
from ..state import State, answer, disconnect_event, prepare, with_capped_max_tokens
from . import wire as wire
from .events import Answer, CountAnswer, MessageAnswer

ERRORS = (400, 404, 422, 429, 500, 503, 504)


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Anthropic"], route_class=JsonRoute)

    @routes.post("/v1/messages", responses=documented(*ERRORS, answer=MessageAnswer, stream=True))
    async def messages(http_request: HttpRequest, body: wire.MessagesRequest) -> Response:
        """Complete a conversation, as Anthropic's Messages API does."""
        adapter = state.adapter(body.model)
        make = partial(_request, state, body, adapter, disconnect_event(http_request))
        request = await prepare(state, make, "messages")
        message = Answer(f"msg_{uuid.uuid4().hex}", body.model or state.model_name, wire.most_calls(body))
        if body.stream:
            return await event_stream(_events(state, http_request, request, message))
        async with aclosing(answer(state, http_request, request)) as pieces:
            async for piece in pieces:
                for _ in message.take(piece):
                    pass
                if message.full:
                    break
        return json_answer(message.message(len(request.ids), request.cached or 0))

    @routes.post("/v1/messages/count_tokens", responses=documented(*ERRORS, answer=CountAnswer))
    async def count_tokens(body: wire.CountRequest) -> Response:
        """Number of tokens of a conversation, in this model's template."""
        state.adapter(body.model)
        return json_answer({"input_tokens": await state.workers.run(partial(_count, state, body))})

    @routes.post("/api/event_logging/batch", include_in_schema=False)
    @routes.post("/api/event_logging/v2/batch", include_in_schema=False)
    async def events() -> Response:
        """Statistics of Claude Code: nothing is kept."""
        return json_answer({})

    return routes


def _request(
    state: State, body: wire.MessagesRequest, adapter: str | None, gone: threading.Event | None
) -> Request:
    """Build the engine request. Errors name a message by its index in the client's request."""
    talk, params = wire.conversation(body), body.params(state.llm.inputs.model_defaults)

    def make(params: SamplingParams) -> Request:
        return state.llm.inputs.chat(
            talk.messages, params, RequestOptions(adapter=adapter, disconnected=gone), tools=wire.offered(body),
            tool_choice=wire.chosen(body), parallel=wire.most_calls(body) is None, labels=talk.labels,
        )  # fmt: skip

    return with_capped_max_tokens(make, params)


def _count(state: State, body: wire.CountRequest) -> int:
    if state.llm.tokenizer is None:
        raise GenerationError("this model has no tokenizer: it cannot count tokens")
    talk = wire.conversation(body)
    return len(state.llm.tokenizer.encode_chat(talk.messages, wire.offered(body), talk.labels))


async def _events(
    state: State, http_request: HttpRequest, request: Request, message: Answer
) -> AsyncGenerator[bytes, None]:
    """Encoded events. The first one is sent with the first token, when the number of cached tokens is known."""
    started = False
    async with aclosing(answer(state, http_request, request)) as pieces:
        async for piece in pieces:
            if not started:
                started = True
                yield frame(message.begin(len(request.ids), request.cached or 0), "message_start")
            for event in message.take(piece):
                yield frame(event, event["type"])
            if message.full:
                break
    for event in message.end(len(request.ids), request.cached or 0):
        yield frame(event, event["type"])
