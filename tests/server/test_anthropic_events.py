"""Anthropic's events and messages: Anthropic's client assembles the events to the same message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic_core import from_json, to_json

from mistral_7b.engine.completion import TextPiece
from mistral_7b.server.anthropic.events import Answer, Event, read_input
from mistral_7b.text.tool_calls import ToolCallDelta


def begin(index: int, arguments: str = "") -> ToolCallDelta:
    return ToolCallDelta(index, f"id{index}", f"tool{index}", arguments)


CASES: dict[str, tuple[list[TextPiece], list[dict[str, Any]], str, str | None]] = {
    "text": (
        [TextPiece("Hel", token_ids=(5,)), TextPiece("lo", token_ids=(6, 7)), TextPiece("", 0, (2,), "stop")],
        [{"type": "text", "text": "Hello"}], "end_turn", None,
    ),
    "nothing": ([TextPiece("", 0, (2,), "stop")], [], "end_turn", None),
    "length": ([TextPiece("a", 0, (5,), "length")], [{"type": "text", "text": "a"}], "max_tokens", None),
    "stop text": ([TextPiece("a", 0, (5,), "stop", "x")], [{"type": "text", "text": "a"}], "stop_sequence", "x"),
    "stop token": ([TextPiece("a", 0, (5,), "stop", 17)], [{"type": "text", "text": "a"}], "end_turn", None),
    "text and calls": (
        [
            TextPiece("Let me", token_ids=(5,)),
            TextPiece(".", token_ids=(6,), tool_calls=(begin(0, '{"a"'),)),
            TextPiece("", token_ids=(7,), tool_calls=(ToolCallDelta(0, arguments=": 1}"), begin(1))),
            TextPiece("", token_ids=(8,), tool_calls=(ToolCallDelta(1, arguments="{}"),)),
            TextPiece("", 0, (2,), "stop"),
        ],
        [
            {"type": "text", "text": "Let me."},
            {"type": "tool_use", "id": "id0", "name": "tool0", "input": {"a": 1}},
            {"type": "tool_use", "id": "id1", "name": "tool1", "input": {}},
        ],
        "tool_use", None,
    ),
    "a list that breaks off": (
        [
            TextPiece("", token_ids=(7,), tool_calls=(begin(0, "{}"),)),
            TextPiece("] or so", 0, (8, 2), "stop", tool_calls=()),
        ],
        [{"type": "tool_use", "id": "id0", "name": "tool0", "input": {}}, {"type": "text", "text": "] or so"}],
        "tool_use", None,
    ),
    "a list that breaks off at once": (
        [
            TextPiece("", token_ids=(7,), tool_calls=(begin(0, "{"),)),
            TextPiece("] or so", 0, (8, 9, 2), "stop", tool_calls=(ToolCallDelta(0, arguments="}"),)),
        ],
        [{"type": "tool_use", "id": "id0", "name": "tool0", "input": {}}, {"type": "text", "text": "] or so"}],
        "tool_use", None,
    ),
    "all in one piece": (
        [TextPiece("So:", 0, (5, 6, 2), "stop", tool_calls=(begin(0, '{"b": [2]}'), begin(1, "{}")))],
        [
            {"type": "text", "text": "So:"},
            {"type": "tool_use", "id": "id0", "name": "tool0", "input": {"b": [2]}},
            {"type": "tool_use", "id": "id1", "name": "tool1", "input": {}},
        ],
        "tool_use", None,
    ),
    "arguments cut short": (
        [TextPiece("", 0, (5,), "length", tool_calls=(begin(0, '{"a": '),))],
        [{"type": "tool_use", "id": "id0", "name": "tool0", "input": {}}], "max_tokens", None,
    ),
}  # fmt: skip


def told(answer: Answer, pieces: list[TextPiece]) -> list[Event]:
    """All events of a response to a prompt of 9 tokens, 4 of them cached."""
    events = [answer.begin(9, 4)]
    for piece in pieces:
        events += answer.take(piece)
    return json.loads(json.dumps([*events, *answer.end(9, 4)]))  # a copy, as sent at that time


@pytest.mark.parametrize("case", CASES)
def test_a_message_and_its_events_say_the_same(case: str) -> None:
    pytest.importorskip("anthropic")
    from anthropic.lib.streaming._messages import accumulate_event

    pieces, blocks, reason, stop = CASES[case]
    answer = Answer("msg_1", "m")
    snapshot, buffers = None, {}
    for event in told(answer, pieces):
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    message = answer.message(9, 4)
    assert message["content"] == blocks
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, stop)
    assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] == 9
    assert message["usage"]["output_tokens"] == sum(len(p.token_ids) for p in pieces)
    found = snapshot.to_dict()
    del found["stop_details"]  # added by the client
    if case == "arguments cut short":  # the client keeps the part that it can parse
        found["content"][0]["input"] = {}
    assert found == message


@pytest.mark.parametrize("case", CASES)
def test_events_come_in_their_order(case: str) -> None:
    open_block, count = None, 0
    events = told(Answer("msg_1", "m"), CASES[case][0])
    assert [events[0]["type"], events[-2]["type"], events[-1]["type"]] == [
        "message_start", "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["stop_reason"] is None
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_block is None
            assert event["index"] == count
            open_block, count = event["index"], count + 1
        else:
            assert event["index"] == open_block
            if event["type"] == "content_block_stop":
                open_block = None
    assert open_block is None


def test_no_more_calls_than_asked_for() -> None:
    pieces, blocks, *_ = CASES["text and calls"]
    answer = Answer("msg_1", "m", most_calls=1)
    for number, piece in enumerate(pieces):
        list(answer.take(piece))
        assert answer.full == (number >= 2)  # the second call ends the message
    message = answer.message(9, 4)
    assert message["content"] == blocks[:2]
    assert message["stop_reason"] == "tool_use"


def test_an_answer_ended_from_outside_closes_its_block() -> None:
    answer = Answer("msg_1", "m")
    events = told(answer, [TextPiece("half", token_ids=(5,))])
    assert [e["type"] for e in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert answer.message(9, 4)["content"] == [{"type": "text", "text": "half"}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5]}', {"a": [1, 2.5]}),
        ('{"a": 1e999}', {"a": 1.7976931348623157e308}),
        ('{"a": -1e999}', {"a": -1.7976931348623157e308}),
        ('{"a": "\\ud800b", "c": "\\ud83d\\ude00"}', {"a": "?b", "c": "😀"}),
        ('{"a": ', {}),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", {}),
        ("", {}),
        ("[1]", {}),
        ('{"a": ' + "9" * 10_000 + "}", {}),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", {}),
    ],
)
def test_arguments_are_an_object_that_can_be_written_again(text: str, value: dict[str, Any]) -> None:
    assert read_input(text) == value
    assert from_json(to_json(value), allow_inf_nan=False) == value
