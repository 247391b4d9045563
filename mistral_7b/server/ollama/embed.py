"""POST /api/embed and /api/embeddings: the mean of the final hidden states, normalized to length 1."""

from __future__ import annotations

import time
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from ...engine.inputs import RequestOptions
from ...engine.request import Request
from ...errors import PromptTooLongError
from ..http.errors import HttpError
from ..http.json_bodies import json_answer
from ..openai.completions import check_prompts, together
from ..state import State, answer, prepare
from .answers import Embeddings, OneEmbedding, nanoseconds
from .bodies import EmbedBody, OldEmbedBody
from .routes import OllamaRoute, documented


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Ollama"], route_class=OllamaRoute)

    @routes.post("/api/embed", responses=documented(Embeddings))
    async def embed(body: EmbedBody, http_request: HttpRequest) -> Response:
        """Embed texts. Those that are too long are cut, unless `truncate` is false."""
        began, dim = time.perf_counter(), state.llm.engine.model.args.dim
        if body.dimensions not in (None, dim):
            raise HttpError(400, f"dimensions must be {dim}, not {body.dimensions}", field="dimensions")
        texts = [body.input] if isinstance(body.input, str) else body.input
        requests = await _embedded(state, http_request, body.model, texts, body.truncate)
        return json_answer({
            "model": body.model, "embeddings": [request.embedding(True) for request in requests],
            "total_duration": nanoseconds(time.perf_counter() - began), "load_duration": 0,
            "prompt_eval_count": sum(len(request.ids) for request in requests),
        })  # fmt: skip

    @routes.post("/api/embeddings", responses=documented(OneEmbedding))
    async def embeddings(body: OldEmbedBody, http_request: HttpRequest) -> Response:
        """Embed one text."""
        (request,) = await _embedded(state, http_request, body.model, [body.prompt], cut=True)
        return json_answer({"embedding": request.embedding(True)})

    return routes


async def _embedded(
    state: State, http_request: HttpRequest, model: str, texts: list[str], cut: bool
) -> list[Request]:
    """Run the requests of texts."""
    options = RequestOptions(adapter=state.adapter(model))
    check_prompts(state, texts, "input")
    requests = [await prepare(state, partial(_read, state, text, options, cut), "input") for text in texts]
    async with aclosing(together([answer(state, http_request, request) for request in requests])) as pieces:
        async for _ in pieces:
            pass
    return requests


def _read(state: State, text: str, options: RequestOptions, cut: bool) -> Request:
    make, tokenizer = state.llm.inputs.embedding, state.llm.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    most = state.config.max_prompt_tokens or state.llm.engine.model.args.max_seq_len
    try:
        return make(ids[:most] if cut else ids, "mean", options)
    except PromptTooLongError as e:
        if not cut or e.limit is None:
            raise
        return make(ids[: e.limit - 1], "mean", options)
