"""Responses of Anthropic's Messages API: a list of content blocks, whole or as events.

    pieces     "Let me "   "look."   call 0: weather   call 0: {"ci   call 0: ty": "Rome"}   finish: stop
    events     start text · delta    delta             stop · start tool_use · delta · delta  stop · message_delta
    blocks     text "Let me look."   tool_use weather {"city": "Rome"}                        stop_reason tool_use

A streaming route sends the events; a route that does not stream drops them and reads `message` at the end.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import from_json, to_json
from typing_extensions import TypedDict  # pydantic requires it before Python 3.12

from ...text.tool_calls import ToolCallDelta

if TYPE_CHECKING:
    from ...engine.completion import TextPiece

Event = dict[str, Any]  # has a "type"


class Usage(TypedDict):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: Usage


class CountAnswer(TypedDict):
    input_tokens: int


def usage(prompt: int, cached: int, generated: int) -> Usage:
    """Token counts. Anthropic's `input_tokens` exclude those found in the prefix cache."""
    return {
        "input_tokens": prompt - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }  # fmt: skip


class Answer:
    """A response message built from a request's pieces. It ends before a call beyond `most_calls`."""

    def __init__(self, name: str, model: str, most_calls: int | None = None) -> None:
        self.name, self.model, self.most_calls = name, model, most_calls
        self.blocks: list[dict[str, Any]] = []
        self.generated = 0  # tokens
        self.stop_reason: str | None = None
        self.stop_sequence: str | None = None
        self._texts: list[str] = []  # parts of the last block: text, or a call's input as JSON
        self._calls = 0

    @property
    def full(self) -> bool:
        """Whether the message is complete: further pieces are ignored."""
        return self.stop_reason is not None

    def begin(self, prompt: int, cached: int) -> Event:
        """The message_start event."""
        return {"type": "message_start", "message": self.message(prompt, cached)}

    def take(self, piece: TextPiece) -> Iterator[Event]:
        """Add a piece; yield its events."""
        if self.full:
            return
        self.generated += len(piece.token_ids)
        before = self._calls == 0  # text precedes the calls, or follows them if their list is invalid
        if piece.text and before:
            yield from self._write(piece.text)
        for delta in piece.tool_calls:
            yield from self._call(delta)
            if self.full:
                return
        if piece.text and not before:
            yield from self._write(piece.text)
        if piece.finish_reason is not None:
            yield from self._close()
            self._stop(piece.finish_reason, piece.stop_reason)

    def end(self, prompt: int, cached: int) -> Iterator[Event]:
        """The final events. An aborted message has no `stop_reason`."""
        if not self.full:
            yield from self._close()
        delta = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": usage(prompt, cached, self.generated)}
        yield {"type": "message_stop"}

    def message(self, prompt: int, cached: int) -> MessageAnswer:
        """The message so far."""
        return {
            "id": self.name, "type": "message", "role": "assistant", "model": self.model,
            "content": list(self.blocks), "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence, "usage": usage(prompt, cached, self.generated),
        }  # fmt: skip

    def _write(self, text: str) -> Iterator[Event]:
        if not self.blocks or self.blocks[-1]["type"] != "text":
            yield from self._open({"type": "text", "text": ""})
        self._texts.append(text)
        yield self._delta({"type": "text_delta", "text": text})

    def _call(self, delta: ToolCallDelta) -> Iterator[Event]:
        if delta.name is not None:
            if self._calls == self.most_calls:
                yield from self._close()
                self._stop("stop", None)
                return
            self._calls += 1
            yield from self._open({"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}})
        if delta.arguments:
            self._texts.append(delta.arguments)
            yield self._delta({"type": "input_json_delta", "partial_json": delta.arguments})

    def _open(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self.blocks.append(block)
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[Event]:
        """Complete the last block."""
        if not self.blocks:
            return
        block, text = self.blocks[-1], "".join(self._texts)
        self._texts = []
        if block["type"] == "text":
            block["text"] = text
        else:
            block["input"] = read_input(text)
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _stop(self, reason: str, stop: int | str | None) -> None:
        if reason == "length":
            self.stop_reason = "max_tokens"
        elif isinstance(stop, str):
            self.stop_reason, self.stop_sequence = "stop_sequence", stop
        else:
            self.stop_reason = "tool_use" if self._calls else "end_turn"


def read_input(text: str) -> dict[str, Any]:
    """Parse a call's arguments to an object that can be encoded as JSON; empty if they are truncated or invalid.

    A number beyond float's range becomes the largest float, and a lone surrogate a question mark.
    """
    try:
        value = json.loads(text, parse_float=_finite)
        value = from_json(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
        to_json({"content": [{"input": value}]})  # ValueError if it is nested too deeply
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)
