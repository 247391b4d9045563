"""Streams of the Responses API: their events validate strictly against the client's types, in OpenAI's order."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from serving import TOOL, Serving, serving
from test_client_answers import seen_by

openai = pytest.importorskip("openai")

from openai.types.responses import Response, ResponseStreamEvent  # noqa: E402
from openai.types.responses.response_item_list import ResponseItemList  # noqa: E402

from mistral_7b.server.config import ServerConfig  # noqa: E402
from mistral_7b.server.http.errors import HttpError  # noqa: E402
from mistral_7b.server.openai.answers import ChunkChoice, Usage  # noqa: E402
from mistral_7b.server.openai.responses.events import Answer, begun  # noqa: E402
from mistral_7b.server.openai.responses.wire import ResponsesRequest  # noqa: E402

ASK = {"input": "How will the weather be?", "max_output_tokens": 6, "seed": 2}
CALLS = {
    "max_output_tokens": 300, "tool_choice": "required", "parallel_tool_calls": False,
    "tools": [{"type": "function", **TOOL["function"], "strict": True}],
}  # fmt: skip
CUT = {**CALLS, "max_output_tokens": 24}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
ECHOED = {"store"}  # OpenAI sends it, and its client's type does not have it
USAGE: Usage = {
    "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 1},
}  # fmt: skip
START = ["response.created", "response.in_progress"]
MESSAGE = [
    "response.output_item.added", "response.content_part.added", "response.output_text.delta",
    "response.output_text.done", "response.content_part.done", "response.output_item.done",
]  # fmt: skip
CALL = [
    "response.output_item.added", "response.function_call_arguments.delta",
    "response.function_call_arguments.done", "response.output_item.done",
]  # fmt: skip


def streamed(server: Serving, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, whose names are those of its lines."""
    status, headers, data = server.ask("POST", "/v1/responses", {**body, "stream": True})
    assert status == 200, data
    assert headers["content-type"].startswith("text/event-stream")
    found = re.findall(r"^event: (.*)\ndata: (.*)\n\n", data.decode(), re.M)
    assert b"".join(f"event: {name}\ndata: {text}\n\n".encode() for name, text in found) == data
    events = [json.loads(text) for _, text in found]
    assert [event["type"] for event in events] == [name for name, _ in found]
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The events' types; deltas that follow each other count once."""
    names = [event["type"] for event in events]
    return [name for i, name in enumerate(names) if not (name.endswith(".delta") and names[i - 1] == name)]


def rebuilt(events: list[dict[str, Any]]) -> list[Any]:
    """The output as the deltas and the other events give it."""
    out: list[Any] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(out)
            assert event["item"]["status"] == "in_progress"
            out.append({"item": event["item"], "text": ""})
        elif kind.endswith(".delta"):
            assert event["item_id"] == out[-1]["item"]["id"]
            out[-1]["text"] += event["delta"]
        elif kind == "response.output_text.done":
            assert event["text"] == out[-1]["text"]
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == out[-1]["text"]
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == out[-1]["item"]["id"]
            out[-1]["item"] = event["item"]
    return [each["item"] for each in out]


def check(events: list[dict[str, Any]]) -> None:
    """Each event has the client's type, and they are numbered."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        extra = {f"response.{name}" for name in ECHOED} if "response" in event else set()
        assert seen_by(ResponseStreamEvent, event) == extra, event
    for event in events[:2]:
        assert (event["response"]["status"], event["response"]["output"]) == ("in_progress", [])
        assert event["response"]["usage"] is None


@pytest.mark.parametrize("asked", [{}, CALLS, CUT, LOGPROBS])
def test_a_stream_is_the_response_in_events(server: Serving, asked: dict[str, Any]) -> None:
    whole = server.post("/v1/responses", {**ASK, **asked})[1]
    assert seen_by(Response, whole) == ECHOED
    events = streamed(server, {**ASK, **asked})
    check(events)
    last = events[-1]["response"]
    assert rebuilt(events) == last["output"]
    assert strip(last) == strip(whole)
    ended = "response.completed" if asked is CALLS else "response.incomplete"
    items = [CALL if item["type"] == "function_call" else MESSAGE for item in last["output"]]
    assert kinds(events) == [*START, *(kind for item in items for kind in item), ended]
    assert [CALL in items, last["status"]] == [asked in (CALLS, CUT), ended.removeprefix("response.")]
    if asked is LOGPROBS:
        found = [
            token for event in events for token in event.get("logprobs", ()) if event["type"].endswith("delta")
        ]
        assert "".join(token["token"] for token in found) == last["output"][0]["content"][0]["text"]
        assert {len(token["top_logprobs"]) for token in found} == {2}


def strip(response: dict[str, Any]) -> dict[str, Any]:
    """A response without ids, times, and what depends on the cache."""
    drop = ("id", "created_at", "completed_at")
    out = {k: v for k, v in response.items() if k not in (*drop, "usage")}
    out["output"] = [{k: v for k, v in item.items() if k != "id"} for item in response["output"]]
    return {**out, "tokens": response["usage"]["output_tokens"]}


def test_stored_responses_validate(server: Serving) -> None:
    first = server.post("/v1/responses", {**ASK, **CALLS})[1]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"} for call in first["output"]
    ]
    second = server.post("/v1/responses", {**ASK, "input": results, "previous_response_id": first["id"]})[1]
    stored = json.loads(server.ask("GET", f"/v1/responses/{second['id']}")[2])
    assert stored == second
    listed = json.loads(server.ask("GET", f"/v1/responses/{second['id']}/input_items?order=asc&limit=100")[2])
    assert seen_by(ResponseItemList, listed) == set()
    assert [item["type"] for item in listed["data"]] == [
        "message", *["function_call"] * len(results), *["function_call_output"] * len(results)]  # fmt: skip


def made(*deltas: dict[str, Any], reason: str = "stop") -> list[dict[str, Any]]:
    """The events of a response whose chat chunks have these deltas."""
    answer = Answer(begun(ResponsesRequest(model="tiny"), "tiny"), {})
    events = answer.begin()
    for i, delta in enumerate(deltas):
        last = reason if i == len(deltas) - 1 else None
        chunk: ChunkChoice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": last}  # type: ignore
        events += answer.take(chunk)
    return json.loads(json.dumps(events + list(answer.end(USAGE))))


def call(index: int, name: str | None, arguments: str) -> dict[str, Any]:
    if name is None:
        return {"index": index, "function": {"arguments": arguments}}
    return {
        "index": index,
        "id": f"c{index}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def test_text_and_calls_in_any_order() -> None:
    events = made(
        {"role": "assistant", "content": ""}, {"content": "Let me "},
        {"content": "look.", "tool_calls": [call(0, "a", "{")]},
        {"tool_calls": [call(0, None, "}"), call(1, "b", "{}")]}, {"content": "oops"},
    )  # fmt: skip
    check(events)
    assert kinds(events) == [*START, *MESSAGE, *CALL, *CALL, *MESSAGE, "response.completed"]
    output = events[-1]["response"]["output"]
    assert rebuilt(events) == output
    assert [item.get("arguments") or item["content"][0]["text"] for item in output] == [
        "Let me look.", "{}", "{}", "oops"]  # fmt: skip
    assert events[-1]["response"]["usage"] == {
        "input_tokens": 3, "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 7,
    }  # fmt: skip


def test_an_empty_response_has_a_message() -> None:
    events = made({"role": "assistant", "content": ""})
    check(events)
    assert [event for event in kinds(events) if not event.endswith("text.delta")] == [
        *START, *[kind for kind in MESSAGE if not kind.endswith("delta")], "response.completed"]  # fmt: skip
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_only_the_last_item_is_cut() -> None:
    events = made({"content": "a"}, {"tool_calls": [call(0, "a", '{"x')]}, reason="length")
    assert [item["status"] for item in events[-1]["response"]["output"]] == ["completed", "incomplete"]
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    ("status", "code"),
    [(500, "server_error"), (504, "server_error"), (429, "rate_limit_exceeded"), (422, "invalid_prompt")],
)
def test_a_failure_is_two_events(status: int, code: str) -> None:
    answer = Answer(begun(ResponsesRequest(model="tiny"), "tiny"), {})
    events = [*answer.begin(), *answer.fail(HttpError(status, "it broke", field="input", code="broken"))]
    check(events)
    assert kinds(events) == [*START, "error", "response.failed"]
    assert (events[-2]["code"], events[-2]["message"], events[-2]["param"]) == ("broken", "it broke", "input")
    assert events[-1]["response"]["error"] == {"code": code, "message": "it broke"}
    assert events[-1]["response"]["status"] == "failed"


def test_a_response_that_takes_too_long() -> None:
    long = {**ASK, "max_output_tokens": 1_000_000}
    with serving(ServerConfig(port=0, request_timeout=1.0)) as server:
        events = streamed(server, long)
        check(events)
        assert kinds(events)[-2:] == ["error", "response.failed"]
        assert events[-2]["code"] == "timeout"
        assert server.ask("GET", f"/v1/responses/{events[0]['response']['id']}")[0] == 404
        status, out = server.post("/v1/responses", long)
        assert (status, out["error"]["code"]) == (504, "timeout")
        server.idle()
