"""Tool calls between tags, as Hermes 2 Pro writes them: independent of the split, no text lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_shapes import CHATML, HERMES_TOOLS
from tokenizer_files import CHATML as CHATML_TOKENS
from tokenizer_files import V3, sentencepiece_folder

from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.text.tool_calls import CLOSING, OPENING, ToolCall, ToolCallDelta, ToolCallStream, ToolSyntax

BEGIN, END, WORD = 5, 6, 900
TAGGED = ToolSyntax(tagged=True)
CALL = '{"name": "f", "arguments": {"a": 1}}'
BLOCK = f"{OPENING}\n{CALL}\n{CLOSING}"

names = st.text(min_size=1, max_size=6).filter(lambda s: all(not "\ud800" <= c <= "\udfff" for c in s))
arguments = st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=8), max_size=3)


def ids(index: int) -> str:
    return f"call{index:05d}"


def read(
    texts: Sequence[str | int], cut: bool = False, syntax: ToolSyntax = TAGGED
) -> tuple[str, list[tuple[str, str]], list[ToolCallDelta]]:
    """The content, calls and deltas of an answer in pieces: texts, and ids of control tokens."""
    stream = ToolCallStream(syntax, ids)
    content, deltas = "", []
    for text in texts:
        more, came = stream.push(WORD, text) if isinstance(text, str) else stream.push(text, "")
        content, deltas = content + more, deltas + came
    more, came = stream.close(cut)
    out: list[ToolCall] = []
    for delta in deltas + came:
        if delta.name is not None:
            out.append(ToolCall(delta.index, delta.id or "", delta.name))
        out[delta.index].arguments += delta.arguments
    assert out == stream.calls
    return content + more, [(c.name, c.arguments) for c in out], deltas + came


def split(text: str, cuts: Sequence[int]) -> list[str]:
    places = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(
    st.lists(st.tuples(names, arguments), min_size=1, max_size=3), st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from(["", "Let me look.", "a < b <tool", "  x"]), st.sampled_from(["", "\n", " \n\n"]),
    st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_random_calls_parse_under_any_split(
    wanted: list[tuple[str, dict]], cuts: list[int], before: str, gap: str, name_first: bool, closed: bool
) -> None:
    blocks = []
    for name, values in wanted:
        call = {"name": name, "arguments": values} if name_first else {"arguments": values, "name": name}
        blocks.append(f"{OPENING}{gap}{json.dumps(call)}{gap}{CLOSING}")
    text = before + gap + gap.join(blocks) + gap
    text = text if closed else text.rstrip().removesuffix(CLOSING)  # many models end without the last tag
    content, found, _ = read(split(text, cuts))
    assert content == before
    assert found == [(name, json.dumps(values)) for name, values in wanted]


@given(
    st.lists(
        st.sampled_from([OPENING, CLOSING, CALL, "<", ">", "\n", " ", "tool_call>", "/tool_call>", "<tool_", "{",
                         "}", '{"name": "g"', ', "arguments": ', '{"b": [', "x", "<tool_call", BLOCK])
        | st.text(max_size=4), max_size=8),
    st.lists(st.integers(0, 200), max_size=8), st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_text_gives_the_same_under_any_split(parts: list[str], cuts: list[int], cut: bool) -> None:
    text = "".join(parts)
    whole = read([text], cut)
    assert read(split(text, cuts), cut)[:2] == read(list(text), cut)[:2] == whole[:2]
    if OPENING not in text:
        assert whole[:2] == (text, [])
    left = iter(text)
    assert all(char in left for char in whole[0])  # content is text in its order


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        (BLOCK, "", ['{"a": 1}']),
        (f"So.\n{BLOCK}\n{BLOCK}\n", "So.", ['{"a": 1}', '{"a": 1}']),
        (f"{BLOCK}\nDone. ", "\nDone. ", ['{"a": 1}']),
        (f"{OPENING}{CALL}{BLOCK}", "", ['{"a": 1}', '{"a": 1}']),
        (f"{OPENING}{CALL} so", " so", ['{"a": 1}']),
        (f"{OPENING}{CALL}</tool>", "</tool>", ['{"a": 1}']),
        (f"x \n{OPENING}oops{CLOSING}", f"x \n{OPENING}oops{CLOSING}", []),
        (f"{OPENING}[{CALL}]{CLOSING}", f"{OPENING}[{CALL}]{CLOSING}", []),
        (f'{OPENING}{{"name": "f", "arguments": {{"a": oops}}}}', "oops}}", ['{"a": ']),
        (f'{OPENING}{{"name": "f"{BLOCK}', f'{OPENING}{{"name": "f"', ['{"a": 1}']),
        (f'{OPENING}{{"na', f'{OPENING}{{"na', []),
        (f'{OPENING}{{"name": "now"}}{CLOSING}', "", ["{}"]),
        ("a <tool_c", "a <tool_c", []),
        (f"{CALL}", f"{CALL}", []),
        (" " * 150 + BLOCK, " " * 100, ['{"a": 1}']),
    ],
)  # fmt: skip
def test_what_is_no_call_is_content(text: str, content: str, arguments: list[str]) -> None:
    for pieces in ([text], list(text)):
        found = read(pieces)
        assert (found[0], [made for _, made in found[1]]) == (content, arguments)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{OPENING}", "", []),
        (f'So {OPENING}\n{{"name": "f"', "So", [("f", "")]),
        (f'{OPENING}{{"name": "f", "arguments": {{"a": [1', "", [("f", '{"a": [1')]),
        (f'{OPENING}{{"arguments": {{"a": 1}}, "na', "", []),
        (f"{OPENING}{CALL}\n</tool", "", [("f", '{"a": 1}')]),
        ("2 <", "2 <", []),
    ],
)
def test_a_truncated_block_adds_no_content(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces, cut=True)[:2] == (content, calls)


def test_name_and_id_come_once_and_arguments_in_fragments() -> None:
    stream = ToolCallStream(TAGGED, ids)
    assert stream.push(WORD, "Well,\n<tool") == ("Well,", [])
    assert stream.held == "\n<tool"
    assert stream.push(WORD, '_call>\n{"name": "weather"') == ("", [])
    assert stream.push(WORD, ', "arguments": {"ci') == ("", [ToolCallDelta(0, "call00000", "weather", '{"ci')])
    assert stream.push(WORD, 'ty": 1}}\n</tool_call>\n') == ("", [ToolCallDelta(0, arguments='ty": 1}')])
    assert stream.close() == ("", [])


def test_tags_can_be_control_tokens() -> None:
    """Which have no text."""
    syntax = ToolSyntax(BEGIN, END, tagged=True)
    assert read([" a\n", BEGIN, CALL, END, "\n", BEGIN, CALL, END, "b"], syntax=syntax)[:2] == (
        " ab",
        [("f", '{"a": 1}')] * 2,
    )
    assert read([" ", BEGIN, "oops", END], syntax=syntax)[:2] == (" oops", [])
    assert read(["a <", BEGIN, "{", BEGIN, CALL, END], syntax=syntax)[:2] == ("a <{", [("f", '{"a": 1}')])
    assert read([BEGIN, CALL], syntax=syntax)[1] == [("f", '{"a": 1}')]


def test_the_template_says_how_a_model_writes_calls(tmp_path: Path) -> None:
    def syntax(name: str, template: object, added: tuple[str, ...] = CHATML_TOKENS) -> ToolSyntax:
        folder = sentencepiece_folder(tmp_path / name, V3, added=added, chat_template=template)
        return Tokenizer.from_pretrained(folder).tool_syntax

    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": HERMES_TOOLS}]
    assert syntax("hermes", HERMES_TOOLS) == syntax("named", named) == TAGGED
    assert syntax("chatml", CHATML) == ToolSyntax(5) == Tokenizer.v3().tool_syntax
    assert syntax("special", HERMES_TOOLS, (*CHATML_TOKENS, OPENING, CLOSING)) == ToolSyntax(
        32770, 32771, tagged=True
    )
    assert not Tokenizer.v1().tool_syntax.known
