"""JSON schemas embedded in a user's own Lark grammar are enforced as exactly as other schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mistral_7b.engine.grammar.embedded import expand_json_schemas
from mistral_7b.engine.grammar.spec import GrammarSpec
from mistral_7b.errors import GrammarError
from mistral_7b.sampling.params import StructuredOutputs
from tests.engine.drawing import admits, in_process

BIG = 12345678901234567890123
CONST = f'%json {{"const": {BIG}}}'
HAS_A = '%json {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "maxProperties": 1}'

# grammar, texts that it admits, texts that it does not
ADMITTED: dict[str, tuple[str, list[str], list[str]]] = {
    "a large integer": (f"start: {CONST}", [str(BIG)], [str(BIG - 1), "1.2345678901234567e22", f"{BIG}0"]),
    "int64": ('start: %json {"const": -9223372036854775808}', [str(-(2**63))], [str(-(2**63) + 1)]),
    "a keyword that would be passed over": (
        'start: %json {"type": "string", "minLength": 2, "pattern": "^a"}', ['"ab"'], ['"a"', '"ba"'],
    ),
    "in several rules": (
        f'start: a | b\na: "a" {CONST}\nb: "b" {HAS_A} %json {{"type": "null"}}',
        [f"a{BIG}", 'b{"a":1}null'], [f"b{BIG}", 'a{"a":1}null', "anull", 'b{"a":2}null'],
    ),
    "in groups, repeated, over lines": (
        'start: ("-" %json {\n  "enum": ["é", "//"]\n}\n  | %json true){2}\n',
        ['-"é"[1]', '-"//"-"é"'], ['-"é"', '-"è"1'],
    ),
    "no blank": ('start: %json{"const":1}x\nx: "y"', ["1y"], ["1"]),
    "names of the user's that are ours": (
        f'start: value VALUE_0 value_1\nvalue: "v"\nVALUE_0: "0"\nvalue_1: {HAS_A}\n', ['v0{"a":1}'], ['{"a":1}'],
    ),
    "where something is ignored": (
        f'start: "<" {HAS_A} ">"\n%ignore /#+/', ['<{"a":1}>', '<{ "a": 1 }##>'], ['<{"a":#1}>', '<{"a"#:1}>'],
    ),
    "within a grammar in a grammar": (
        f'start: "x" %lark {{\nstart: "y" {CONST}\n}} "z"', [f"xy{BIG}z"], [f"xy{BIG - 1}z"],
    ),
    "with an attribute": (f"start: n\nn[max_tokens=90]: {CONST}", [str(BIG)], [str(BIG - 1)]),
    "compact": (
        'start: %json {"const": {"a": 1}, "x-guidance": {"whitespace_flexible": false}}',
        ['{"a":1}'], ['{ "a":1}'],
    ),
    "in strings, regexes, comments and names of control tokens": (
        'start: "%json {\\"const\\": 1}" /%json|"/ "/" B // %json {\n# " %json {"const": 1\nB: /\\/"/ "%json"i\n',
        ['%json {"const": 1}%json//"%JSON', '%json {"const": 1}"//"%json'], ["1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADMITTED)
def test_embedded_schemas_allow_exactly_their_texts(name: str) -> None:
    grammar, good, bad = ADMITTED[name]
    spec = StructuredOutputs(grammar=grammar)
    assert [text for text in good if not admits(spec, text)] == []
    assert [text for text in bad if admits(spec, text)] == []


REFUSED = {
    'start: "a"\nb: "é" %json {"type": "array", "uniqueItems": true}': r"line 2, column 8: uniqueItems .* at #$",
    'start: %json {\n"a": 1,}\n': r"line 1, column 8 is not followed by valid JSON",
    "start: %json": r"line 1, column 8 is not followed by valid JSON",
    'start: %json {"const": 1.00000000000000000001}': r"valid JSON: 1\.00000000000000000001",
    'start: %json {"const": ' + "[" * 100_000: r"valid JSON",
    "start: %json [1]": r"a JSON schema must be an object",
    'start: X\nX: "a" %json {}': r"line 2, column 8: X accepts only terminals",
    'start: "a"\n%ignore %json {}': r"line 2, column 9: %ignore accepts only terminals",
    "start: x\nx[lazy]: %json {}": r"%json and %lark .* cannot be used in terminals",
    'start: %json {"anyOf": []}': r"anyOf must be a list",
    'start: %json {"allOf": [{"multipleOf": 211}, {"multipleOf": 199}], "type": "integer"}': r"takes too long",
    'start: %json {"x-guidance": {"item_separator": ";"}}': r"item_separator",
    'start: %json {"$ref": "#/$defs/none"}': r"does not resolve",
}


@pytest.mark.parametrize("grammar", REFUSED, ids=lambda grammar: grammar[:60])
def test_invalid_embedded_schemas_name_field_and_place(grammar: str) -> None:
    with pytest.raises(GrammarError, match=REFUSED[grammar]) as e:
        in_process("demo")[1].start(StructuredOutputs(grammar=grammar), [1])
    assert str(e.value).startswith("structured_outputs")
    assert "\n" not in str(e.value)


def test_a_grammar_without_schemas_is_unchanged() -> None:
    for text in ('start: "%json" /a/', '%llguidance {}\nstart: %regex {"substring_chars": "%json"}'):
        assert expand_json_schemas(text) == text


def test_multiple_of_is_separate_for_each_tool() -> None:
    """The multiples of each schema are counted separately."""
    properties = {str(n): {"type": "integer", "minimum": 0, "multipleOf": n} for n in (199, 211)}
    schema: Any = {"type": "object", "properties": properties, "required": ["199", "211"], "maxProperties": 2}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    spec = GrammarSpec(None, [tool], "required")
    assert '"multipleOf": 211' in spec.lark(leading_space=False)
    assert admits(StructuredOutputs(grammar=f"start: %json {json.dumps(schema)}"), '{"199":398,"211":422}')
