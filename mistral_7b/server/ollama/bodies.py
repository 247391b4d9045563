"""Request bodies of Ollama's API, and their conversion to OpenAI's message format. Imports no torch.

Unknown fields and options are ignored, as Ollama does: clients send options of its runner (`num_ctx`, `num_gpu`).
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, field_validator

from ...sampling.params import SamplingParams, StructuredOutputs
from ..http.errors import HttpError
from ..openai.body import INT64, Part, not_served, only, sampling_params
from ..openai.protocol import MOST_MESSAGES, MOST_PROMPTS, MOST_STOPS, Stop, ToolDefinition

DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}  # Ollama's
LATEST = ":latest"  # the tag that Ollama adds to names without one


_ELSEWHERE = not_served("POST /v1/completions and /v1/chat/completions take it, with an admin key")


class _Unwatched(Part):
    """Refuses this server's own fields: ignored, they would cost an answer without what was asked for."""

    record: Annotated[None, _ELSEWHERE] = None
    steer: Annotated[None, _ELSEWHERE] = None


class Options(_Unwatched):
    """Options of the sampler."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    num_predict: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class _Named(_Unwatched):
    model: str

    @field_validator("model")
    @classmethod
    def _untagged(cls, value: str) -> str:
        return value.removesuffix(LATEST)


class _Ask(_Named):
    """Fields of /api/chat and /api/generate. `think` and `keep_alive` are ignored."""

    stream: bool = True
    format: str | dict[str, Any] | None = None
    options: Options = Field(default_factory=Options)
    logprobs: Annotated[bool | None, only(False)] = None

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The engine's sampling parameters: those of the request, else the model's `defaults`, else Ollama's.

        HttpError or SamplingError for a format that cannot be used.
        """
        options = self.options
        given: dict[str, Any] = {
            "temperature": options.temperature, "top_p": options.top_p, "min_p": options.min_p,
            "top_k": None if options.top_k is None else max(0, options.top_k), "seed": options.seed,
            "repetition_penalty": options.repeat_penalty, "presence_penalty": options.presence_penalty,
            "frequency_penalty": options.frequency_penalty, "stop": options.stop or None,
        }  # fmt: skip
        given = {**DEFAULTS, **defaults, **{name: value for name, value in given.items() if value is not None}}
        limit = defaults.get("max_tokens") if options.num_predict is None else max(0, options.num_predict) or None
        return sampling_params({**given, "max_tokens": limit, "structured_outputs": self._structured()})

    def _structured(self) -> StructuredOutputs | None:
        if not self.format:
            return None
        if self.format == "json":
            return StructuredOutputs(json_object=True)
        if isinstance(self.format, str):
            raise HttpError(400, 'format must be "json" or a JSON schema', field="format")
        return StructuredOutputs(json=self.format)


class CalledFunction(Part):
    name: str
    arguments: dict[str, Any] | None = None


class ToolCall(Part):
    id: str | None = None
    function: CalledFunction


class Message(Part):
    """One message. `thinking` is ignored."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Annotated[list[Any] | None, only([])] = None


class ChatBody(_Ask):
    """POST /api/chat. Without messages it asks to load the model."""

    messages: Annotated[list[Message], Field(max_length=MOST_MESSAGES)] = Field(default_factory=list)
    tools: list[ToolDefinition] | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages in OpenAI's format. A last one with role assistant is continued.

        Ollama's calls have no ids: a result belongs to the first open call of its `tool_name`, or to the
        first at all.
        """
        out: list[dict[str, Any]] = []
        open_calls = _OpenCalls(())
        for i, message in enumerate(self.messages):
            told: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.role == "assistant":
                calls = [(c.id or f"call_{i}_{k}", c.function) for k, c in enumerate(message.tool_calls or ())]
                open_calls = _OpenCalls([(id, function.name) for id, function in calls])
                told["tool_calls"] = [_call(id, function) for id, function in calls]
            elif message.role == "tool" and message.tool_call_id is None:
                told["tool_call_id"] = open_calls.take(message.tool_name)
            elif message.role == "tool":
                told["tool_call_id"] = message.tool_call_id
            out.append(told)
        if out and out[-1]["role"] == "assistant" and not out[-1]["tool_calls"]:
            if out[-1]["content"]:
                out[-1]["prefix"] = True
            else:
                out.pop()
        return out


class _OpenCalls:
    """The calls of a message that have no result yet. All takes together cost time linear in the calls."""

    def __init__(self, calls: Sequence[tuple[str, str]]) -> None:
        """`calls`: the id and the name of each call."""
        self._ids = OrderedDict((place, id) for place, (id, _) in enumerate(calls))  # of the open calls
        self._named: dict[str | None, deque[int]] = {}  # places, also of calls that were taken without a name
        for place, (_, name) in enumerate(calls):
            self._named.setdefault(name, deque()).append(place)

    def take(self, name: str | None) -> str | None:
        """Remove the first open call of a name, or else the first one, and return its id. None if none is open."""
        places = self._named.get(name, deque())
        while places:
            if (id := self._ids.pop(places.popleft(), None)) is not None:
                return id
        return self._ids.popitem(last=False)[1] if self._ids else None


def _call(id: str, function: CalledFunction) -> dict[str, Any]:
    arguments = json.dumps(function.arguments or {}, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": function.name, "arguments": arguments}}


class GenerateBody(_Ask):
    """POST /api/generate. Without a prompt it asks to load the model."""

    prompt: str = ""
    system: str = ""
    raw: bool = False
    context: list[Annotated[int, Field(ge=0)]] | None = None  # of the response that is continued
    suffix: Annotated[str | None, only("")] = None
    template: Annotated[str | None, only("")] = None
    images: Annotated[list[Any] | None, only([])] = None


class EmbedBody(_Named):
    """POST /api/embed."""

    input: str | Annotated[list[str], Field(max_length=MOST_PROMPTS)]
    truncate: bool = True
    dimensions: int | None = None


class OldEmbedBody(_Named):
    """POST /api/embeddings, the older form for one text."""

    prompt: str


class ShowBody(Part):
    """POST /api/show. Older clients say `name`."""

    model: str = Field(validation_alias=AliasChoices("model", "name"))
