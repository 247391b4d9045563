"""POST /v1/embeddings: pooled hidden states of texts."""

from __future__ import annotations

import asyncio
import base64
import uuid
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic_core import to_json

from ...engine.inputs import RequestOptions
from ..http.errors import HttpError
from ..http.json_bodies import JsonRoute, json_answer
from ..state import State, answer, prepare
from .answers import EmbeddingList, documented
from .completions import check_prompts, together
from .protocol import EmbeddingRequest, prompts_of


def router(state: State) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post(
        "/v1/embeddings",
        responses=documented(400, 404, 422, 429, 500, 503, 504, answer=EmbeddingList),
        tags=["OpenAI"],
    )
    async def embeddings(body: EmbeddingRequest, http_request: HttpRequest) -> Response:
        """Embed texts: the mean of the final hidden states, or the last one; normalized to length 1 by default."""
        dim = state.llm.engine.model.args.dim
        for name, wanted in (("dimensions", body.dimensions), ("output_dimension", body.output_dimension)):
            if wanted not in (None, dim):
                raise HttpError(400, f"{name} must be {dim}, not {wanted}", field=name)
        texts = prompts_of(body.input)
        check_prompts(state, texts, "input")
        options = RequestOptions(
            priority=body.priority or 0, adapter=state.adapter(body.model), cache_salt=body.cache_salt
        )
        make = state.llm.inputs.embedding
        requests = [await prepare(state, partial(make, text, body.pooling, options), "input") for text in texts]
        async with aclosing(together([answer(state, http_request, r) for r in requests])) as pieces:
            async for _ in pieces:
                pass
        data = []
        for i, request in enumerate(requests):
            vector: Any = request.embedding(body.normalize)
            if body.encoding_format == "base64":
                vector = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
            data.append(to_json({"object": "embedding", "index": i, "embedding": vector}))
            await asyncio.sleep(0)  # encoding thousands of numbers takes time: let other tasks run
        tokens = sum(len(r.ids) for r in requests)
        end = to_json({"id": f"embd-{uuid.uuid4().hex}", "model": body.model or state.model_name,
                       "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})  # fmt: skip
        return json_answer(b'{"object":"list","data":[' + b",".join(data) + b"]," + end[1:])

    return routes
