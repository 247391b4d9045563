"""The OpenAI-compatible routes: chat completions, responses, completions, embeddings, similarity, models."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter

from ...text.facts import tokenizer_facts
from ..http.errors import HttpError
from ..state import State
from . import chat, completions, embeddings, rerank
from .answers import Capabilities, Model, ModelList, documented
from .model_info import calls_tools, has_chat_template, precision
from .responses import routes as responses


def router(state: State) -> APIRouter:
    """All routes of the OpenAI API."""
    routes = APIRouter()
    for part in (chat, responses, completions, embeddings, rerank):
        routes.include_router(part.router(state))

    context, tokenizer = state.llm.engine.model.args.max_seq_len, state.llm.tokenizer
    weights = precision(state.llm.engine.model)
    template = has_chat_template(state.llm.engine.model.source, tokenizer)
    facts = None if tokenizer is None else tokenizer_facts(tokenizer, state.llm.inputs.ends)
    chats = tokenizer is not None and tokenizer.chat is not None
    able: Capabilities = {"completion_chat": chats, "function_calling": calls_tools(tokenizer)}

    def model(name: str) -> Model:
        base = state.model_name
        return {
            "id": name, "object": "model", "created": int(state.started), "owned_by": "mistral-7b", "root": base,
            "parent": None if name == base else base, "max_model_len": context,
            "type": "base", "capabilities": able, "max_context_length": context,
            "display_name": name, "created_at": datetime.fromtimestamp(int(state.started), UTC).isoformat(),
            "precision": weights, "chat_template": template, "tokenizer": facts,
            "sampling_defaults": state.llm.inputs.model_defaults,
        }  # fmt: skip

    @routes.get("/v1/models", responses=documented(answer=ModelList), tags=["OpenAI"])
    async def models() -> ModelList:
        """The model and its adapters."""
        names = state.models
        return {
            "object": "list", "data": [model(name) for name in names],
            "first_id": names[0], "last_id": names[-1], "has_more": False,
        }  # fmt: skip

    @routes.get("/v1/models/{name:path}", responses=documented(404, answer=Model), tags=["OpenAI"])
    async def one_model(name: str) -> Model:
        """The model or one adapter, by name."""
        if name not in state.models:
            raise HttpError(404, f"there is no model {name!r:.100}", field="model", code="model_not_found")
        return model(name)

    @routes.post("/v1/fim/completions", responses=documented(400), tags=["Mistral"])
    async def fill_in_the_middle() -> None:
        """Mistral's completion between a prompt and a suffix: refused, as the model was not trained for it."""
        why = "this model has no fill-in-the-middle tokens: Codestral has"
        raise HttpError(400, why, hint="continue a prompt with /v1/completions", code="fim_not_supported")

    return routes
