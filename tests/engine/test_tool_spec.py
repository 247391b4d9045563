"""Tool calls that a grammar makes a model write."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import pytest
from refusals import refused
from template_shapes import HERMES_TOOLS
from tokenizer_files import CHATML, sentencepiece_folder

from mistral_7b.engine.grammar.client import Grammars
from mistral_7b.engine.grammar.lark import tool_spec, with_tools
from mistral_7b.engine.grammar.spec import GrammarSpec
from mistral_7b.errors import GrammarError
from mistral_7b.sampling.params import StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.text.tool_calls import CLOSING, OPENING, ToolCallStream
from tests.engine.drawing import SPARE, SPECS, allowed, draw, opened

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Zürich"]}, "days": {"$ref": "#/$defs/n"}},
        "required": ["city"], "additionalProperties": False, "$defs": {"n": {"type": "integer", "maximum": 9}}}}},
    {"type": "function", "function": {"name": "say_hi", "parameters": {
        "properties": {"to": {"type": "string", "maxLength": 6}}, "required": ["to"],
        "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def v3() -> tuple[Tokenizer, Grammars]:
    return opened("v3")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "say_hi"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_tool_calls_are_forced_as_asked_for(
    v3: tuple[Tokenizer, Grammars], choice: str | dict, parallel: bool
) -> None:
    tokenizer, grammars = v3
    spec = tool_spec(TOOLS, choice, parallel)
    assert spec is not None
    control = tokenizer.encode_chat([{"role": "user", "content": "a"}], TOOLS)
    schemas = {t["function"]["name"]: t["function"].get("parameters", {"maxProperties": 0}) for t in TOOLS}
    counts, names, chance = set(), set(), random.Random(1)
    for after in ([4], tokenizer.encode("Well,"), control):
        for _ in range(12):
            tokens, _ = draw(grammars.start(spec, after), tokenizer, after, chance, ending=1)
            assert tokens[0] == 5
            stream, decoder = ToolCallStream(tokenizer.tool_syntax, str), tokenizer.stream(after)
            content = [stream.push(t, decoder.push(t))[0] for t in tokens]
            assert ("".join(content), stream.close()) == ("", ("", []))
            for call in stream.calls:
                arguments = json.loads(call.arguments)
                jsonschema.validate(arguments, schemas[call.name])
                assert call.arguments == json.dumps(arguments, ensure_ascii=False)
            counts.add(len(stream.calls))
            names.update(call.name for call in stream.calls)
    assert (max(counts) > 1) == (parallel and choice == "required")
    assert names == (set(schemas) if choice == "required" else {"say_hi"})


@pytest.mark.parametrize("name", ["json", "json_object", "regex", "choice"])
def test_a_text_or_calls_where_the_model_is_free(v3: tuple[Tokenizer, Grammars], name: str) -> None:
    tokenizer, grammars = v3
    wanted, obeys = SPECS[name]
    chance, names = random.Random(2), {t["function"]["name"] for t in TOOLS}
    for after, leading_space in (([4], False), (tokenizer.encode("Well,"), True)):
        spec = with_tools(wanted, TOOLS, False, leading_space)
        for calls in (True, False, True, False):
            state = grammars.start(spec, after)
            assert 5 in allowed(state.masks()[0][0])
            if calls:
                state.accept(5)
            tokens, text = draw(state, tokenizer, [5] if calls else after, chance, ending=0.1)
            if calls or tokens[:1] == [5]:
                (call,) = json.loads(text)
                assert call["name"] in names
            else:
                assert obeys(text)
    mine = StructuredOutputs(grammar='start: "x"')
    assert with_tools(mine, TOOLS, True, False) is mine


@pytest.mark.parametrize("control", [False, True])  # whether the tags are control tokens
@pytest.mark.parametrize("parallel", [False, True])
def test_tagged_calls_are_forced_as_asked_for(tmp_path: Path, control: bool, parallel: bool) -> None:
    added = (*CHATML, OPENING, CLOSING) if control else CHATML
    tokenizer = Tokenizer.from_pretrained(sentencepiece_folder(tmp_path, added=added, chat_template=HERMES_TOOLS))
    grammars = Grammars(tokenizer, tokenizer.vocab_size + SPARE, ends=frozenset((tokenizer.eos_id or 0,)))
    syntax, counts, chance = tokenizer.tool_syntax, set(), random.Random(3)
    asked = tokenizer.encode_chat([{"role": "user", "content": "a"}], TOOLS)
    for choice, structured in (("required", None), ("auto", SPECS["json"][0])):
        spec = GrammarSpec.of(structured, TOOLS, choice, parallel, syntax)
        assert spec is not None
        for after in (asked, [tokenizer.bos_id or 0], asked):
            tokens, text = draw(grammars.start(spec, after), tokenizer, after, chance, ending=0.3)
            if choice == "auto" and OPENING not in text and syntax.begin not in tokens:
                assert SPECS["json"][1](text)
                continue
            stream, decoder = ToolCallStream(syntax, str), tokenizer.stream(after)
            content = [stream.push(t, decoder.push(t))[0] for t in tokens]
            assert ("".join(content), stream.close()) == ("", ("", []))
            assert {c.name for c in stream.calls} <= {t["function"]["name"] for t in TOOLS}
            assert all(isinstance(json.loads(c.arguments), dict) for c in stream.calls)
            counts.add(len(stream.calls))
    assert (max(counts) > 1) == parallel


def test_what_tool_choice_cannot_be() -> None:
    assert tool_spec(TOOLS, "auto") is None
    assert tool_spec(TOOLS, "none") is None
    with refused(GrammarError, field="tool_choice"):
        tool_spec(TOOLS, {"type": "function", "function": {"name": "fly"}})
    with refused(GrammarError, field="tool_choice"):
        tool_spec([], "required")
    with refused(GrammarError, field="tool_choice"):
        tool_spec(TOOLS, "sometimes")
    with refused(GrammarError, field="tools[0]"):
        tool_spec([{"type": "function"}], "any")
    v1 = Tokenizer.v1()
    with refused(GrammarError, field="structured_outputs"):
        Grammars(v1, 32000).start(tool_spec(TOOLS, "required"), [1])  # type: ignore[arg-type]
