"""An answer that is continued: the tokens fed are those of its beginning as given, and both are one text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from example_counts import SOME
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from refusals import refused
from tiny import tiny_args, tiny_model

from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.llm import LLM
from mistral_7b.errors import GrammarError
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer

V7 = MistralTokenizer.v7().instruct_tokenizer.tokenizer.file_path
OURS = {"v1": Tokenizer.v1(), "v2": Tokenizer.v2(), "v3": Tokenizer.v3(), "v7": Tokenizer.from_file(V7, "v7")}
HELLO = {"role": "user", "content": "How will the weather be?"}
BEGINNINGS = [
    "It will be", "It will be ", "It will be   ", " Well, ", "a\n", "a \n ", "a\t", " ", "   ", "\n", " \n\t ",
    "\t", "Grüße, 世界🙂 ", '{"name": ', "</s> ",
]  # fmt: skip
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\u2581") | st.sampled_from(" \n\ta"), min_size=1
)

versions = pytest.mark.parametrize("version", OURS)


def begun(text: Any, *before: dict[str, Any]) -> list[dict[str, Any]]:
    return [HELLO, *before, {"role": "assistant", "content": text, "prefix": True}]


@versions
@pytest.mark.parametrize("text", BEGINNINGS)
def test_the_tokens_are_those_of_the_text_as_given(version: str, text: str) -> None:
    t = OURS[version]
    own = t.encode(text, bos=False)
    assert t.encode_chat_with_prefix(begun(text)) == ([*t.encode_chat([HELLO]), *own], len(own))
    assert t.decode(own) == text


@versions
@given(text=TEXTS, more=TEXTS)
@SOME
def test_beginning_and_answer_join_to_one_text(version: str, text: str, more: str) -> None:
    """Whatever the answer begins with: a piece with a space in it, without, or bytes."""
    t = OURS[version]
    ids, n = t.encode_chat_with_prefix(begun(text))
    answer = t.encode(more, bos=False)
    stream = t.stream(after=ids[-1:])
    said = "".join(map(stream.push, answer)) + stream.flush()
    assert text + said == t.decode([*ids[-n:], *answer])


@versions
def test_messages_of_one_turn_are_one_beginning(version: str) -> None:
    t = OURS[version]
    own = t.encode("One. \n\ntwo ", bos=False)
    wanted = [*t.encode_chat([HELLO]), *own], len(own)
    assert t.encode_chat_with_prefix(begun("two ", {"role": "assistant", "content": "One. "})) == wanted
    parts = [{"type": "text", "text": text} for text in ("One. ", "", "two ")]
    assert t.encode_chat_with_prefix(begun(parts)) == wanted


@versions
def test_an_answer_that_is_over_is_encoded_as_mistral_common_does(version: str) -> None:
    """Only what is continued keeps its blanks: models were trained without them (v1: with them)."""
    t = OURS[version]
    chat = [HELLO, {"role": "assistant", "content": "Rain. "}, HELLO]
    text = "Rain. " if version == "v1" else "Rain."
    assert t.encode_chat(chat)[len(t.encode_chat([HELLO])) :][: len(t.encode(text))] == t.encode(text, False, True)
    assert t.encode_chat_with_prefix([HELLO]) == (t.encode_chat([HELLO]), 0)


SCHEMA = {
    "type": "object", "required": ["name", "n"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 4}, "n": {"enum": [1, 23]}},
}  # fmt: skip
YES = {"choice": ["yes, sir", "yes  sir"]}
BLANKS = {"regex": r" \n\t[ab]{2}"}
OBEYED: list[tuple[dict[str, Any], str]] = [
    ({"json": SCHEMA}, '{"name": '), ({"json": SCHEMA}, '{"name":  \n '), ({"json": SCHEMA}, '{"name": "A '),
    ({"json": SCHEMA}, "{ "), (YES, "yes "), (YES, "yes  "), ({"choice": [" yes", "no"]}, " "), (BLANKS, " \n\t"),
    (BLANKS, " "),
]  # fmt: skip


@pytest.fixture(scope="module", params=["v1", "v3", "v7"])
def llm(request: pytest.FixtureRequest) -> LLM:
    tokenizer = OURS[request.param]
    model = tiny_model(tiny_args(vocab_size=tokenizer.vocab_size, sliding_window=None, max_seq_len=512))
    return LLM(model, EngineConfig(max_sequences=2, max_batch_tokens=64), tokenizer=tokenizer)


def chat(llm: LLM, spec: dict[str, Any], text: str) -> str:
    params = SamplingParams(max_tokens=200, seed=1, structured_outputs=StructuredOutputs(**spec))
    (out,) = llm.chat(begun(text), params)
    assert out.prompt_token_ids[-1:] == llm.tokenizer.encode(text)[-1:]  # type: ignore[union-attr]
    assert out.outputs[0].finish_reason == "stop"
    return text + out.outputs[0].text


@pytest.mark.parametrize(("spec", "text"), OBEYED)
def test_a_grammar_reads_the_beginning_as_given(llm: LLM, spec: dict[str, Any], text: str) -> None:
    whole = chat(llm, spec, text)
    if "json" in spec:
        assert json.loads(whole).keys() == {"name", "n"}
    else:
        assert whole in spec.get("choice", [f" \n\t{a}{b}" for a in "ab" for b in "ab"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"choice": ["yes"]}, "ye "), ({"choice": ["yes"]}, " ye"), ({"regex": "ab{2}"}, "ab "),
    ({"json": SCHEMA}, '{"name" "'),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "text"), REFUSED)
def test_a_beginning_whose_blanks_the_grammar_forbids_is_refused(
    llm: LLM, spec: dict[str, Any], text: str
) -> None:
    with refused(GrammarError, field="structured_outputs"):
        chat(llm, spec, text)
