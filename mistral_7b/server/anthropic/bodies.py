"""Request bodies of Anthropic's Messages API, validated by pydantic. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from ...sampling.params import SamplingParams, StructuredOutputs
from ..openai.body import INT64, not_served, sampling_params, without_nulls
from ..openai.protocol import MOST_MESSAGES, MOST_STOPS, Stop

MOST_TOKENS = 2**31 - 1
CLIENTS_TOOLS = ("bash_", "text_editor_", "computer_", "memory_")  # of Anthropic; the client runs them


class _Wire(BaseModel):
    """Base class with strict types: "5" is not a number.

    Messages, blocks and tools ignore unknown fields, because clients add hints such as `cache_control`.
    """

    model_config = ConfigDict(strict=True, protected_namespaces=(), hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return without_nulls(cls, data)


class _Strict(_Wire):
    """Base class of all other bodies, in which unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


def _as_blocks(content: Any) -> Any:
    """Expand a string to one text block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of blocks")
    return content


class TextBlock(_Wire):
    type: Literal["text"]
    text: str


class ToolUseBlock(_Wire):
    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]


Texts = Annotated[list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])]


class ToolResultBlock(_Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


class ThinkingBlock(_Wire):
    """Thoughts of another model, which are left out."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]
Blocks = Annotated[list[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])]


class Message(_Wire):
    role: Literal["user", "assistant", "system"]
    content: Blocks


class Tool(_Wire):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    allowed_callers: list[Literal["direct"]] | None = None  # the model is the only caller
    input_examples: Annotated[None, not_served("Mistral's template has none; use the description")] = None


class ServerTool(_Wire):
    """A tool that Anthropic's servers run, such as web search: left out."""

    type: str
    name: str | None = None

    @field_validator("type")
    @classmethod
    def _on_servers(cls, value: str) -> str:
        if value.startswith(CLIENTS_TOOLS):
            raise ValueError(f"{value!r:.80} has no input_schema here: define it as a custom tool")
        return value


def _kind(tool: Any) -> str:
    """Which of the two a tool is: one of Anthropic's has a type and no schema."""
    of = tool.get if isinstance(tool, dict) else lambda name: getattr(tool, name, None)
    return "custom" if of("input_schema") is not None or of("type") in (None, "custom") else "server"


AnyTool = Annotated[Annotated[Tool, Tag("custom")] | Annotated[ServerTool, Tag("server")], Discriminator(_kind)]


class AutoChoice(_Strict):
    type: Literal["auto"]
    disable_parallel_tool_use: bool = False


class AnyChoice(_Strict):
    type: Literal["any"]
    disable_parallel_tool_use: bool = False


class NamedChoice(_Strict):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class NoChoice(_Strict):
    type: Literal["none"]
    disable_parallel_tool_use: bool = False


Choice = Annotated[AutoChoice | AnyChoice | NamedChoice | NoChoice, Field(discriminator="type")]


class JSONFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Strict):
    format: JSONFormat | None = None
    effort: str | None = None


class Conversing(_Strict):
    """Fields that /v1/messages and /v1/messages/count_tokens share."""

    model: str
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    system: Texts | None = None
    tools: list[AnyTool] | None = None
    tool_choice: Choice | None = None
    output_config: OutputConfig | None = None
    # Accepted and ignored.
    thinking: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    betas: Any = None
    cache_control: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    @property
    def own_tools(self) -> list[Tool]:
        """The tools that the model can call."""
        return [tool for tool in self.tools or () if isinstance(tool, Tool)]

    @model_validator(mode="after")
    def _need_tools(self) -> Conversing:
        choice = self.tool_choice
        if isinstance(choice, NamedChoice):
            for tool in self.tools or ():
                if isinstance(tool, ServerTool) and tool.name == choice.name:
                    raise ValueError(f"tool_choice requires {choice.name!r:.80}, which this server cannot run")
        if isinstance(choice, AnyChoice | NamedChoice) and not self.own_tools:
            raise ValueError("tool_choice requires a call, but there are no tools that this server can offer")
        return self


class CountRequest(Conversing):
    """POST /v1/messages/count_tokens."""


class MessagesRequest(Conversing):
    """POST /v1/messages. `seed` is an extension of this server."""

    max_tokens: int = Field(ge=1, le=MOST_TOKENS)
    stop_sequences: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    metadata: dict[str, Any] | None = None
    # Accepted and ignored.
    service_tier: Any = None
    inference_geo: Any = None
    diagnostics: Any = None
    container: Any = None  # of code that Anthropic's servers run

    def params(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """The engine's sampling parameters, with the model's `defaults` for fields that the request leaves out.

        SamplingError names a field that is out of range.
        """
        given = {
            "max_tokens": self.max_tokens, "stop": self.stop_sequences, "temperature": self.temperature,
            "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed, "structured_outputs": self._spec(),
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        return sampling_params({**(defaults or {}), **given})

    def _spec(self) -> StructuredOutputs | None:
        """The constraint on the text, or None."""
        if self.output_config is not None and self.output_config.format is not None:
            return StructuredOutputs(json=self.output_config.format.json_schema)
        return None
