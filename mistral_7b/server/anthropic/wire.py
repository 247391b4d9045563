"""Request bodies of Anthropic's Messages API, and their conversion to OpenAI's message format.

    Anthropic                                   OpenAI format, as messages.py reads it
    system                                      a first message with role system
    user: [tool_result ..., text ...]           a tool message for each result, then a user message
    assistant: [text ..., tool_use ...]         one assistant message; only its calls, if there are any
    assistant, as the last message              "prefix": True: it is continued, trailing whitespace included
    tool {name, input_schema}                   {"type": "function", "function": {name, parameters}}

Mistral's template supports neither text next to tool calls nor `is_error`. The text is dropped, as Mistral's own
template does, and the result of a failed call gets the prefix "Error: ".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, field_validator, model_validator

from ...errors import TokenizerError
from ...sampling.params import SamplingParams, StructuredOutputs
from ..openai.body import INT64, not_served, sampling_params, without_nulls
from ..openai.protocol import MOST_MESSAGES, MOST_STOPS, Stop

MOST_TOKENS = 2**31 - 1
NO_THINKING = "this model does not think before it answers: leave `thinking` out, or disable it"

# ---------------------------------------------------------------------- request bodies


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


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]
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


class _Conversation(_Strict):
    """Fields that /v1/messages and /v1/messages/count_tokens share."""

    model: str
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    system: Texts | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    # Accepted and ignored.
    cache_control: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    @field_validator("thinking")
    @classmethod
    def _refuse_thinking(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "disabled":
            raise ValueError(NO_THINKING)
        return value

    @model_validator(mode="after")
    def _need_tools(self) -> _Conversation:
        if isinstance(self.tool_choice, AnyChoice | NamedChoice) and not self.tools:
            raise ValueError("tool_choice requires a call, but there are no tools")
        return self


class CountRequest(_Conversation):
    """POST /v1/messages/count_tokens."""


class MessagesRequest(_Conversation):
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
    container: Annotated[None, not_served("this server cannot run code")] = None

    def params(self) -> SamplingParams:
        """The engine's sampling parameters. SamplingError names a field that is out of range."""
        given = {
            "max_tokens": self.max_tokens, "stop": self.stop_sequences, "temperature": self.temperature,
            "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed, "structured_outputs": self._spec(),
        }  # fmt: skip
        return sampling_params({name: value for name, value in given.items() if value is not None})

    def _spec(self) -> StructuredOutputs | None:
        """The constraint on the text, or None."""
        if self.output_config is not None and self.output_config.format is not None:
            return StructuredOutputs(json=self.output_config.format.json_schema)
        return None


# ---------------------------------------------------------------------- conversion to OpenAI's format


class ConversationError(TokenizerError):
    """A conversation that breaks Anthropic's rules."""


@dataclass
class Conversation:
    """Messages in OpenAI's format. Each label names the field of the request that the message comes from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, label: str, message: Mapping[str, Any]) -> None:
        self.messages.append(dict(message))
        self.labels.append(label)


def conversation(request: _Conversation) -> Conversation:
    """Convert the conversation of a request. ConversationError names a message that breaks Anthropic's rules."""
    out = Conversation()
    if request.system and any(block.text for block in request.system):
        out.add("system", {"role": "system", "content": _text(request.system)})
    called: set[str] = set()  # ids of the last assistant turn's calls that have no result yet
    for i, message in enumerate(request.messages):
        origin = f"messages[{i}]"
        blocks = message.content
        if not blocks:
            raise ConversationError(f"{origin} has no content", field=f"{origin}.content")
        if message.role == "assistant":
            called = _add_assistant(out, origin, blocks)
        else:
            called -= _add_user(out, origin, message.role, blocks, called)
    if out.messages[-1]["role"] == "assistant":
        if called:
            raise ConversationError(
                f"{out.labels[-1]} calls tools: their results must follow", field=out.labels[-1]
            )
        out.messages[-1]["prefix"] = True
    return out


def _add_assistant(out: Conversation, origin: str, blocks: Sequence[Block]) -> set[str]:
    """Add an assistant turn; return the ids of its calls."""
    calls = [b for b in blocks if isinstance(b, ToolUseBlock)]
    if any(isinstance(b, ToolResultBlock) for b in blocks):
        raise ConversationError(f"{origin}: a tool_result requires the role user", field=origin)
    if len({call.id for call in calls}) < len(calls):
        raise ConversationError(f"{origin}: two calls have the same id", field=origin)
    if calls:
        out.add(origin, {"role": "assistant", "tool_calls": [_call(call) for call in calls]})
    else:
        out.add(origin, {"role": "assistant", "content": _text(blocks)})
    return {call.id for call in calls}


def _add_user(out: Conversation, origin: str, role: str, blocks: Sequence[Block], called: set[str]) -> set[str]:
    """Add a user or system turn; return the ids of the calls that it has results for."""
    if any(isinstance(b, ToolUseBlock) for b in blocks):
        raise ConversationError(f"{origin}: a tool_use requires the role assistant", field=origin)
    results = [b for b in blocks if isinstance(b, ToolResultBlock)]
    for result in results:
        if result.tool_use_id not in called or role != "user":
            raise ConversationError(
                f"{origin}: the previous turn has no call with id {result.tool_use_id!r:.80}", field=origin
            )
        out.add(origin, {"role": "tool", "tool_call_id": result.tool_use_id, "content": _result(result)})
    texts = [b for b in blocks if isinstance(b, TextBlock)]
    if texts or not results:
        out.add(origin, {"role": role, "content": _text(texts)})
    return {result.tool_use_id for result in results}


def _text(blocks: Sequence[Block]) -> Any:
    """The content of text blocks: a string for one block, otherwise a list."""
    texts = [b.text for b in blocks if isinstance(b, TextBlock)]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _result(result: ToolResultBlock) -> Any:
    """The content of a tool result."""
    blocks = result.content or [TextBlock(type="text", text="")]
    if result.is_error:
        blocks = [TextBlock(type="text", text="Error: " + blocks[0].text), *blocks[1:]]
    return _text(blocks)


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def offered(request: _Conversation) -> list[dict[str, Any]] | None:
    """The tools in OpenAI's format; None if the prompt must not contain any."""
    if not request.tools or isinstance(request.tool_choice, NoChoice):
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name, "description": tool.description or "", "parameters": tool.input_schema,
            },
        }
        for tool in request.tools
    ]  # fmt: skip


def chosen(request: _Conversation) -> str | dict[str, Any]:
    """`tool_choice` in OpenAI's format."""
    choice = request.tool_choice
    if isinstance(choice, NamedChoice):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AnyChoice):
        return "required"
    return "none" if isinstance(choice, NoChoice) else "auto"


def most_calls(request: _Conversation) -> int | None:
    """The maximum number of tool calls in one turn; None: no limit."""
    choice = request.tool_choice
    return 1 if choice is not None and getattr(choice, "disable_parallel_tool_use", False) else None
