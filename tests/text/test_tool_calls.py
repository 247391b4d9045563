"""Tool calls parsed from tokens: independent of the split, no text lost, started by the control token alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from example_counts import MANY, SOME
from hypothesis import given
from hypothesis import strategies as st

from mistral_7b.engine.completion import Completion
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.messages import tool_call_id
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.text.tool_calls import ToolCall, ToolCallDelta, ToolCallStream, ToolSyntax

CONTROL, WORD = 5, 900
MISTRAL = ToolSyntax(CONTROL)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]

names = st.text(min_size=1, max_size=6).filter(lambda s: all(not "\ud800" <= c <= "\udfff" for c in s))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
calls = st.lists(
    st.tuples(names, st.dictionaries(st.text(max_size=4), values, max_size=3)), min_size=1, max_size=3
)


def ids(index: int) -> str:
    return f"call{index:05d}"


def read(pieces: Sequence[tuple[int, str]], cut: bool = False) -> tuple[str, list[ToolCall], list[ToolCallDelta]]:
    """The content, calls and deltas of a stream that ends with EOS, or is truncated (`cut`)."""
    stream = ToolCallStream(MISTRAL, ids)
    content, deltas = "", []
    for token, text in pieces:
        more, came = stream.push(token, text)
        content, deltas = content + more, deltas + came
    more, came = stream.close(cut)
    return content + more, stream.calls, deltas + came


def split(text: str, cuts: Sequence[int]) -> list[tuple[int, str]]:
    """[TOOL_CALLS], followed by text split into tokens."""
    places = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [(CONTROL, ""), *((WORD, text[a:b]) for a, b in itertools.pairwise(places))]


def joined(deltas: Sequence[ToolCallDelta]) -> list[ToolCall]:
    """The calls assembled from their deltas alone."""
    out: list[ToolCall] = []
    for delta in deltas:
        if delta.name is not None:
            assert delta.index == len(out)
            assert delta.id is not None
            out.append(ToolCall(delta.index, delta.id, delta.name))
        out[delta.index].arguments += delta.arguments
    return out


@given(calls, st.lists(st.integers(0, 400), max_size=12), st.booleans(), st.sampled_from([None, 1]))
@SOME
def test_random_calls_parse_under_any_split(
    wanted: list[tuple[str, dict]], cuts: list[int], ascii_only: bool, indent: int | None
) -> None:
    texts = [json.dumps(arguments, ensure_ascii=ascii_only, indent=indent) for _, arguments in wanted]
    heads = [f'{{"name": {json.dumps(name, ensure_ascii=ascii_only)}, "arguments": ' for name, _ in wanted]
    text = " [" + ", ".join(h + t + "}" for h, t in zip(heads, texts, strict=True)) + "] \n"
    content, found, deltas = read(split(text, cuts))
    assert content == ""
    assert [(c.name, c.arguments, c.id) for c in found] == [
        (name, text, ids(i)) for i, ((name, _), text) in enumerate(zip(wanted, texts, strict=True))
    ]
    assert joined(deltas) == found
    assert joined(read(split(text, ()))[2]) == found


@given(
    st.text(alphabet='[]{},:" \\namergutsi01-.eE+tf', max_size=30) | st.text(max_size=10),
    st.sampled_from(
        ["", '[{"name": "f", ', '[{"name": "f", "arguments": ', '[{"name": "f", "arguments": {',
         '[{"name": "f", "arguments": {"a": [1, ', '[{"name": "f", "arguments": "{', '[{"arguments": "{}", "na']
    ),
    st.lists(st.integers(0, 80), max_size=6),
    st.booleans(),
)  # fmt: skip
@MANY
def test_random_text_is_never_lost_under_any_split(tail: str, head: str, cuts: list[int], cut: bool) -> None:
    text = head + tail
    whole, parts = read(split(text, ()), cut), read(split(text, cuts), cut)
    assert whole[:2] == parts[:2]
    assert joined(parts[2]) == parts[1]
    content, found, _ = whole
    for call in found:
        assert '"arguments": "' in text or call.arguments in text or call.arguments == "{}"
        if call is not found[-1]:
            assert isinstance(json.loads(call.arguments), dict)
    assert text.endswith(content)
    if not found:
        assert content == text or (cut and not content)


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ("I cannot do that.", "I cannot do that.", []),
        ("[]", "[]", []),
        ('{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
        ('[{"name": "", "arguments": {}}]', '[{"name": "", "arguments": {}}]', []),
        ('[{"name": "f"; "arguments": {}}]', '[{"name": "f"; "arguments": {}}]', []),
        ('[{"name": "f", "parameters": {}}]', '[{"name": "f", "parameters": {}}]', []),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": [1]}]',
         ', {"name": "g", "arguments": [1]}]', ["{}"]),
        ('[{"name": "f"', '[{"name": "f"', []),
        ('[{"name": "f", "arguments": {"a": oops}}]', "oops}}]", ['{"a": ']),
        ('[{"name": "f", "arguments": {"a": 01}}]', "1}}]", ['{"a": 0']),
        ('[{"name": "f", "arguments": {"a": }}]', "}}]", ['{"a": ']),
        ('[{"name": "f", "arguments": {"a": -}}]', "}}]", ['{"a": -']),
        ('[{"name": "f", "arguments": {"a": 1.}}]', "}}]", ['{"a": 1.']),
        ('[{"name": "f", "arguments": {"a": 1e+}}]', "}}]", ['{"a": 1e+']),
        ('[{"name": "f", "arguments": {"a": [1,]}}]', "]}}]", ['{"a": [1,']),
        ('[{"name": "f", "arguments": {"a": 1,}}]', "}}]", ['{"a": 1,']),
        ('[{"name": "f", "arguments": {"a": [1}}]', "}}]", ['{"a": [1']),
        ('[{"name": "f", "arguments": {"a": "\t"}}]', '\t"}}]', ['{"a": "']),
        ('[{"name": "f", "arguments": {"a": "\\x"}}]', 'x"}}]', ['{"a": "\\']),
        ('[{"name": "f", "arguments": {"a": 1', "", ['{"a": 1']),
        ('[{"name": "f", "arguments": {"a": 1}}, {"na', ', {"na', ['{"a": 1}']),
        ('[{"name": "f", "arguments": {}}, {"arguments": {"b": 2}}]', ', {"arguments": {"b": 2}}]', ["{}"]),
        ('[{"name": "f", "arguments": {}}] so', " so", ["{}"]),
        ('[{"name": "f", "arguments": {}, "id": "abcdefghi"}]', "", ["{}"]),
        ('[{"name": "f", "arguments": {}, "name": "g"}]', ', "name": "g"}]', ["{}"]),
        ('[{"arguments": {"b": [2.5e-1 , {}]}, "name": "f"}]', "", ['{"b": [2.5e-1 , {}]}']),
        ('[{"name": "now"}]', "", ["{}"]),
        ('[{"name": "\\ud800", "arguments": {}}]', '[{"name": "\\ud800", "arguments": {}}]', []),
    ],
)  # fmt: skip
def test_an_invalid_list_is_content(text: str, content: str, arguments: list[str]) -> None:
    found = read(split(text, range(len(text))))
    assert (found[0], [c.arguments for c in found[1]]) == (content, arguments)
    assert read(split(text, ()))[:2] == found[:2]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("null", "{}"),
        ('"null"', "{}"),
        ('" null "', "{}"),
        ('""', "{}"),
        ('" "', "{}"),
        ('"{}"', "{}"),
        (r'" {\"city\": \"Rome\"}\n"', '{"city": "Rome"}'),
        (r'"{\"a\": \"\\\"b\\u00fc\\ud83d\\ude00\"}"', r'{"a": "\"b\u00fc\ud83d\ude00"}'),
        (r'"\u007b\"a\": [\"\ud83d\ude00\"]}"', '{"a": ["😀"]}'),
    ],
)
@pytest.mark.parametrize("call", ['[{"name": "f", "arguments": %s}]', '[{"arguments": %s, "name": "f"}]'])
def test_null_and_string_encoded_arguments_are_normalized(written: str, arguments: str, call: str) -> None:
    text = call % written
    for cuts in ((), range(len(text))):
        content, found, deltas = read(split(text, cuts))
        assert (content, [(c.name, c.arguments) for c in found]) == ("", [("f", arguments)])
        assert joined(deltas) == found


@given(st.dictionaries(st.text(max_size=4), values, max_size=3), st.lists(st.integers(0, 200), max_size=9),
       st.booleans(), st.booleans())  # fmt: skip
@SOME
def test_random_string_encoded_objects_parse_under_any_split(
    wanted: dict, cuts: list[int], inner: bool, outer: bool
) -> None:
    arguments = json.dumps(wanted, ensure_ascii=inner)
    text = f'[{{"name": "f", "arguments": {json.dumps(arguments, ensure_ascii=outer)}}}]'
    content, found, deltas = read(split(text, cuts))
    assert (content, [c.arguments for c in found]) == ("", [arguments])
    assert joined(deltas) == found


@pytest.mark.parametrize(
    "written",
    ["1", "-0.5", "[]", '[{"a": 1}]', "true", "nul", "nothing", '"Rome"', '"[1]"', '"1"', '"nul"', '"nullx"',
     r'"\"{}\""', r'"\ud83d"', r'"\ude00"', r'"\ud83dx"', '"\t{}"'],
)  # fmt: skip
def test_other_arguments_make_the_list_content(written: str) -> None:
    text = f'[{{"name": "f", "arguments": {written}}}]'
    for cuts in ((), range(len(text))):
        assert read(split(text, cuts)) == (text, [], [])


def test_an_invalid_string_encoded_object_is_content_from_there() -> None:
    head = '[{"name": "f", "arguments": '
    assert read(split(head + r'"{\"a\": oops}"}]', ()))[:2] == ('oops}"}]', [ToolCall(0, ids(0), "f", '{"a": ')])
    assert read(split(head + r'"{\"a\": 1"}]', ()))[:2] == ('"}]', [ToolCall(0, ids(0), "f", '{"a": 1')])
    assert read(split(head + '"{} so"}]', ()))[:2] == (' so"}]', [ToolCall(0, ids(0), "f", "{}")])


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("", []),
        (" [", []),
        ('[{"na', []),
        ('[{"name": "wea', []),
        ('[{"name": "f"', [("f", "")]),
        ('[{"name": "f", "argu', [("f", "")]),
        ('[{"name": "f", "arguments": nul', [("f", "")]),
        ('[{"name": "f", "arguments": "', [("f", "")]),
        ('[{"name": "f", "arguments": {"a": [1, "x', [("f", '{"a": [1, "x')]),
        ('[{"name": "f", "arguments": "{\\"a\\": \\', [("f", '{"a": ')]),
        ('[{"arguments": {"a": 1}, "na', []),
        ('[{"name": "f", "arguments": {}}', [("f", "{}")]),
        ('[{"name": "f", "arguments": {}}, {"na', [("f", "{}")]),
        ('[{"name": "f", "arguments": {}}, {"name": "g"', [("f", "{}"), ("g", "")]),
        ('[{"name": "f", "arguments": {}}] ', [("f", "{}")]),
    ],
)
def test_a_truncated_list_adds_no_content(text: str, calls: list[tuple[str, str]]) -> None:
    for cuts in ((), range(len(text))):
        content, found, deltas = read(split(text, cuts), cut=True)
        assert (content, [(c.name, c.arguments) for c in found]) == ("", calls)
        assert joined(deltas) == found


@pytest.mark.parametrize("text", ["I cannot do", "[] so", '{"name": "f", ', '[{"name": "f", "arguments": 1'])
def test_an_invalid_list_is_content_wherever_it_is_truncated(text: str) -> None:
    assert read(split(text, ()), cut=True) == (text, [], [])


BEGUN = [' [{"name": "f", "arguments": {"a": 1}}, {"na', 'me": "g"', ', "arguments": {"b": [2, "xyz', '"]}}]']
SO_FAR = [[("f", '{"a": 1}')], [("f", '{"a": 1}'), ("g", "")], [("f", '{"a": 1}'), ("g", '{"b": [2, "xyz')]]


def completed(texts: Sequence[str], *ends: int, **more: Any) -> Completion:
    """A completion of text, [TOOL_CALLS] and these texts, up to its end."""
    tokenizer = Tokenizer.v3()
    prompt = tokenizer.encode_chat([{"role": "user", "content": "?"}], TOOLS)
    byte = {tokenizer.surface(token): token for token in range(1000)}
    written = [byte[bytes([b])] for b in "".join(texts).encode()]
    tokens = [*tokenizer.encode("See:", bos=False), CONTROL, *written]
    limit = more.pop("max_tokens", len(tokens) if not ends else 1000)
    calls = ToolCallStream(tokenizer.tool_syntax, ids)
    c = Completion(prompt, SamplingParams(**more), limit, 0, tokenizer=tokenizer, calls=calls)
    parts, deltas = [], []
    for token in (*tokens, *ends):
        if not c.finished:
            parts.append(c.push(token))
            deltas += c.take_deltas()
    assert c.text == "".join(parts)
    assert joined(deltas) == c.output().tool_calls
    return c


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_completion_truncated_in_a_call_shows_no_syntax(size: int) -> None:
    stop = BEGUN[size]
    for c in (completed(BEGUN[:size]), completed([*BEGUN[:size], stop], stop=stop)):
        assert c.text == "See:"
        assert [(call.name, call.arguments) for call in c.output().tool_calls] == SO_FAR[size - 1]
    assert (c.finish_reason, c.stop_reason) == ("stop", stop)
    c = completed(BEGUN[:size], WORD, stop_token_ids=[WORD])
    assert (c.text, c.stop_reason) == ("See:", WORD)
    c = completed(BEGUN[:size], max_tokens=1000)  # and is never ended: as where it is aborted
    assert (c.text, c.finish_reason) == ("See:", None)
    ended = completed(BEGUN[:size], 2)  # by the model's own will: what it wrote is text
    assert ended.finish_reason == "stop"
    assert ended.text == "See:" + [', {"na', ', {"name": "g"', ""][size - 1]


def test_text_without_calls_is_content_for_any_finish_reason() -> None:
    for c in (completed(["I cannot."]), completed(["I cannot."], 2), completed(["I cannot. No"], stop=" No")):
        assert (c.text, c.output().tool_calls) == ("See:I cannot.", [])


def test_calls_are_emitted_incrementally() -> None:
    stream = ToolCallStream(MISTRAL, ids)
    assert stream.push(CONTROL, "") == ("", [])
    assert stream.push(WORD, '[{"name": "wea') == ("", [])
    assert stream.push(WORD, 'ther"') == ("", [])
    assert stream.push(WORD, ', "arguments": {"ci') == ("", [ToolCallDelta(0, "call00000", "weather", '{"ci')])
    assert stream.push(WORD, 'ty": 1}}, {"name": "b", "arguments": {') == (
        "",
        [ToolCallDelta(0, arguments='ty": 1}'), ToolCallDelta(1, "call00001", "b", "{")],
    )


def test_only_the_control_token_starts_calls() -> None:
    spelt = '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'
    assert read([(WORD, spelt)]) == (spelt, [], [])
    stream = ToolCallStream(ToolSyntax(), ids)  # a vocabulary without it
    assert stream.push(CONTROL, spelt) == (spelt, [])
    tokenizer = Tokenizer.v3()
    assert CONTROL not in tokenizer.encode(spelt)


def test_a_second_list_continues_the_call_indexes() -> None:
    one = '[{"name": "f", "arguments": {}}]'
    content, found, _ = read([(WORD, "Let me"), (CONTROL, " see"), (WORD, one), (CONTROL, ""), (WORD, one)])
    assert content == "Let me see"
    assert [c.id for c in found] == ["call00000", "call00001"]
    assert read([(CONTROL, ""), (WORD, "[{"), (CONTROL, ""), (WORD, one)])[0] == "[{"


def test_deep_nesting_does_not_recurse() -> None:
    arguments = '{"a": ' + "[" * 20_000 + "]" * 20_000 + "}"
    content, found, _ = read(split(f'[{{"name": "f", "arguments": {arguments}}}]', ()))
    assert (content, found[0].arguments) == ("", arguments)


@pytest.mark.parametrize("arguments", ['{"city": "Zürich", "days": [1, 2.5], "note": "日本 😀 \\"x\\""}', "{}"])
def test_calls_encode_to_their_original_tokens(arguments: str) -> None:
    tokenizer = Tokenizer.v3()
    given_id = tool_call_id("7.0.0")
    asked = [{"role": "user", "content": "?"}]
    call = {"id": given_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    answered = [*asked, {"role": "assistant", "tool_calls": [call, {**call, "id": tool_call_id("7.0.1")}]}]
    result = {"role": "tool", "tool_call_id": given_id, "content": "rain"}
    second = {"role": "tool", "tool_call_id": tool_call_id("7.0.1"), "content": "sun"}
    tokens = tokenizer.encode_chat([*answered, result, second], TOOLS)
    said = tokens[tokens.index(CONTROL) : tokens.index(tokenizer.eos_id)]
    stream, decoder = ToolCallStream(MISTRAL, lambda i: tool_call_id(f"7.0.{i}")), tokenizer.stream(tokens[:1])
    content = "".join(stream.push(token, decoder.push(token))[0] for token in said)
    assert (content, stream.close()) == ("", ("", []))
    assert [c.arguments for c in stream.calls] == [arguments, arguments]
    again = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in stream.calls
    ]
    written = [*asked, {"role": "assistant", "tool_calls": again}, result, second]
    assert tokenizer.encode_chat(written, TOOLS) == tokens
