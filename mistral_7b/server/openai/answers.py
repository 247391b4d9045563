"""Response bodies of the OpenAI-compatible routes. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import BaseModel
from typing_extensions import TypedDict  # pydantic requires it before Python 3.12

from ...text.facts import TokenizerFacts


# Errors are classes: each route documents some ten, and pydantic makes the schema of a TypedDict anew every time.
class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class PromptDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    name: str
    arguments: str


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """A part of a tool call. Only the first part has id, type and name; Mistral's client needs a name in each."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Call(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[Call]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class Recorded(TypedDict):
    """Recorded activations: a base64 of a safetensors file. Only for requests with `record`."""

    format: Literal["safetensors"]
    data: str


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    recorded: NotRequired[Recorded]


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[CallDelta]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]
    recorded: NotRequired[Recorded]


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    id: str
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Score(TypedDict):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingUsage


class RerankedDocument(TypedDict):
    text: str


class RerankResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[RerankedDocument]


class Reranked(TypedDict):
    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage


class Capabilities(TypedDict):
    completion_chat: bool
    function_calling: bool


class Model(TypedDict):
    """A model in the lists of OpenAI, vLLM, Mistral and Anthropic, whose fields follow in this order.

    The last four are this server's own: see model_info.py, and text/facts.py for the tokenizer.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    type: Literal["base"]
    capabilities: Capabilities
    max_context_length: int
    display_name: str
    created_at: str
    precision: str
    chat_template: bool | None
    tokenizer: TokenizerFacts | None
    sampling_defaults: dict[str, float]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]
    first_id: str
    last_id: str
    has_more: bool


class Health(TypedDict):
    status: str


class Version(TypedDict):
    version: str


def documented(*statuses: int, answer: Any = None, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route: its success model and the error statuses, for the OpenAPI schema."""
    out: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer} for status in statuses}
    if answer is not None:
        out[200] = {"model": answer}
    if stream:
        out.setdefault(200, {})["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return out
