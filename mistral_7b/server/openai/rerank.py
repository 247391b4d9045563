"""POST /v1/score and /v1/rerank: similarity of texts, the cosine of their embeddings."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field, StrictBool, StrictInt

from ...engine.inputs import RequestOptions
from ..http.errors import HttpError
from ..http.json_bodies import JsonRoute, json_answer
from ..state import State, answer, prepare
from .answers import Reranked, ScoreList, documented
from .body import Body
from .completions import check_prompts, together
from .protocol import Texts

ERRORS = (400, 404, 422, 429, 500, 503, 504)


class ScoreRequest(Body):
    """POST /v1/score, as in vLLM: one text with one or several, or pairs from two lists of one length."""

    model: str | None = None
    text_1: str | Texts
    text_2: str | Texts


class RerankRequest(Body):
    """POST /v1/rerank, as in Jina's API and vLLM: documents in the order of their similarity to the query."""

    model: str | None = None
    query: str
    documents: Texts
    top_n: Annotated[StrictInt, Field(ge=0)] | None = None
    return_documents: StrictBool = True


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["OpenAI"], route_class=JsonRoute)

    async def embedded(http_request: HttpRequest, model: str | None, **texts: Sequence[str]) -> tuple[Any, int]:
        """Normalized embeddings (N, D) of texts by field, and the number of their tokens."""
        options, requests = RequestOptions(adapter=state.adapter(model)), []
        for field, those in texts.items():
            check_prompts(state, those, field)
            for text in those:
                make = partial(state.llm.inputs.embedding, text, "mean", options)
                requests.append(await prepare(state, make, field))
        async with aclosing(together([answer(state, http_request, r) for r in requests])) as pieces:
            async for _ in pieces:
                pass
        return np.asarray([r.embedding(True) for r in requests]), sum(len(r.ids) for r in requests)

    def head(kind: str, model: str | None, tokens: int) -> dict[str, Any]:
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"id": f"{kind}-{uuid.uuid4().hex}", "model": model or state.model_name, "usage": usage}

    @routes.post("/v1/score", responses=documented(*ERRORS, answer=ScoreList))
    async def score(body: ScoreRequest, http_request: HttpRequest) -> Response:
        """Cosine similarity of pairs of texts."""
        left, right = ([t] if isinstance(t, str) else t for t in (body.text_1, body.text_2))
        if len(left) not in (1, len(right)):
            raise HttpError(400, "text_1 must be one text, or as many as text_2", field="text_1")
        vectors, tokens = await embedded(http_request, body.model, text_1=left, text_2=right)
        scores = (vectors[: len(left)] * vectors[len(left) :]).sum(1).tolist()
        data = [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)]
        more = {"object": "list", "created": int(time.time()), "data": data}
        return json_answer({**head("score", body.model, tokens), **more})

    @routes.post("/v1/rerank", responses=documented(*ERRORS, answer=Reranked))
    async def rerank(body: RerankRequest, http_request: HttpRequest) -> Response:
        """Documents, the most similar to the query first."""
        vectors, tokens = await embedded(http_request, body.model, query=[body.query], documents=body.documents)
        scores = (vectors[1:] @ vectors[0]).tolist()
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
        results = [
            {"index": i, "relevance_score": scores[i],
             **({"document": {"text": body.documents[i]}} if body.return_documents else {})}
            for i in best
        ]  # fmt: skip
        return json_answer({**head("rerank", body.model, tokens), "results": results})

    return routes
