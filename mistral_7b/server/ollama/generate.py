"""POST /api/chat and /api/generate: conversations and texts, as a stream of JSON lines by default."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic_core import to_json

from ...engine.completion import TextPiece
from ...engine.inputs import RequestOptions
from ...engine.request import Request
from ...sampling.params import SamplingParams
from ..http.json_bodies import json_answer
from ..http.sse import Frames, LineStream, event_stream
from ..openai.protocol import plain_tools
from ..state import State, answer, disconnect_event, prepare, with_capped_max_tokens
from .answers import ChatAnswer, GenerateAnswer, Reply, loaded
from .bodies import ChatBody, GenerateBody
from .routes import OllamaRoute, documented


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Ollama"], route_class=OllamaRoute)

    @routes.post("/api/chat", responses=documented(ChatAnswer, stream=True))
    async def chat(body: ChatBody, http_request: HttpRequest) -> Response:
        """Complete a conversation."""
        adapter = state.adapter(body.model)
        if not body.messages:
            return json_answer(loaded(body.model, chat=True))
        make = partial(_read_chat, state, body, adapter, disconnect_event(http_request))
        request = await prepare(state, make, "messages")
        return await _respond(state, http_request, Reply(body.model, request, chat=True), body.stream)

    @routes.post("/api/generate", responses=documented(GenerateAnswer, stream=True))
    async def generate(body: GenerateBody, http_request: HttpRequest) -> Response:
        """Answer a prompt; continue it with `raw`."""
        adapter = state.adapter(body.model)
        if not body.prompt:
            return json_answer(loaded(body.model, chat=False))
        make = partial(_read_text, state, body, adapter, disconnect_event(http_request))
        request = await prepare(state, make, "prompt")
        return await _respond(state, http_request, Reply(body.model, request, chat=False), body.stream)

    return routes


def _read_chat(state: State, body: ChatBody, adapter: str | None, gone: threading.Event | None) -> Request:
    """Build the engine request. Slow: run it on a thread."""
    options = RequestOptions(adapter=adapter, disconnected=gone)
    messages, tools = body.conversation(), plain_tools(body.tools)

    def make(params: SamplingParams) -> Request:
        return state.llm.inputs.chat(messages, params, options, tools=tools)

    return with_capped_max_tokens(make, body.params(state.llm.inputs.model_defaults))


def _read_text(state: State, body: GenerateBody, adapter: str | None, gone: threading.Event | None) -> Request:
    """Build the engine request. Without `raw` the prompt is a user's message, after `context` if that is given."""
    tokenizer = state.llm.tokenizer
    assert tokenizer is not None
    options = RequestOptions(adapter=adapter, disconnected=gone)
    prompt: str | list[int] = body.prompt
    if not body.raw:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        ids = tokenizer.encode_chat(messages, labels=["system", "prompt"][-len(messages) :])
        prompt = [*body.context, *ids[1:]] if body.context else ids
    params = body.params(state.llm.inputs.model_defaults)
    return with_capped_max_tokens(lambda params: state.llm.inputs.text(prompt, params, options), params)


async def _respond(state: State, http_request: HttpRequest, reply: Reply, stream: bool) -> Response:
    pieces = answer(state, http_request, reply.request)
    if stream:
        return await event_stream(_lines(reply, pieces), kind=LineStream)
    async with aclosing(pieces):
        async for piece in pieces:
            reply.add(piece)
    return json_answer(reply.whole())


async def _lines(reply: Reply, pieces: AsyncGenerator[TextPiece, None]) -> Frames:
    async with aclosing(pieces):
        async for piece in pieces:
            if parts := reply.add(piece):
                yield b"".join(to_json(part) + b"\n" for part in parts)
    yield to_json(reply.end()) + b"\n"
