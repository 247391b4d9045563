"""Response bodies of Ollama's API. Times are in nanoseconds. Imports no torch."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from pydantic import BaseModel
from typing_extensions import TypedDict  # pydantic requires it before Python 3.12

from ..anthropic.events import read_input

if TYPE_CHECKING:
    from ...engine.completion import TextPiece
    from ...engine.request import Request


class ErrorAnswer(BaseModel):  # a class, as openai/answers.py says
    error: str


class CalledFunction(TypedDict):
    index: int
    name: str
    arguments: dict[str, Any]


class Call(TypedDict):
    id: str
    function: CalledFunction


class Message(TypedDict):
    role: Literal["assistant"]
    content: str
    tool_calls: NotRequired[list[Call]]


class Counts(TypedDict):
    """The last part of a response."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[str]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]


class ChatAnswer(Counts):
    message: Message


class GenerateAnswer(Counts):
    response: str
    context: NotRequired[list[int]]


class Embeddings(TypedDict):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OneEmbedding(TypedDict):
    embedding: list[float]


class Details(TypedDict):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ListedModel(TypedDict):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class RunningModel(ListedModel):
    expires_at: str
    size_vram: int
    context_length: int


class ModelList(TypedDict):
    models: list[ListedModel]


class RunningList(TypedDict):
    models: list[RunningModel]


class ShownModel(TypedDict):
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(TypedDict):
    version: str


def moment(seconds: float | None = None) -> str:
    """A point in time, by default now, in ISO 8601."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.isoformat().replace("+00:00", "Z")


class Reply:
    """Collects the pieces of a request: `chat` gives messages, otherwise `response` texts."""

    def __init__(self, model: str, request: Request, chat: bool) -> None:
        self.model, self.request, self.chat = model, request, chat
        self.began = time.perf_counter()
        self.first: float | None = None  # when its first piece came
        self.texts: list[str] = []
        self.ids: list[int] = []
        self.calls: list[dict[str, Any]] = []  # id, name, arguments as text
        self.reason = "stop"

    def add(self, piece: TextPiece) -> list[dict[str, Any]]:
        """Add a piece; return its parts of the stream. Tool calls come whole, with the last piece."""
        if self.first is None:
            self.first = time.perf_counter()
        self.ids += piece.token_ids
        for delta in piece.tool_calls:
            if delta.name is not None:
                self.calls.append({"id": delta.id, "name": delta.name, "arguments": ""})
            self.calls[delta.index]["arguments"] += delta.arguments
        parts = []
        if piece.text:
            self.texts.append(piece.text)
            parts.append(self._part(piece.text))
        if piece.finish_reason is not None:
            self.reason = piece.finish_reason
            if self.calls:
                parts.append(self._part("", self._calls()))
        return parts

    def end(self) -> dict[str, Any]:
        """The last part of the stream."""
        return {**self._part(""), **self._counts()}

    def whole(self) -> dict[str, Any]:
        """The complete response body."""
        return {**self._part("".join(self.texts), self._calls()), **self._counts()}

    def _part(self, text: str, calls: list[Call] | None = None) -> dict[str, Any]:
        head = {"model": self.model, "created_at": moment()}
        if not self.chat:
            return {**head, "response": text, "done": False}
        message: Message = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = calls
        return {**head, "message": message, "done": False}

    def _calls(self) -> list[Call]:
        return [
            {"id": c["id"], "function": {"index": i, "name": c["name"], "arguments": read_input(c["arguments"])}}
            for i, c in enumerate(self.calls)
        ]

    def _counts(self) -> dict[str, Any]:
        now = time.perf_counter()
        first = now if self.first is None else self.first
        out: dict[str, Any] = {
            "done": True, "done_reason": self.reason, "total_duration": nanoseconds(now - self.began),
            "load_duration": 0, "prompt_eval_count": len(self.request.ids),
            "prompt_eval_duration": nanoseconds(first - self.began), "eval_count": len(self.ids),
            "eval_duration": nanoseconds(now - first),
        }  # fmt: skip
        return out if self.chat else {**out, "context": [*self.request.ids, *self.ids]}


def loaded(model: str, chat: bool) -> dict[str, Any]:
    """The response to a request to load the model, which is always loaded."""
    text: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    return {"model": model, "created_at": moment(), **text, "done": True, "done_reason": "load"}


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
