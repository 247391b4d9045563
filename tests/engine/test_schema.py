"""JSON schemas keyword by keyword: the texts that their grammars allow, and the keywords that they refuse."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from refusals import refused

from mistral_7b.engine.grammar import lark as lark_module
from mistral_7b.engine.grammar.lark import tool_spec
from mistral_7b.engine.grammar.spec import GrammarSpec
from mistral_7b.errors import GrammarError, SamplingError
from mistral_7b.sampling.params import StructuredOutputs
from tests.engine import drawing

LOW, HIGH, BIG = -(2**63), 2**63 - 1, 1234567890123456789
LIST: dict[str, Any] = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}


def admits(schema: Any, text: str) -> bool:
    """Whether a schema allows a text as a complete one."""
    return drawing.admits(StructuredOutputs(json=schema), text)


def as_before(schema: Any, where: str, name: str, style: object = None) -> str:
    """The schema compiled by llguidance's own %json, in place of rules.rules."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}"


# schema, texts that it admits, texts that it does not
ADMITTED: dict[str, tuple[Any, list[str], list[str]]] = {
    "enum": ({"enum": [BIG, True, 1]}, [str(BIG), "true", "1"], [str(BIG - 21), f"{BIG}0", "false", "1.0"]),
    "const in const": ({"const": [{"a": BIG}]}, [f'[{{"a":{BIG}}}]'], [f'[{{"a":{BIG - 21}}}]']),
    "const -2^63": ({"const": LOW}, [str(LOW)], [str(LOW - 1), str(LOW + 1), str(-LOW)]),
    "one integer": ({"type": "integer", "minimum": LOW, "maximum": LOW}, [str(LOW)], [str(LOW + 1), "0"]),
    "int64": (
        {"type": "integer", "minimum": LOW, "maximum": HIGH},
        [str(LOW), str(HIGH), "0", "-1", "42"], [str(LOW - 1), str(HIGH + 1), "-0", "01", "1.5"],
    ),
    "uint64": ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [str(2**64 - 1)], [str(2**64), "-1"]),
    "above 2^53": (
        {"type": "integer", "minimum": 2**53 + 1, "exclusiveMaximum": 2**53 + 5},
        [str(2**53 + 1), str(2**53 + 4)], [str(2**53), str(2**53 + 5)],
    ),
    "exclusive": (
        {"type": "integer", "exclusiveMinimum": 2**60, "maximum": 2**60 + 2}, [str(2**60 + 1)], [str(2**60)],
    ),
    "draft 4": ({"type": "integer", "minimum": 5, "exclusiveMinimum": True}, ["6"], ["5"]),
    "decimals": (
        {"type": "number", "minimum": -0.1, "exclusiveMaximum": 2.25},
        ["-0.1", "-0.09", "0", "2.2499", "0.0"], ["-0.11", "2.25", "2.3", "-1", "3"],
    ),
    "a whole float": ({"const": 1.0}, ["1"], ["1.5", "true"]),
    "multiples": (
        {"type": "integer", "multipleOf": 7, "minimum": -14, "maximum": 30}, ["-14", "0", "28"], ["-15", "35"],
    ),
    "multiples beside others": ({"multipleOf": 0.5, "type": ["number", "string"]}, ["1.5", '"a"'], ["1.25"]),
    "no float": ({"type": "integer"}, ["5"], ["5.0", "5e1", "true"]),
    "numbers end": ({"type": "number"}, ["-1.5e10", "1e-299"], ["1e400", "-", "1."]),
    "names by escapes": (
        {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}, "type": "object"},
        ['{"a":1}', '{"a":1,"b":"x"}', "{}"], ['{"\\u0061":"x"}', '{"a":1,"\\u0061":"x"}', '{"a":"x"}'],
    ),
    "a pattern over a property": (
        {"type": "object", "properties": {"a": {"maxLength": 1}}, "patternProperties": {"^a": {"type": "string"}},
         "additionalProperties": False},
        ['{"a":"x"}', '{"a":"x","ab":"xx"}', "{}"], ['{"a":1}', '{"a":"xx"}', '{"ab":1}', '{"b":"x"}'],
    ),
    "a pattern that is a property": (
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"^a$": {"type": "integer"}},
         "additionalProperties": False},
        ['{"a":1}', "{}"], ['{"a":"x"}', '{"a":1,'],
    ),
    "a pattern over required": (
        {"type": "object", "required": ["ab"], "patternProperties": {"^a": {"type": "integer"}},
         "additionalProperties": False},
        ['{"ab":1}', '{"ab":1,"a":2}'], ["{}", '{"ab":"x"}', '{"a":1}'],
    ),
    "patterns over each other": (
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"minimum": 5}},
         "additionalProperties": False},
        ['{"a":1}', '{"ab":5}', '{"b":"x"}'], ['{"ab":1}', '{"ab":"x"}', '{"c":1}'],
    ),
    "patterns that exclude each other": (
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}},
         "additionalProperties": False},
        ['{"a":1,"b":"x"}'], ['{"ab":1}', '{"ab":"x"}'],
    ),
    "required and forbidden": (
        {"anyOf": [{"type": "object", "required": ["a"], "additionalProperties": False}, {"type": "null"}]},
        ["null"], ["{"],
    ),
    "a list": (
        LIST, ['{"v":1,"next":null}', '{"v":1,"next":{"v":2,"next":null}}'], ['{"v":1}', '{"next":null,"v":1}'],
    ),
    "maxProperties": (
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2, "minProperties": 1},
        ['{"a":1}', '{"b":1,"c":2}', '{"c":1,"x":2}'], ["{}", '{"a":1,"b":2,"c":3}', '{"b":1,"c":2,"x":3}'],
    ),
    "no properties": (
        {"type": "object", "properties": {"a": {}}, "maxProperties": 0}, ["{}"], ['{"a":1}', '{"b":1}'],
    ),
    "items": (
        {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 1,
         "maxItems": 3},
        ["[1]", "[1,2]", "[1,2,3]"], ["[]", "[2]", "[1,3]", "[1,2,3,3]"],
    ),
    "no more items": ({"type": "array", "prefixItems": [{"const": 1}, False]}, ["[]", "[1]"], ["[1,1]", "[1,"]),
    "items of draft 7": ({"items": [{"const": 1}], "additionalItems": False, "type": "array"}, ["[1]"], ["[1,1]"]),
    "all of": (
        {"allOf": [{"$ref": "#/$defs/a%25~1b"}, {"maxLength": 3}], "minLength": 2, "type": "string",
         "$defs": {"a%/b": {"pattern": "^a"}}},
        ['"ab"', '"abc"'], ['"a"', '"abcd"', '"ba"'],
    ),
    "one of": (
        {"oneOf": [
            {"properties": {"k": {"const": "a"}, "v": {"type": "null"}}, "required": ["k", "v"], "type": "object"},
            {"properties": {"k": {"const": "b"}}, "required": ["k"], "type": "object"}, {"type": "string"},
        ]},
        ['{"k":"a","v":null}', '{"k":"b","v":3}', '"x"'], ['{"k":"a","v":3}', "1"],
    ),
    "anchors": (
        {"$id": "https://e.org/s", "$ref": "https://e.org/s#n",
         "definitions": {"n": {"$anchor": "n", "type": "null"}}},
        ["null"], ["1"],
    ),
    "annotations": (
        {"type": "null", "title": "t", "description": "d", "default": 2**70, "examples": [1], "$comment": "c",
         "deprecated": True, "readOnly": True, "x-a": {"not": {}}, "nullable": True, "uniqueItems": False},
        ["null"], ["1"],
    ),
    "anything": (True, ['{"a":[1,null,"x"]}', "1e5", '"\\u007f"'], ["nul", "[1", '"\\u0061"']),
    "blanks": ({"const": {"a": [1]}}, ['{ "a" :\n[ 1 ] }', '{"a":[1]}'], [' {"a":[1]}', '{"a":[1]} ']),
}  # fmt: skip


@pytest.mark.parametrize("name", ADMITTED)
def test_a_schema_allows_exactly_its_texts(name: str) -> None:
    schema, good, bad = ADMITTED[name]
    schema = schema if isinstance(schema, dict) else {"allOf": [schema]}
    assert [text for text in good if not admits(schema, text)] == []
    assert [text for text in bad if admits(schema, text)] == []


@pytest.mark.parametrize(
    "name",
    ["enum", "const in const", "above 2^53", "names by escapes", "numbers end"],
)
def test_llguidance_alone_allows_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This shows that the test above can fail."""
    monkeypatch.setattr(lark_module, "rules", as_before)
    schema, _, bad = ADMITTED[name]
    assert [text for text in bad if admits(schema, text)]


def test_a_comma_is_followed_by_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """llguidance alone allows the comma and then reaches a dead end."""
    schema = ADMITTED["a pattern that is a property"][0]
    assert not admits(schema, '{"a":1,')
    monkeypatch.setattr(lark_module, "rules", as_before)
    with refused(GrammarError, field="structured_outputs"):
        admits(schema, '{"a":1,"')


@pytest.mark.wording
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a/b": {"uniqueItems": True}}}, "uniqueItems is not supported, at #/properties/a~1b"),
        ({"items": {"not": {"type": "null"}}}, "not is not supported, at #/items"),
        ({"if": True, "then": False}, "if is not supported, at #"),
        ({"contains": {}}, "contains is not supported"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired is not supported"),
        ({"dependencies": {"a": ["b"]}}, "dependencies is not supported"),
        ({"propertyNames": {"maxLength": 1}}, "propertyNames is not supported"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties is not supported"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "where #/oneOf/0 and #/oneOf/1 can both match"),
        ({"type": "object", "minProperties": 2}, "minProperties is not supported beyond"),
        ({"$ref": "https://e.org/x"}, r"\$ref 'https://e.org/x' does not resolve"),
        ({"properties": {"a": {"$id": "x", "items": {"$ref": "#"}}}}, r"\$ref is not supported within"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{}, {"$ref": "#/$defs/a"}]}}}, "refers to itself"),
        ({"pattern": "(?=a)"}, r"pattern '\(\?=a\)' cannot be used: look-around"),
        ({"patternProperties": {"a(": {}}}, "patternProperties 'a[(]' cannot be used: unclosed group"),
        ({"pattern": r"\bword"}, r"\\b is not supported"),
        ({"type": "integer", "multipleOf": 3, "minimum": 2**60}, "multipleOf is supported for numbers up to 2"),
        ({"type": "integer", "multipleOf": 99991}, "multipleOf 99991 takes too long"),
        ({"multipleOf": 0}, "multipleOf must be greater than 0"),
        ({"minLength": -1}, "minLength must be a whole number"),
        ({"maxItems": 1.5}, "maxItems must be a whole number"),
        ({"minimum": "1"}, "minimum must be a number, not '1', at #"),
        ({"minimum": True}, "minimum must be a number"),
        ({"const": 10**1000}, "at most 400 digits"),
        ({"enum": 3}, "enum must be a list"),
        ({"anyOf": []}, "anyOf must be a list"),
        ({"type": ["string", 3]}, "Invalid type: 3"),
        ({"properties": []}, "properties must be an object"),
        ({"properties": {"a": 3}}, "a JSON schema must be an object, true or false, not 3, at #/properties/a"),
        ({"required": ["a", 3]}, "required must be a list of names"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "prefixItems is not a"),
        ({"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)}},
         "more than 100 schemas apply to one value"),
    ],
)  # fmt: skip
def test_unsupported_keywords_are_refused_by_name_and_place(schema: Any, words: str) -> None:
    with refused(GrammarError, field="structured_outputs.json") as e:
        admits(schema, "")
    assert re.search(words, str(e.value))
    assert len(str(e.value)) < 500


MANY = "(a|b)*a(a|b){40}c"  # whose complement has more states than llguidance looks at
WITHIN = {"patternProperties": {MANY: {}, "b": {}}}
FIXED = "^((a{1,1000}){1,1000}){1,1000}$"


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"x": WITHIN}}, "#/properties/x$"),
        ({"items": {"type": "string", "pattern": FIXED, "allOf": [{"pattern": "b"}]}}, "#/items$"),
        (
            {"properties": {"x": {"pattern": FIXED}}, "patternProperties": {"x": {"pattern": "b"}}},
            "#/properties/x and ",
        ),
    ],
)
def test_patterns_that_are_too_large_name_their_place(schema: Any, place: str) -> None:
    with pytest.raises(
        GrammarError, match=f"^structured_outputs.json: pattern, format .* together: .*, at {place}"
    ):
        admits(schema, "")


def test_values_that_are_not_json_are_named() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": {1}}}}
    for name, spec in (
        ("tools", GrammarSpec(None, [tool], "required")),
        ("tool_choice", GrammarSpec(None, [], {"function": {1}})),
    ):
        with pytest.raises(GrammarError, match=f"^{name} cannot be written as JSON: Object of type set"):
            spec.to_json()
    spec = GrammarSpec(StructuredOutputs(choice=["a"]), [], {"function": {"name": "f"}}, False)
    assert GrammarSpec.from_json(spec.to_json()).to_json() == spec.to_json()


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"enum": []},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "string", "pattern": "^a$", "minLength": 2},
        {"type": "string", "format": "ipv4", "enum": ["1.2.3", "a"]},
        {"allOf": [{"pattern": "^a+$"}, {"pattern": "^b"}], "type": "string"},
        {"type": "integer", "exclusiveMinimum": 2**60, "exclusiveMaximum": 2**60 + 1},
        {"type": "number", "minimum": 1, "exclusiveMaximum": 1},
        {"type": "integer", "multipleOf": 7, "minimum": 8, "maximum": 13},
        {"type": "object", "required": ["a"], "additionalProperties": False},
        {"type": "object", "required": ["a"], "properties": {"a": {"const": 1, "type": "string"}}},
        {"type": "object", "required": ["a", "b"], "maxProperties": 1},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False, "minProperties": 2},
        {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "items": False, "minItems": 1},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"enum": [1, "a"], "type": "boolean"},
    ],
)
def test_a_schema_without_finite_texts_is_refused(schema: Any) -> None:
    with refused(GrammarError, field="structured_outputs.json"):
        admits({"allOf": [schema]}, "")


def test_numbers_are_parsed_exactly() -> None:
    assert StructuredOutputs(json='{"enum": [12345678901234567890, 0.1, 1e3]}').json == {
        "enum": [12345678901234567890, 0.1, 1000.0]
    }
    for number in ("0.12345678901234567890", "1e400", "NaN", "-Infinity"):
        with refused(SamplingError, field="structured_outputs.json"):
            StructuredOutputs(json=f'{{"const": {number}}}')
    with refused(SamplingError, field="structured_outputs.json"):
        StructuredOutputs(json={"const": float("inf")})


@pytest.mark.parametrize("parameters", [[], "x", True, {"type": "array"}, {"type": ["object", "null"]}])
def test_tool_parameters_must_be_an_object(parameters: Any) -> None:
    tools = [{"function": {"name": "a"}}, {"function": {"name": "b", "parameters": parameters}}]
    for choice in ("required", "auto"):
        with pytest.raises(GrammarError) as e:
            tool_spec(tools, choice)
        assert str(e.value.field).startswith("tools[1].function.parameters")


def test_a_tool_with_an_unsupported_schema_is_named() -> None:
    tools = [
        {"function": {"name": "a"}},
        {"function": {"name": "b", "parameters": {"properties": {"c": {"not": {}}}}}},
    ]
    for choice in ("required", {"type": "function", "function": {"name": "b"}}):
        with refused(GrammarError, field="tools[1].function.parameters"):
            tool_spec(tools, choice)
