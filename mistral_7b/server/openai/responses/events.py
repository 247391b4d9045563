"""The Response object, whole or as the events of its stream. Imports no torch.

    chunks     "Let me "     "look."   call 0: weather   call 0: {"city": "Rome"}   finish: tool_calls
    events     added · delta    delta       done · added       delta                      done · completed
    output     message "Let me look."      function_call weather {"city": "Rome"}

A route that does not stream drops the events and reads `response` at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic requires it before Python 3.12

from ...http.errors import HttpError
from ..answers import CallDelta, ChoiceLogprobs, ChunkChoice, Usage
from .conversation import fresh
from .wire import MODES, ResponsesRequest

Event = dict[str, Any]  # has a "type" and a "sequence_number"
Item = dict[str, Any]
PLAIN_FORMAT = {"format": {"type": "text"}}


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseAnswer(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[Item]
    usage: ResponseUsage | None
    instructions: str | None
    previous_response_id: str | None
    store: bool
    background: bool
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    max_output_tokens: int | None
    max_tool_calls: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    truncation: str
    reasoning: dict[str, Any]
    service_tier: str
    metadata: dict[str, str]
    user: str | None
    prompt_cache_key: str | None
    safety_identifier: str | None


class ItemList(TypedDict):
    object: Literal["list"]
    data: list[Item]
    first_id: str
    last_id: str
    has_more: bool


class Deleted(TypedDict):
    id: str
    object: Literal["response"]
    deleted: bool


def begun(body: ResponsesRequest, model: str, defaults: Mapping[str, Any] | None = None) -> ResponseAnswer:
    """The Response object of a request, in progress and without output."""
    choice: Any = "auto"
    defaults = defaults or {}
    if body.tool_choice is not None:
        choice = body.tool_choice.model_dump(exclude_unset=True)
        choice = choice["type"] if choice["type"] in MODES else choice
    text = (
        PLAIN_FORMAT
        if body.text is None
        else PLAIN_FORMAT | body.text.model_dump(exclude_none=True, by_alias=True)
    )
    return {
        "id": fresh("resp"), "object": "response", "created_at": int(time.time()), "completed_at": None,
        "status": "in_progress", "error": None, "incomplete_details": None, "model": model, "output": [],
        "usage": None, "instructions": body.instructions, "previous_response_id": body.previous_response_id,
        "store": body.store is not False, "background": False,
        "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools or ()], "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls is not False, "text": text,
        "max_output_tokens": body.max_output_tokens, "max_tool_calls": body.max_tool_calls,
        "temperature": defaults.get("temperature", 1.0) if body.temperature is None else body.temperature,
        "top_p": defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation or "disabled",
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})}, "service_tier": "default",
        "metadata": body.metadata or {}, "user": body.user, "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
    }  # fmt: skip


def usage_of(usage: Usage) -> ResponseUsage:
    """Token counts in this API's names."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }  # fmt: skip


class Answer:
    """A Response object built from the chunks of a chat completion.

    `origins`: name and namespace of each function, by its name in the prompt.
    """

    def __init__(self, response: ResponseAnswer, origins: Mapping[str, tuple[str, str | None]]) -> None:
        self.response, self._origins = response, origins
        self._number = 0  # of the next event
        self._texts: list[str] = []  # of the last item: text, or arguments
        self._logprobs: list[Any] = []  # of the last item
        self._open = False  # whether the last item has no end yet
        self._cut = False  # whether the token limit ended the completion

    def begin(self) -> list[Event]:
        """The first events."""
        return [self._of_response("created"), self._of_response("in_progress")]

    def take(self, chunk: ChunkChoice) -> Iterator[Event]:
        """Add a chunk; yield its events. Text precedes the calls, or follows them if their list is invalid."""
        delta = chunk["delta"]
        text, logprobs, calls = delta.get("content") or "", chunk["logprobs"], delta.get("tool_calls", [])
        before = not any(item["type"] == "function_call" for item in self.response["output"])
        if before:
            yield from self._write(text, logprobs)
        for call in calls:
            yield from self._call(call)
        if not before:
            yield from self._write(text, logprobs)
        self._cut = self._cut or chunk["finish_reason"] == "length"

    def end(self, usage: Usage) -> Iterator[Event]:
        """The final events."""
        if not self.response["output"]:
            yield from self._open_message()
        yield from self._close("incomplete" if self._cut else "completed")
        self.response["usage"] = usage_of(usage)
        if self._cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        yield self._of_response("incomplete" if self._cut else "completed")

    def fail(self, why: HttpError) -> Iterator[Event]:
        """The final events after an error."""
        yield self._event("error", code=why.code, message=str(why), param=why.field)
        code = (
            "rate_limit_exceeded"
            if why.status == 429
            else "server_error"
            if why.status >= 500
            else "invalid_prompt"
        )
        self.response["error"] = {"code": code, "message": str(why)}
        yield self._of_response("failed")

    def _event(self, kind: str, **data: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **data}

    def _of_response(self, kind: Literal["created", "in_progress", "completed", "incomplete", "failed"]) -> Event:
        self.response["status"] = "in_progress" if kind == "created" else kind
        response = {**self.response, "output": list(self.response["output"])}
        return self._event(f"response.{kind}", response=response)

    def _of_item(self, kind: str, **data: Any) -> Event:
        output = self.response["output"]
        return self._event(f"response.{kind}", item_id=output[-1]["id"], output_index=len(output) - 1, **data)

    def _add(self, item: Item) -> Event:
        self.response["output"].append(item)
        self._texts, self._logprobs, self._open = [], [], True
        return self._event(
            "response.output_item.added", output_index=len(self.response["output"]) - 1, item=dict(item)
        )

    def _open_message(self) -> Iterator[Event]:
        yield from self._close("completed")
        message = {
            "id": fresh("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        yield self._add(message)
        yield self._of_item("content_part.added", content_index=0, part=_text_part("", []))

    def _write(self, text: str, logprobs: ChoiceLogprobs | None) -> Iterator[Event]:
        found = logprobs["content"] if logprobs is not None else []
        if not text and not found:
            return
        if not self._open or self.response["output"][-1]["type"] != "message":
            yield from self._open_message()
        self._texts.append(text)
        self._logprobs += found
        yield self._of_item("output_text.delta", content_index=0, delta=text, logprobs=_brief(found))

    def _call(self, delta: CallDelta) -> Iterator[Event]:
        function = delta["function"]
        if "id" in delta:
            yield from self._close("completed")
            name, namespace = self._origins.get(function["name"], (function["name"], None))
            call = {
                "id": fresh("fc"), "type": "function_call", "status": "in_progress", "call_id": delta["id"],
                "name": name, "arguments": "",
            }  # fmt: skip
            yield self._add(call if namespace is None else call | {"namespace": namespace})
        if function["arguments"]:
            self._texts.append(function["arguments"])
            yield self._of_item("function_call_arguments.delta", delta=function["arguments"])

    def _close(self, status: str) -> Iterator[Event]:
        """Complete the last item."""
        if not self._open:
            return
        self._open = False
        item, text = self.response["output"][-1], "".join(self._texts)
        item["status"] = status
        if item["type"] == "message":
            item["content"] = [_text_part(text, self._logprobs)]
            logprobs = _brief(self._logprobs)
            yield self._of_item("output_text.done", content_index=0, text=text, logprobs=logprobs)
            yield self._of_item("content_part.done", content_index=0, part=item["content"][0])
        else:
            item["arguments"] = text
            yield self._of_item("function_call_arguments.done", arguments=text)
        yield self._event("response.output_item.done", output_index=len(self.response["output"]) - 1, item=item)


def _text_part(text: str, logprobs: list[Any]) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _brief(logprobs: list[Any]) -> list[Any]:
    """Log-probabilities as events have them: without bytes."""
    return [
        {"token": one["token"], "logprob": one["logprob"], "top_logprobs": [
            {"token": other["token"], "logprob": other["logprob"]} for other in one["top_logprobs"]
        ]}
        for one in logprobs
    ]  # fmt: skip
