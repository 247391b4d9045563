"""GET /api/tags, /api/ps, /api/version and POST /api/show: the model and its adapters."""

from __future__ import annotations

import hashlib
import json

from fastapi import APIRouter

from ..openai.model_info import calls_tools, precision
from ..state import State
from .answers import Details, ListedModel, ModelList, RunningList, ShownModel, Version, moment
from .bodies import LATEST, ShowBody
from .routes import OllamaRoute, documented

OLLAMA = "0.12.6"  # the version whose API these routes follow; clients require a minimum
PARAMETERS = {"repetition_penalty": "repeat_penalty", "max_tokens": "num_predict"}  # Ollama's names
NEVER = "9999-12-31T23:59:59Z"  # a served model is never unloaded


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Ollama"], route_class=OllamaRoute)
    engine, tokenizer = state.llm.engine, state.llm.tokenizer
    args = engine.model.args
    tensors = [*engine.model.parameters(), *engine.model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    per_layer = (2 * args.n_heads + 2 * args.n_kv_heads) * args.head_dim + 3 * args.hidden_dim + 2
    ends = args.vocab_size * (1 if args.tie_embeddings else 2) + 1
    count = args.dim * (args.n_layers * per_layer + ends)
    capabilities = ["completion", "embedding"]
    if calls_tools(tokenizer):
        capabilities.append("tools")

    chat = None if tokenizer is None else tokenizer.chat
    template = "" if chat is None else chat.source or f"{{# {chat.name} #}}"

    def parameters() -> str:
        """What applies where a request says nothing, a line for each."""
        pieces = [] if tokenizer is None else [tokenizer.piece(i) for i in sorted(state.llm.inputs.ends)]
        usual = [(PARAMETERS.get(name, name), value) for name, value in state.llm.inputs.model_defaults.items()]
        lines = [("stop", json.dumps(piece, ensure_ascii=False)) for piece in pieces] + usual
        return "\n".join(f"{name:<30} {value}" for name, value in lines)

    def details(name: str) -> Details:
        return {
            "parent_model": "" if name == state.model_name else state.model_name, "format": "safetensors",
            "family": "llama", "families": ["llama"], "parameter_size": _short(count),
            "quantization_level": precision(engine.model),
        }  # fmt: skip

    def listed(name: str) -> ListedModel:
        return {
            "name": name, "model": name, "modified_at": moment(state.started), "size": size,
            "digest": hashlib.sha256(name.encode()).hexdigest(), "details": details(name),
        }  # fmt: skip

    @routes.get("/api/tags", responses=documented(ModelList))
    async def tags() -> ModelList:
        """The model and its adapters."""
        return {"models": [listed(name) for name in state.models]}

    @routes.get("/api/ps", responses=documented(RunningList))
    async def running() -> RunningList:
        """The same: all are loaded."""
        more = {"expires_at": NEVER, "size_vram": 0, "context_length": args.max_seq_len}
        return {"models": [{**listed(name), **more} for name in state.models]}  # type: ignore[typeddict-item]

    @routes.post("/api/show", responses=documented(ShownModel))
    async def show(body: ShowBody) -> ShownModel:
        """One model. Its template is in Jinja; mistral-common's has no text form, and is named."""
        name = body.model.removesuffix(LATEST)
        state.adapter(name)
        return {
            "modelfile": f"FROM {name}\n", "parameters": parameters(), "template": template,
            "details": details(name),
            "model_info": {
                "general.architecture": "llama", "general.basename": state.model_name,
                "general.parameter_count": count, "llama.context_length": args.max_seq_len,
                "llama.embedding_length": args.dim, "llama.block_count": args.n_layers,
                "llama.feed_forward_length": args.hidden_dim, "llama.attention.head_count": args.n_heads,
                "llama.attention.head_count_kv": args.n_kv_heads, "llama.vocab_size": args.vocab_size,
            },
            "capabilities": capabilities, "modified_at": moment(state.started),
        }  # fmt: skip

    @routes.get("/api/version", responses=documented(Version))
    async def version() -> Version:
        """The version of Ollama whose API this is."""
        return {"version": OLLAMA}

    return routes


def _short(count: int) -> str:
    """A number of parameters as Ollama writes it: "7.2B", "19.3M"."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
