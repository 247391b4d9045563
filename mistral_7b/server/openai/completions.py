"""POST /v1/completions: continue prompts given as text or token ids."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from ...engine.completion import TextPiece
from ...engine.inputs import RequestOptions
from ...engine.request import Request
from ...text.tokenizer import Tokenizer
from ..http.errors import HttpError
from ..http.json_bodies import JsonRoute, json_answer
from ..http.sse import DONE, Frames, event_stream, frame
from ..state import State, answer, check_size, disconnect_event, prepare
from .answers import TextChoice, TextCompletion, TextLogprobs, Usage, documented
from .chat import check_n
from .logprobs import Part, TokenSpans, joined, text_logprobs
from .protocol import NO_LIMIT, CompletionRequest, prompts_of
from .recorded import check_recording, check_watching, watching_options, with_recorded

DEFAULT_TOKENS = 16  # OpenAI's
AHEAD = 16  # size of the queue that merges the pieces of several prompts


def router(state: State) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post(
        "/v1/completions",
        responses=documented(400, 404, 422, 429, 500, 503, 504, answer=TextCompletion, stream=True),
        tags=["OpenAI"],
    )
    async def completions(body: CompletionRequest, http_request: HttpRequest) -> Response:
        """Complete one or several prompts."""
        _check(state, body)
        prompts = prompts_of(body.prompt)
        check_watching(body, http_request, bool(body.stream), len(prompts))
        options = RequestOptions(
            priority=body.priority or 0,
            adapter=state.adapter(body.model),
            cache_salt=body.cache_salt,
            disconnected=disconnect_event(http_request),
            **watching_options(body),
        )
        requests = [
            await prepare(state, partial(_read, state, body, prompt, options), "prompt") for prompt in prompts
        ]
        check_size(state, requests)
        check_recording(state, requests[0])
        texts = Texts(state, body, requests)
        pieces = together([answer(state, http_request, request) for request in requests])
        if body.stream:
            return await event_stream(_stream(texts, body, pieces))
        async with aclosing(pieces):
            async for index, piece in pieces:
                texts.add(index, piece)
        return json_answer(await with_recorded(state, texts.whole(), requests))

    return routes


def _check(state: State, body: CompletionRequest) -> None:
    check_n(state, body)
    check_prompts(state, prompts_of(body.prompt), "prompt")
    if body.suffix:
        raise HttpError(400, "suffix is not supported: Mistral 7B was not trained to infill", field="suffix")
    if body.max_tokens == 0 and not body.echo:
        raise HttpError(400, "max_tokens must be at least 1, unless echo is true", field="max_tokens")


def check_prompts(state: State, prompts: Sequence[Any], param: str) -> None:
    """HttpError for an empty list (400), or for more prompts than `max_prompts` or the queue holds (422)."""
    if not prompts:
        raise HttpError(400, f"{param} is empty", field=param)
    most, queue = state.config.max_prompts, state.llm.engine.config.max_waiting
    most = most if queue is None else min(most, queue)
    if len(prompts) > most:
        raise HttpError(422, f"{param} has {len(prompts)} entries; the server's limit is {most}", field=param)


def _read(state: State, body: CompletionRequest, prompt: Any, options: RequestOptions) -> Request:
    defaults = state.llm.inputs.model_defaults
    usual = defaults.get("max_tokens", DEFAULT_TOKENS)
    limit: int | None = usual if body.max_tokens is None else max(1, body.max_tokens)
    if body.max_tokens == NO_LIMIT:
        limit = None
    echoed = body.logprobs if body.echo else None
    params = body.params(defaults, max_tokens=limit, logprobs=body.logprobs, prompt_logprobs=echoed)
    with body.named():
        return state.llm.inputs.text(prompt, params, options)


# ---------------------------------------------------------------------- the response


@dataclass
class _Text:
    """One completion, with the echoed prompt; `parts` and `logprobs` are None unless logprobs are requested."""

    index: int
    texts: list[str]
    parts: TokenSpans | None
    logprobs: TextLogprobs | None
    begun: bool = False
    reason: str | None = None


class Texts:
    """Collects the completions of one HTTP request, for chunks and for the whole response."""

    def __init__(self, state: State, body: CompletionRequest, requests: Sequence[Request]) -> None:
        assert state.llm.tokenizer is not None
        self.tokenizer: Tokenizer = state.llm.tokenizer
        self.body, self.requests, self.tokens = body, requests, 0
        self.top, self.nothing = body.logprobs or 0, body.max_tokens == 0
        self.head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
            "model": body.model or state.model_name,
        }  # fmt: skip
        self.n = requests[0].params.n
        self.texts = [self._text(i, requests[i // self.n]) for i in range(self.n * len(requests))]

    def _text(self, index: int, request: Request) -> _Text:
        if self.body.logprobs is None:
            return _Text(index, [], None, None)
        return _Text(
            index, [], TokenSpans(self.tokenizer, request.ids), text_logprobs(self.tokenizer, (), self.top)
        )

    def add(self, index: int, piece: TextPiece) -> TextChoice:
        """Add a piece of prompt `index`; return it as a chunk. With `echo`, the first chunk has the prompt."""
        request, text = self.requests[index], self.texts[index * self.n + piece.index]
        parts: list[Part] = []
        new = ""
        if not text.begun and self.body.echo:
            new = self._prompt(request)
            if text.parts is not None:
                echoed = TokenSpans(self.tokenizer)
                for token, entry in zip(request.ids, request.prompt_logprobs, strict=True):
                    echoed.push(token, entry)
                echoed.end()
                parts = echoed.told()
                text.parts.length = echoed.length
        text.begun = True
        if not self.nothing:
            self.tokens += len(piece.token_ids)
            own = [] if text.parts is None else text.parts.of(piece)
            new += piece.text if text.parts is None else joined(own)
            parts += own
        logprobs = None
        if text.logprobs is not None and parts:
            logprobs = text_logprobs(self.tokenizer, parts, self.top)
            for key, values in logprobs.items():
                text.logprobs[key] += values  # type: ignore[literal-required]
        text.texts.append(new)
        text.reason = piece.finish_reason
        return {"index": text.index, "text": new, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _prompt(self, request: Request) -> str:
        return self.tokenizer.decode(request.ids) if request.prompt is None else request.prompt

    @property
    def usage(self) -> Usage:
        prompt = sum(len(r.ids) for r in self.requests)
        return {
            "prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens,
            "prompt_tokens_details": {"cached_tokens": sum(r.cached or 0 for r in self.requests)},
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """The complete response body."""
        choices: list[TextChoice] = [
            {"index": t.index, "text": "".join(t.texts), "logprobs": t.logprobs, "finish_reason": t.reason}
            for t in self.texts
        ]
        return {**self.head, "choices": choices, "usage": self.usage}


async def _stream(texts: Texts, body: CompletionRequest, pieces: AsyncGenerator[Any, None]) -> Frames:
    usage = {"usage": None} if body.with_usage else {}
    async with aclosing(pieces):
        async for index, piece in pieces:
            chunk = texts.add(index, piece)
            if chunk["text"] or chunk["finish_reason"] or chunk["logprobs"]:
                yield frame({**texts.head, "choices": [chunk], **usage})
    if body.with_usage:
        yield frame({**texts.head, "choices": [], "usage": texts.usage})
    yield DONE


async def together(
    streams: Sequence[AsyncGenerator[TextPiece, None]],
) -> AsyncGenerator[tuple[int, TextPiece], None]:
    """Merge the streams of several requests: yield (request index, piece). One that fails ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, TextPiece | BaseException | None]] = asyncio.Queue(AHEAD)

    async def follow(index: int, stream: AsyncGenerator[TextPiece, None]) -> None:
        try:
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    await queue.put((index, piece))
            await queue.put((index, None))
        except Exception as e:
            await queue.put((index, e))

    tasks = [asyncio.create_task(follow(index, stream)) for index, stream in enumerate(streams)]
    try:
        unfinished = len(tasks)
        while unfinished:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
