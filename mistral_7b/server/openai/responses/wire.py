"""Request bodies of the Responses API. Imports no torch.

The fields that may be a string or a structure (`input`, `content`, `output`, `tool_choice`) are normalized to the
structure before validation, so that an error names the field as the client wrote it: `input.2.content.0.type`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from ..body import INT64, Body, First, Int, Part, not_served
from ..protocol import (
    MOST_LOGPROBS,
    MOST_MESSAGES,
    MOST_STOPS,
    SAY_PARAMETERS,
    Schema,
    Stop,
    StreamOptions,
)

MODES = ("auto", "none", "required")
TEXTS = ("input_text", "output_text", "text")
ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
Name = Annotated[str, StringConstraints(max_length=256)]
LOGPROBS = "message.output_text.logprobs"


def _as_items(value: Any) -> Any:
    """Expand a text to one message of the user."""
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    """Expand a text to one part."""
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_choice(value: Any) -> Any:
    """Expand "auto", "none" and "required" to an object."""
    return {"type": value} if isinstance(value, str) else value


class ContentPart(Part):
    """A part of a message or of a function's output. A refusal is the text of one."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ContentPart:
        if self.type not in (*TEXTS, "refusal"):
            raise ValueError(f"content part of type {self.type!r:.80}: Mistral 7B reads text only")
        if self.value is None:
            raise ValueError(f"a part of type {self.type} needs a text")
        return self

    @property
    def value(self) -> str | None:
        """The text."""
        return self.refusal if self.type == "refusal" else self.text


Content = Annotated[
    list[ContentPart], First(), BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart])
]


class Item(Part):
    """One item of the input; its type may be left out for a message and for a reference."""

    type: str
    id: Name | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    call_id: Name | None = None
    name: Name | None = None
    namespace: Name | None = None
    arguments: str | None = None
    output: Content | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") is None:
            data = {**data, "type": "message" if "role" in data or "id" not in data else "item_reference"}
        if isinstance(data, dict) and data.get("type") == "reasoning":  # its content is not part of the prompt
            return {"type": "reasoning"}
        return data

    @model_validator(mode="after")
    def _check(self) -> Item:
        needed = {
            "message": ("role", "content"), "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"), "reasoning": (), "item_reference": ("id",),
        }.get(self.type)  # fmt: skip
        if needed is None:
            raise ValueError(f"items of type {self.type!r:.80} are not supported; known are {', '.join(ITEMS)}")
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"an item of type {self.type} needs {name}")
        return self


Items = Annotated[
    list[Item], First(), Field(max_length=MOST_MESSAGES),
    BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
]  # fmt: skip


class Tool(Part):
    """A tool of any type, kept as it was sent. Function tools and namespaces of them can be called here."""

    model_config = ConfigDict(extra="allow")

    type: str
    name: Name | None = None  # a call's name must be valid in an item
    description: str | None = None
    parameters: Schema | None = None
    tools: Annotated[list[Tool], First()] | None = None  # of a namespace
    # Refused: ignoring them would offer a tool without parameters.
    input_schema: Annotated[None, SAY_PARAMETERS] = None
    inputSchema: Annotated[None, SAY_PARAMETERS] = None  # noqa: N815

    @model_validator(mode="after")
    def _check(self) -> Tool:
        if self.type in ("function", "namespace") and not self.name:
            raise ValueError(f"a tool of type {self.type} needs a name")
        return self


class AllowedTool(Part):
    """An entry of `tool_choice.tools`, kept as it was sent."""

    model_config = ConfigDict(extra="allow")

    type: str = "function"
    name: str | None = None


class Choice(Part):
    """`tool_choice`: a mode, a function, a set of allowed tools, or a tool of another type."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[AllowedTool], First()] | None = None

    @model_validator(mode="after")
    def _check(self) -> Choice:
        if self.type == "function" and not self.name:
            raise ValueError("tool_choice of type function needs a name")
        if self.type == "allowed_tools" and (self.mode is None or self.tools is None):
            raise ValueError("tool_choice of type allowed_tools needs mode and tools")
        return self


class Format(Body):
    """`text.format`"""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: StrictBool | None = None

    @model_validator(mode="after")
    def _check(self) -> Format:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("the type json_schema requires schema, and the others exclude it")
        return self


class TextConfig(Body):
    format: Format | None = None
    verbosity: str | None = None


class ResponsesRequest(Body):
    """POST /v1/responses. The fields of the second group are extensions of this server."""

    model: str | None = None
    input: Items = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    store: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], First()] | None = None
    tool_choice: (
        Annotated[
            Choice,
            BeforeValidator(_as_choice, json_schema_input_type=Literal["auto", "none", "required"] | Choice),
        ]
        | None
    ) = None
    parallel_tool_calls: StrictBool | None = None
    text: TextConfig | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    include: list[str] | None = None

    seed: Int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    top_k: Int | None = None
    min_p: StrictFloat | None = None
    presence_penalty: StrictFloat | None = None
    frequency_penalty: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    priority: Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=256)] | None = None

    # Without effect, but part of the response.
    metadata: dict[str, str] | None = None
    user: str | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # an over-long prompt is refused with either
    max_tool_calls: Annotated[StrictInt, Field(ge=0, lt=INT64)] | None = None  # of hosted tools
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Accepted and ignored.
    service_tier: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    context_management: Any = None
    access_programs: Any = None
    background_options: Any = None
    image: Any = None
    client_metadata: Any = None  # of Codex
    # Refused: ignoring them would change the response.
    background: StrictBool | None = None
    conversation: Annotated[None, not_served("use previous_response_id")] = None
    prompt: Annotated[None, not_served("this server has no prompt templates")] = None
    moderation: Annotated[None, not_served("this server has no moderation")] = None

    @field_validator("background")
    @classmethod
    def _refuse_background(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("not supported: responses are computed while the client waits")
        return value

    @property
    def with_logprobs(self) -> bool:
        """Whether the response's text has log-probabilities."""
        return LOGPROBS in (self.include or ())
