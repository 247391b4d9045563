"""Answers as clients of Anthropic's Messages API read them: a list of blocks, whole or in events.

    pieces     "Let me "   "look."   call 0: weather   call 0: {"ci   call 0: ty": "Rome"}   finish: stop
    events     start text · delta    delta             stop · start tool_use · delta · delta  stop · message_delta
    blocks     text "Let me look."   tool_use weather {"city": "Rome"}                        stop_reason tool_use

Whoever streams sends the events on; whoever does not lets them pass and asks for the `message` in the end.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import from_json, to_json
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from ..tool_calls import ToolCallDelta

if TYPE_CHECKING:
    from ..completion import TextPiece

Event = dict[str, Any]  # with its "type"


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
    """Tokens: Anthropic's `input_tokens` are those that were not found in the cache."""
    return {
        "input_tokens": prompt - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }  # fmt: skip


class Answer:
    """A message that grows with a request's pieces. With `most_calls`, what comes after so many is left out."""

    def __init__(self, name: str, model: str, most_calls: int | None = None) -> None:
        self.name, self.model, self.most_calls = name, model, most_calls
        self.blocks: list[dict[str, Any]] = []
        self.generated = 0  # tokens
        self.stop_reason: str | None = None
        self.stop_sequence: str | None = None
        self._texts: list[str] = []  # of the last block: its text, or a call's input as JSON
        self._calls = 0

    @property
    def full(self) -> bool:
        """Whether nothing that could still come would be taken."""
        return self.stop_reason is not None

    def begin(self, prompt: int, cached: int) -> Event:
        """The first event."""
        return {"type": "message_start", "message": self.message(prompt, cached)}

    def take(self, piece: TextPiece) -> Iterator[Event]:
        """What a piece adds."""
        if self.full:
            return
        self.generated += len(piece.token_ids)
        before = self._calls == 0  # text stands before the calls, or is what is left of a list that broke off
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
        """The last events. A message that was ended from outside has no `stop_reason`."""
        if not self.full:
            yield from self._close()
        delta = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": usage(prompt, cached, self.generated)}
        yield {"type": "message_stop"}

    def message(self, prompt: int, cached: int) -> MessageAnswer:
        """The message as it stands."""
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
        """The last block is complete."""
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
    """A call's arguments as an object that can be written again; an empty one where they broke off.

    A number too large for a float becomes the largest, and half a character a question mark.
    """
    try:
        value = json.loads(text, parse_float=_finite)
        value = from_json(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
        to_json({"content": [{"input": value}]})  # which may nest only so deep
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)
