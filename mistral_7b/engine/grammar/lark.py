"""Translates StructuredOutputs and tool definitions into llguidance's Lark notation.

    json      start: value          value: rules from rules.py
    regex     start: TEXT           TEXT: /.../
    choice    start: TEXT           TEXT: "yes" | "no"
    tools     start: tool_calls     tool_calls: <TOOL_CALLS>, then a list of objects with name and arguments;
                                    or objects, each between "<tool_call>" and "</tool_call>"

A control token is written as its name in angle brackets: <TOOL_CALLS> is [TOOL_CALLS], and </s> stays </s>.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import GrammarError
from ...sampling.params import StructuredOutputs
from ...text.tool_calls import CLOSING, OPENING, ToolSyntax
from . import embedded
from .rules import JSON_DUMPS, rules
from .vocabulary import import_llguidance

MISTRAL = ToolSyntax()  # the control token is written by its name
MAX_CHARS = 1 << 20  # characters of a grammar in Lark notation
# Any tokenization of an allowed text is allowed, not only the tokenizer's own: the model chooses.
OPTIONS = '%llguidance {"no_forcing": true}\n'


def lark(spec: StructuredOutputs, leading_space: bool, user_grammar: bool = False) -> str:
    """The Lark grammar of a completion's text.

    `leading_space`: the text begins with the space that SentencePiece writes before a word; JSON may follow it.
    `user_grammar`: `spec.grammar` was written by the user, and embedded JSON schemas are expanded (embedded.py).

    Raises GrammarError for a grammar that is too large, or is valid in neither notation.
    """
    if spec.json is not None or spec.json_object:
        schema = {"type": "object"} if spec.json is None else spec.json
        start = 'start: SPACE? value\nSPACE: " "' if leading_space else "start: value"
        text = f"{start}\n{rules(schema, 'structured_outputs.json', 'value')}"
    elif spec.choice is not None:
        text = "start: TEXT\nTEXT: " + " | ".join(json.dumps(choice) for choice in spec.choice)
    elif spec.regex == "":
        text = 'start: ""'
    elif spec.regex is not None:
        # "d": \d matches 0 to 9, as in JSON schemas; \w and \s match Unicode.
        text = f"start: TEXT\nTEXT: /{import_llguidance().regex_to_lark(spec.regex, 'd')}/"
    else:
        try:
            text = import_llguidance().grammar_from("grammar", spec.grammar)
        except (ValueError, RecursionError) as e:
            raise GrammarError(f"structured_outputs.grammar: {e}", field="structured_outputs.grammar") from e
        text = embedded.expand_json_schemas(text) if user_grammar else text
    if len(text) > MAX_CHARS:
        raise GrammarError(
            f"structured_outputs has {len(text)} characters; at most {MAX_CHARS} are allowed",
            field="structured_outputs",
        )
    return f"{text}\n{OPTIONS}"


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise GrammarError for a tool without a name, or with parameters that are not an object schema."""
    for i, tool in enumerate(tools):
        _function(i, tool)


def tool_spec(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] = "auto", parallel: bool = True,
    syntax: ToolSyntax = MISTRAL,
) -> StructuredOutputs | None:  # fmt: skip
    """The grammar that enforces OpenAI's `tool_choice`; None for "auto" and "none", which enforce nothing.

    "required" and "any" enforce at least one call (exactly one unless `parallel`). {"type": "function",
    "function": {"name": ...}} enforces one call of that function. Arguments match the tools' schemas. Whitespace
    is that of json.dumps, which the model was trained on.
    Raises GrammarError for an invalid tool_choice, for a function that is not among the tools, and, with every
    tool_choice, for a tool without a name or with parameters that are not an object schema.
    """
    functions = {i: _function(i, tool) for i, tool in enumerate(tools or ())}
    if choice in ("auto", "none"):
        return None
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        functions = {i: f for i, f in functions.items() if f["name"] == name}
        parallel = False
        if not functions:
            raise GrammarError(f"tool_choice names {name!r}, which is not one of the tools", field="tool_choice")
    elif choice not in ("required", "any"):
        raise GrammarError(
            f"tool_choice must be auto, none, required or name a function, not {choice!r}", field="tool_choice"
        )
    if not functions:
        raise GrammarError(f"tool_choice is {choice!r}, but the request has no tools", field="tool_choice")
    return StructuredOutputs(grammar="start: tool_calls\n" + _tool_call_rules(functions, parallel, syntax))


def with_tools(
    spec: StructuredOutputs, tools: Sequence[Mapping[str, Any]], parallel: bool, leading_space: bool,
    syntax: ToolSyntax = MISTRAL,
) -> StructuredOutputs:  # fmt: skip
    """The grammar of a completion that either matches `spec` or calls tools.

    `leading_space` is as in `lark`. A user's own grammar is returned unchanged: it can name <TOOL_CALLS> itself.
    """
    if spec.grammar is not None:
        return spec
    functions = {i: _function(i, tool) for i, tool in enumerate(tools)}
    text = lark(spec, leading_space).removesuffix(OPTIONS).removeprefix("start:")
    return StructuredOutputs(
        grammar=f"start: content | tool_calls\ncontent:{text}" + _tool_call_rules(functions, parallel, syntax)
    )


def _tool_call_rules(functions: Mapping[int, Mapping[str, Any]], parallel: bool, syntax: ToolSyntax) -> str:
    """The rule `tool_calls`: calls of these functions, which are keyed by their index in the tools."""
    if syntax.tagged:
        opening, closing = (
            json.dumps(tag) if token is None else tag  # a control token is written without quotation marks
            for tag, token in ((OPENING, syntax.begin), (CLOSING, syntax.end))
        )
        lines = [
            f"tool_calls: GAP? tagged{' (GAP? tagged)*' if parallel else ''}",
            f"tagged: {opening} GAP? call GAP? {closing}",
            'GAP: " " | "\\n"',
        ]
    else:
        lines = [
            "tool_calls: <TOOL_CALLS> GAP? calls",
            'GAP: " "',
            'calls: "[" call (", " call)* "]"' if parallel else 'calls: "[" call "]"',
        ]
    lines += [
        "call: " + " | ".join(f"call_{i}" for i in functions),
    ]
    for i, function in functions.items():
        head = json.dumps(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ')
        schema = {"type": "object", **(function.get("parameters") or {"additionalProperties": False})}
        lines.append(f'call_{i}: {head} arguments_{i} "}}"')
        lines.append(rules(schema, f"tools[{i}].function.parameters", f"arguments_{i}", JSON_DUMPS))
    return "\n".join(lines)


def _function(index: int, tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `function` of a tool in OpenAI's format. GrammarError without a name or with non-object parameters."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise GrammarError(f"tools[{index}] has no function with a name", field=f"tools[{index}]")
    parameters = function.get("parameters")
    where = f"tools[{index}].function.parameters"
    if parameters is not None and not isinstance(parameters, Mapping):
        raise GrammarError(f"{where} must be the JSON schema of an object, not {parameters!r:.80}", field=where)
    if parameters and parameters.get("type", "object") != "object":
        raise GrammarError(f"{where}.type must be 'object', not {parameters['type']!r:.80}", field=f"{where}.type")
    return function
