"""POST /tokenize and /detokenize, as vLLM has them: a text, or a conversation, to token ids, and ids to a text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, FailFast, Field, StrictBool, StrictInt, model_validator
from starlette.responses import Response

from ..errors import GenerationError, TokenizerError
from ..tokenizer import Tokenizer
from .answers import documented
from .problems import Refusal
from .protocol import MOST_MESSAGES, Body, Ending, Message, ToolDefinition, plain_tools
from .routes import JsonRoute, json_answer
from .state import State


class TokenizeRequest(Ending):
    """A `prompt`, or `messages` with their `tools`: one of the two."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    tools: list[ToolDefinition] | None = None
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt or messages, one of the two")
        if self.messages is None and (self.tools or self.continue_final_message):
            raise ValueError("tools and continue_final_message go with messages")
        return self


class DetokenizeRequest(Body):
    """Ids of the model's vocabulary to a text, those without text left out."""

    model: str | None = None
    tokens: Annotated[list[Annotated[StrictInt, Field(ge=0)]], FailFast()]


class TokenizeAnswer(BaseModel):
    """`token_strs` are the tokens as a person should see them: " the", "[INST]", "<0xE2>"."""

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
    async def tokenize(asked: TokenizeRequest) -> Response:
        """Token ids of a text or of a conversation, as the model would be given them."""
        state.adapter(asked.model)
        tokenizer = _tokenizer(state)
        ids = await asyncio.to_thread(_encode, tokenizer, asked)
        return json_answer(
            {
                "count": len(ids), "max_model_len": state.llm.engine.model.args.max_seq_len, "tokens": ids,
                "token_strs": _pieces(tokenizer, ids) if asked.return_token_strs else None,
            }
        )  # fmt: skip

    @routes.post("/detokenize", responses=documented(400, 404, answer=DetokenizeAnswer))
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """The text of token ids."""
        state.adapter(asked.model)
        most = state.llm.engine.model.args.vocab_size
        for place, token in enumerate(asked.tokens):
            if token >= most:
                raise Refusal(400, f"tokens.{place}: {token} lies outside the vocabulary of {most}",
                              field="tokens")  # fmt: skip
        text = await asyncio.to_thread(_tokenizer(state).decode, asked.tokens)
        return json_answer({"prompt": text})

    return routes


def _tokenizer(state: State) -> Tokenizer:
    if state.llm.tokenizer is None:
        raise GenerationError(f"this model has no tokenizer: {state.llm.reader.why}")
    return state.llm.tokenizer


def _encode(tokenizer: Tokenizer, asked: TokenizeRequest) -> list[int]:
    if asked.prompt is not None:
        try:
            return tokenizer.encode(asked.prompt, bos=asked.add_special_tokens)
        except TokenizerError as e:
            raise TokenizerError.of(e, field="prompt") from e
    assert asked.messages is not None  # as _one_of_two has seen
    return tokenizer.encode_chat(asked.plain(asked.messages), plain_tools(asked.tools))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.piece(token) for token in ids]
