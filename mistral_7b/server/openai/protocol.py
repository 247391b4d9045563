"""Request bodies: OpenAI's fields, with vLLM's and Mistral's extensions. Imports no torch.

Pydantic validates them: a wrong type or an unknown field gives a 400 that names the field. Base classes are in
body.py, vLLM's defaults in vllm.py, response bodies in responses.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import MaxLen
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    model_validator,
)

from ...sampling.params import SamplingParams
from ..http.errors import HttpError
from .body import Body, First, Int, Part, not_served, only, sampling_params
from .vllm import Constraint, Defaults
from .watching import Watching

MOST_MESSAGES = 4096
MOST_STOPS = 16
LONGEST_STOP = 256  # characters: each new token is compared with all stop strings
MOST_IDS = 1024  # entries of stop_token_ids and logit_bias
MOST_LOGPROBS = 20
MOST_PROMPTS = 2048  # limit of parsing; ServerConfig.max_prompts limits what is served


Stop = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
Ids = Annotated[list[Int], First()]
Texts = Annotated[list[str], First(), MaxLen(MOST_PROMPTS)]
IdLists = Annotated[list[Ids], First(), MaxLen(MOST_PROMPTS)]
Prompts = str | Texts | Ids | IdLists
Schema = dict[str, Any]


class StreamOptions(Body):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None  # ignored: the streams are not padded


def _at_least_one(value: int) -> int:
    if value == 0:
        raise ValueError("must be at least 1, or -1 for no limit")
    return value


NO_LIMIT = -1  # of max_tokens: as many as the context holds
Limit = Annotated[Int, Field(ge=NO_LIMIT), AfterValidator(_at_least_one)]


class Sampling(Constraint, Defaults, Watching):
    """Fields that chat completions and completions share."""

    model: str | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Int, Field(ge=1)] | None = None
    max_tokens: Annotated[Int, Field(ge=NO_LIMIT)] | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    seed: Int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: StrictFloat | None = None
    frequency_penalty: StrictFloat | None = None
    logit_bias: Annotated[dict[str, StrictFloat], Field(max_length=MOST_IDS)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # vLLM's
    top_k: Int | None = None
    min_p: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=MOST_IDS)] | None = None
    best_of: Int | None = None
    priority: Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=256)] | None = None
    # Mistral's
    random_seed: Int | None = None

    def params(self, defaults: Mapping[str, Any], **others: Any) -> SamplingParams:
        """The engine's sampling parameters, with the model's `defaults` for fields that the request leaves out.

        SamplingError names a field that is out of range.
        """
        names = (
            "n", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias",
            "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.seed is None and self.random_seed is not None:
            given["seed"] = self.random_seed
        return sampling_params({**defaults, **given, "structured_outputs": self.constraint(), **others})

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class FunctionCall(Part):
    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(Part):
    id: str | None = None
    function: FunctionCall


class Message(Part):
    """One message of a conversation. Extra fields of a response (annotations, reasoning, ...) may be sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    prefix: StrictBool | None = None
    # Refused: the prompt would not contain them.
    function_call: Annotated[None, not_served("use tool_calls")] = None
    audio: Annotated[None, not_served("this model reads and writes text")] = None
    refusal: Annotated[None, not_served("put it into content")] = None

    @model_validator(mode="after")
    def _assistant_fields(self) -> Message:
        if self.role != "assistant" and (self.tool_calls or self.prefix):
            raise ValueError(f"{'tool_calls' if self.tool_calls else 'prefix'} requires the role assistant")
        return self


SAY_PARAMETERS = not_served("use parameters")


class Function(Part):
    name: str
    description: str | None = None
    parameters: Schema | None = None
    strict: StrictBool | None = None
    # Refused: ignoring them would offer a tool without parameters.
    input_schema: Annotated[None, SAY_PARAMETERS] = None
    inputSchema: Annotated[None, SAY_PARAMETERS] = None  # noqa: N815
    parametersJsonSchema: Annotated[None, SAY_PARAMETERS] = None  # noqa: N815


class ToolDefinition(Part):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Part):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: FunctionName


class SchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(SchemaFormat):
    """OpenAI's format; `schema` next to `type` is also valid, as in llama.cpp, Together and Fireworks."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _one_schema(self) -> ResponseFormat:
        if self.json_schema is not None and (self.type != "json_schema" or self.schema_ is not None):
            raise ValueError("json_schema requires the type json_schema, and excludes schema")
        if self.type == "text" and self.schema_ is not None:
            raise ValueError("schema requires the type json_object or json_schema")
        return self


class Ending(Body):
    """vLLM's fields for the end of a conversation.

    Mistral's template opens the assistant's turn without any tokens, so `add_generation_prompt` alone has no
    effect. `continue_final_message` is equivalent to Mistral's `"prefix": true`.
    """

    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None

    def plain(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as dictionaries; one to continue gets "prefix". HttpError if the last cannot be continued."""
        out = [dict(plain(m)) for m in messages]
        if self.continue_final_message:
            field, last = "continue_final_message", messages[-1]
            if self.add_generation_prompt:
                raise HttpError(400, f"{field} and add_generation_prompt exclude each other", field=field)
            if last.role != "assistant" or last.tool_calls or not last.content:
                raise HttpError(400, f"{field} requires a last message with role assistant and text", field=field)
            out[-1]["prefix"] = True
        return out


class ChatRequest(Sampling, Ending):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], First(), Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Limit | None = None
    max_tokens: Limit | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["auto", "none", "required", "any"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    echo: Annotated[StrictBool | None, only(False)] = None
    add_special_tokens: Annotated[StrictBool | None, only(False)] = None  # the template has them
    safe_prompt: StrictBool | None = None
    # Accepted and ignored: they would not change the response.
    store: Any = None
    service_tier: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    safety_identifier: Any = None
    prompt_mode: Any = None
    modalities: list[Literal["text"]] | None = None
    # Refused: ignoring them would change the response.
    functions: Annotated[None, not_served("use tools")] = None
    function_call: Annotated[None, not_served("use tool_choice")] = None
    audio: Annotated[None, not_served("this model reads and writes text")] = None
    web_search_options: Annotated[None, not_served("this server has no web search")] = None
    moderation: Annotated[None, not_served("this server has no moderation")] = None
    guardrails: Annotated[None, not_served("this server has no moderation; safe_prompt adds a system prompt")] = (
        None
    )
    prompt_logprobs: Annotated[None, not_served("use /v1/completions with echo and logprobs")] = None
    top_prompt_logprobs: Annotated[None, not_served("use /v1/completions with echo and logprobs")] = None

    @property
    def of_mistral(self) -> bool:
        """Whether Mistral's fields are used: its streams have whole tool calls, and usage in the last chunk."""
        return self.tool_choice == "any" or any(
            value is not None for value in (self.random_seed, self.safe_prompt, self.prompt_mode)
        )

    @property
    def given_limit(self) -> int | None:
        """Token limit of the response, or NO_LIMIT; None if the request has none."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: Prompts
    echo: StrictBool | None = None
    add_special_tokens: Annotated[StrictBool | None, only(True)] = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: str | None = None


class EmbeddingRequest(Body):
    """POST /v1/embeddings. `pooling` and `normalize` are extensions of this server."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None
    output_dimension: Int | None = None  # Mistral's name for it
    output_dtype: Literal["float"] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    pooling: Literal["mean", "last"] = "mean"
    normalize: StrictBool = True
    priority: Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=256)] | None = None


def prompts_of(prompt: Prompts) -> list[Any]:
    """The prompts as a list; each is a string or a list of token ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


def plain(part: BaseModel) -> Mapping[str, Any]:
    """A part as the dictionary that was sent, without null fields."""
    return part.model_dump(exclude_none=True, by_alias=True)


def plain_tools(tools: Sequence[ToolDefinition] | None) -> list[dict[str, Any]] | None:
    """Tools as dictionaries, each with `parameters`, which Mistral's template requires; None for none."""
    out = [dict(plain(tool)) for tool in tools or ()]
    for tool in out:
        tool["function"].setdefault("parameters", {"type": "object", "properties": {}})
    return out or None
