"""What OpenAI's clients ask for: chat completions, completions, embeddings, models."""

from __future__ import annotations

from fastapi import APIRouter

from . import chat, completions, embeddings
from .answers import Model, ModelList, documented
from .problems import Refusal
from .state import State


def router(state: State) -> APIRouter:
    """All of them."""
    routes = APIRouter()
    for part in (chat, completions, embeddings):
        routes.include_router(part.router(state))

    def model(name: str) -> Model:
        base, tokenizer = state.model_name, state.llm.tokenizer
        tools = tokenizer is not None and tokenizer.tool_calls_id is not None
        return {
            "id": name, "object": "model", "created": int(state.started), "owned_by": "mistral-7b", "root": base,
            "parent": None if name == base else base, "max_model_len": state.llm.engine.model.args.max_seq_len,
            "type": "base", "capabilities": {"completion_chat": True, "function_calling": tools},
        }  # fmt: skip

    @routes.get("/v1/models", responses=documented(answer=ModelList), tags=["OpenAI"])
    async def models() -> ModelList:
        """The model and its adapters."""
        return {"object": "list", "data": [model(name) for name in state.models]}

    @routes.get("/v1/models/{name:path}", responses=documented(404, answer=Model), tags=["OpenAI"])
    async def one_model(name: str) -> Model:
        """One of them."""
        if name not in state.models:
            raise Refusal(404, f"there is no model {name!r:.100} here", param="model", code="model_not_found")
        return model(name)

    return routes
