"""POST /v1/chat/completions: the engine request of a conversation, and its response, whole or streamed."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from ...engine.completion import TextPiece
from ...engine.inputs import RequestOptions
from ...engine.request import Request
from ...sampling.params import SamplingParams, StructuredOutputs
from ..http.errors import HttpError
from ..http.json_bodies import JsonRoute, json_answer
from ..http.sse import DONE, Frames, event_stream, frame
from ..state import State, answer, disconnect_event, prepare, with_capped_max_tokens
from .answers import (
    CallDelta,
    ChatChoice,
    ChatCompletion,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FunctionDelta,
    Usage,
    documented,
)
from .logprobs import ChatLogprobs
from .protocol import NO_LIMIT, ChatRequest, Sampling, plain, plain_tools
from .recorded import check_recording, check_watching, watching_options, with_recorded

MISTRALS_CLIENTS = ("mistral-client", "mistralai")  # in the User-Agent: their API streams whole calls
# The system prompt that Mistral's guardrails guide gives for safe_prompt.
SAFE = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid harmful, "
    "unethical, prejudiced, or negative content. Ensure replies promote fairness and positivity."
)


def router(state: State) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post(
        "/v1/chat/completions",
        responses=documented(400, 404, 422, 429, 500, 503, 504, answer=ChatCompletion, stream=True),
        tags=["OpenAI"],
    )
    async def chat_completions(body: ChatRequest, http_request: HttpRequest) -> Response:
        """Complete a conversation."""
        check_n(state, body)
        check_watching(body, http_request, bool(body.stream))
        adapter = state.adapter(body.model)
        make = partial(read_chat, state, body, adapter, disconnect_event(http_request))
        request = await prepare(state, make, "messages")
        check_recording(state, request)
        pieces = answer(state, http_request, request)
        agent = http_request.headers.get("user-agent", "")
        mistral = body.of_mistral or any(name in agent for name in MISTRALS_CLIENTS)
        choices = Choices(state, body, request, mistral)
        if body.stream:
            return await event_stream(_stream(choices, body, pieces))
        async with aclosing(pieces):
            async for piece in pieces:
                choices.add(piece)
        return json_answer(await with_recorded(state, choices.whole(), [request]))

    return routes


def check_n(state: State, body: Sampling) -> None:
    """HttpError if `n` is over the server's or the engine's limit (422), or `best_of` is another number (400)."""
    n = body.n
    if body.best_of not in (None, n or 1):
        raise HttpError(400, "best_of is not supported", field="best_of", hint="use n with logprobs, and choose")
    most = min(state.config.max_n, state.llm.engine.config.max_sequences)
    if n is not None and n > most:
        raise HttpError(422, f"n must be at most {most} here, not {n}", field="n")


# ---------------------------------------------------------------------- the request


def read_chat(
    state: State, body: ChatRequest, adapter: str | None, gone: threading.Event | None = None,
    labels: Sequence[str] | None = None,
) -> Request:  # fmt: skip
    """Build the engine request of a conversation; `gone` is set at a disconnect. Slow: run it on a thread.

    `labels`: names of the messages in errors; by default "messages[0]" and so on.
    """
    messages = body.plain(body.messages)
    labels = [f"messages[{i}]" for i in range(len(messages))] if labels is None else list(labels)
    if body.safe_prompt:
        messages.insert(0, {"role": "system", "content": SAFE})
        labels.insert(0, "safe_prompt")
    tools = plain_tools(body.tools)
    choice: Any = body.tool_choice or "auto"
    if not isinstance(choice, str):
        choice = dict(plain(choice))
    defaults, limit = state.llm.inputs.model_defaults, body.given_limit
    most = defaults.get("max_tokens") if limit is None else None if limit == NO_LIMIT else limit
    params = body.params(defaults, max_tokens=most, logprobs=_top(body), structured_outputs=_structured(body))
    options = RequestOptions(
        priority=body.priority or 0, adapter=adapter, cache_salt=body.cache_salt, disconnected=gone,
        **watching_options(body),
    )  # fmt: skip

    def make(params: SamplingParams) -> Request:
        return state.llm.inputs.chat(
            messages, params, options, tools=tools, tool_choice=choice,
            parallel=body.parallel_tool_calls is not False, labels=labels,
        )  # fmt: skip

    with body.named():
        return make(params) if limit is not None else with_capped_max_tokens(make, params)


def _top(body: ChatRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise HttpError(400, 'top_logprobs requires "logprobs": true', field="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _structured(body: ChatRequest) -> StructuredOutputs | None:
    """The constraint on the text: OpenAI's response_format or vLLM's structured_outputs."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return body.constraint()
    if (other := body.constrained_by) is not None:
        raise HttpError(400, f"response_format and {other} exclude each other", field=other)
    schema = wanted.schema_ if wanted.json_schema is None else wanted.json_schema.schema_
    if wanted.type == "json_object" and not schema:
        return StructuredOutputs(json_object=True)
    if schema is None:
        raise HttpError(400, "response_format.json_schema.schema is missing", field="response_format")
    return StructuredOutputs(json=schema)


# ---------------------------------------------------------------------- the response


class Choices:
    """Collects the completions of one request, for chunks and for the whole response."""

    def __init__(self, state: State, body: ChatRequest, request: Request, mistral: bool = False) -> None:
        tokenizer = state.llm.tokenizer
        assert tokenizer is not None
        self.request, self.tokens, self.mistral = request, 0, mistral
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()),
            "model": body.model or state.model_name,
        }  # fmt: skip
        self.first_call_only = body.parallel_tool_calls is False
        top = body.top_logprobs or 0
        self.choices = [_Choice(i, mistral) for i in range(request.params.n)]
        self.logprobs = (
            [ChatLogprobs(tokenizer, request.ids, top, c.calls is not None) for c in request.completions]
            if body.logprobs
            else None
        )

    def add(self, piece: TextPiece) -> list[ChunkChoice]:
        """Add a piece; return its chunks."""
        self.tokens += len(piece.token_ids)
        found = None
        if self.logprobs is not None:
            text, found = self.logprobs[piece.index].of(piece)
            piece = replace(piece, text=text)
        return self.choices[piece.index].add(piece, found, self.first_call_only)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt = len(self.request.ids)
        return {
            "prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.request.cached or 0},
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """The complete response body."""
        return {**self.head, "choices": [c.whole() for c in self.choices], "usage": self.usage}


class _Choice:
    """One completion. `whole_calls`: stream each tool call in one chunk, as Mistral's API does."""

    def __init__(self, index: int, whole_calls: bool) -> None:
        self.index, self.begun, self.whole_calls = index, False, whole_calls
        self.texts: list[str] = []
        self.calls: list[Any] = []
        self.logprobs: ChoiceLogprobs | None = None
        self.reason = "stop"

    def add(self, piece: TextPiece, logprobs: ChoiceLogprobs | None, first_call_only: bool) -> list[ChunkChoice]:
        """Add a piece; return its chunks. The role and the finish reason have chunks of their own."""
        chunks: list[ChunkChoice] = []
        if not self.begun:
            self.begun = True
            chunks.append(self._chunk({"role": "assistant", "content": ""}))
        deltas = _merged([self._call(d) for d in piece.tool_calls if not (first_call_only and d.index)])
        delta: Delta = {}
        if piece.text:
            delta["content"] = piece.text
            self.texts.append(piece.text)
        if deltas and not self.whole_calls:
            delta["tool_calls"] = deltas
        if delta or (logprobs is not None and logprobs["content"]):
            chunks.append(self._chunk(delta, logprobs))
        if logprobs is not None:
            self.logprobs = self.logprobs or {"content": [], "refusal": None}
            self.logprobs["content"] += logprobs["content"]
        if piece.finish_reason is not None:
            called = self.calls and piece.finish_reason == "stop"
            self.reason = "tool_calls" if called else piece.finish_reason
            last: Delta = {}
            if self.calls and self.whole_calls:
                last["tool_calls"] = [
                    {"index": i, "id": call["id"], "type": "function", "function": call["function"]}
                    for i, call in enumerate(self.calls)
                ]
            chunks.append(self._chunk(last, reason=self.reason))
        return chunks

    def _chunk(
        self, delta: Delta, logprobs: ChoiceLogprobs | None = None, reason: str | None = None
    ) -> ChunkChoice:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _call(self, delta: Any) -> CallDelta:
        """Add a part of a tool call. The first part has id, type and name; the others have arguments only."""
        if delta.name is None:
            self.calls[delta.index]["function"]["arguments"] += delta.arguments
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        name, arguments = delta.name, delta.arguments
        self.calls.append({"id": delta.id, "type": "function", "function": {"name": name, "arguments": arguments}})
        function: FunctionDelta = {"name": name, "arguments": arguments}
        return {"index": delta.index, "id": delta.id, "type": "function", "function": function}

    def whole(self) -> ChatChoice:
        text = "".join(self.texts)
        message: Any = {"role": "assistant", "content": text if text or not self.calls else None, "refusal": None}
        if self.calls:
            message["tool_calls"] = self.calls
        return {"index": self.index, "message": message, "logprobs": self.logprobs, "finish_reason": self.reason}


def _merged(deltas: list[CallDelta]) -> list[CallDelta]:
    """Join the parts of each call, because some clients expect at most one part of a call per chunk."""
    out: dict[int, CallDelta] = {}
    for delta in deltas:
        first = out.setdefault(delta["index"], delta)
        if first is not delta:
            first["function"]["arguments"] += delta["function"]["arguments"]
    return list(out.values())


async def _stream(choices: Choices, body: ChatRequest, pieces: AsyncGenerator[TextPiece, None]) -> Frames:
    """The response as server-sent events. All chunks of a piece share one write."""
    head = {**choices.head, "object": "chat.completion.chunk"}
    usage = {"usage": None} if body.with_usage else {}
    unfinished = len(choices.choices)
    async with aclosing(pieces):
        async for piece in pieces:
            chunks = [{**head, "choices": [chunk], **usage} for chunk in choices.add(piece)]
            unfinished -= piece.finish_reason is not None
            if choices.mistral and not unfinished:
                chunks[-1]["usage"] = choices.usage
            if chunks:
                yield b"".join(map(frame, chunks))
    if body.with_usage:
        yield frame({**head, "choices": [], "usage": choices.usage})
    yield DONE
