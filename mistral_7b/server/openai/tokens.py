"""POST /tokenize and /detokenize, as in vLLM: text or conversations to token ids, and ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, FailFast, Field, StrictBool, StrictInt, model_validator
from pydantic_core import to_json
from starlette.responses import Response

from ...errors import GenerationError, TokenizerError
from ...text.tokenizer import Tokenizer
from ..http.errors import HttpError
from ..http.json_bodies import JsonRoute, json_answer
from ..state import State
from .answers import documented
from .protocol import MOST_MESSAGES, Body, Ending, Message, ToolDefinition, plain_tools


class TokenizeRequest(Ending):
    """POST /tokenize: either `prompt`, or `messages` with optional `tools`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    tools: list[ToolDefinition] | None = None
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool | None = None

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is None and (self.tools or self.continue_final_message):
            raise ValueError("tools and continue_final_message require messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize. Ids of the vocabulary that have no text are skipped."""

    model: str | None = None
    tokens: Annotated[list[Annotated[StrictInt, Field(ge=0)]], FailFast()]


class TokenizeAnswer(BaseModel):
    """Response of /tokenize. `token_strs`: readable forms such as " the", "[INST]", "<0xE2>"."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    prompt: str


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["tokens"], route_class=JsonRoute)

    @routes.post("/tokenize", responses=documented(400, 404, answer=TokenizeAnswer))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text or a conversation, as the model would receive them."""
        state.adapter(body.model)
        return json_answer(await state.workers.run(partial(_tokenize, state, body)))

    @routes.post("/detokenize", responses=documented(400, 404, answer=DetokenizeAnswer))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        state.adapter(body.model)
        return json_answer(await state.workers.run(partial(_detokenize, state, body)))

    return routes


def _tokenizer(state: State) -> Tokenizer:
    if state.llm.tokenizer is None:
        raise GenerationError(f"this model has no tokenizer: {state.llm.inputs.tokenizer_error}")
    return state.llm.tokenizer


def _tokenize(state: State, body: TokenizeRequest) -> bytes:
    """The response as JSON. Slow for a large body: run it on a worker."""
    tokenizer = _tokenizer(state)
    ids = _encode(tokenizer, body)
    return to_json({
        "count": len(ids), "max_model_len": state.llm.engine.model.args.max_seq_len, "tokens": ids,
        "token_strs": _pieces(tokenizer, ids) if body.return_token_strs else None,
    })  # fmt: skip


def _detokenize(state: State, body: DetokenizeRequest) -> bytes:
    """The response as JSON. Slow for a large body: run it on a worker."""
    vocab_size = state.llm.engine.model.args.vocab_size
    for i, token in enumerate(body.tokens):
        if token >= vocab_size:
            raise HttpError(400, f"tokens.{i}: {token} is not below the vocabulary size {vocab_size}",
                          field="tokens")  # fmt: skip
    return to_json({"prompt": _tokenizer(state).decode(body.tokens)})


def _encode(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        try:
            return tokenizer.encode(body.prompt, bos=body.add_special_tokens)
        except TokenizerError as e:
            raise TokenizerError.of(e, field="prompt") from e
    assert body.messages is not None  # validated by _prompt_or_messages
    return tokenizer.encode_chat(body.plain(body.messages), plain_tools(body.tools))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.piece(token) for token in ids]
