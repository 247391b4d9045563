"""What is wanted of a text, written as a grammar in llguidance's Lark notation.

    json      start: value          value: rules that rules.py writes
    regex     start: TEXT           TEXT: /.../
    choice    start: TEXT           TEXT: "yes" | "no"
    tools     start: called         called: <TOOL_CALLS> and a list of objects: a tool's name, its arguments

A control token is written with its name in angle brackets: [TOOL_CALLS] is <TOOL_CALLS>, and </s> itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import GrammarError
from ...sampling.params import StructuredOutputs
from . import embedded
from .rules import AS_TRAINED, rules
from .vocabulary import library

LONGEST = 1 << 20  # characters of a grammar
# Every token that spells a text may be used, not only those of its usual encoding: the model knows best.
OPTIONS = '%llguidance {"no_forcing": true}\n'


def lark(spec: StructuredOutputs, spaced: bool, own: bool = False) -> str:
    """The grammar of a text. `spaced`: the model writes a space before a first word, and JSON may begin with it.

    `own`: a `grammar` is the user's, and JSON schemas in it are yet to be written as rules (embedded.py).

    Raises GrammarError for what is too large, or is no grammar in either notation.
    """
    if spec.json is not None or spec.json_object:
        schema = {"type": "object"} if spec.json is None else spec.json
        start = 'start: SPACE? value\nSPACE: " "' if spaced else "start: value"
        text = f"{start}\n{rules(schema, 'structured_outputs.json', 'value')}"
    elif spec.choice is not None:
        text = "start: TEXT\nTEXT: " + " | ".join(json.dumps(choice) for choice in spec.choice)
    elif spec.regex is not None:
        # \d is 0 to 9, as in JSON schemas; \w and \s are Unicode's.
        text = f"start: TEXT\nTEXT: /{library().regex_to_lark(spec.regex, 'd')}/" if spec.regex else 'start: ""'
    else:
        try:
            text = library().grammar_from("grammar", spec.grammar)
        except (ValueError, RecursionError) as e:
            raise GrammarError(f"structured_outputs.grammar: {e}", field="structured_outputs.grammar") from e
        text = embedded.exact(text) if own else text
    if len(text) > LONGEST:
        raise GrammarError(
            f"structured_outputs has {len(text)} characters; at most {LONGEST} are taken",
            field="structured_outputs",
        )
    return f"{text}\n{OPTIONS}"


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """GrammarError for a tool without a name, or whose parameters are no object."""
    for i, tool in enumerate(tools):
        _function(i, tool)


def tool_spec(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] = "auto", parallel: bool = True
) -> StructuredOutputs | None:
    """The grammar that makes a model call a tool as OpenAI's `tool_choice` says; None where it is free.

    "auto" and "none" leave it free; "required" and "any" ask for one call at least (one at most unless
    `parallel`); {"type": "function", "function": {"name": ...}} asks for one call of this tool. The arguments
    obey the tools' schemas. The text is spaced as the model was trained on it, like json.dumps.
    Raises GrammarError for a tool_choice that is none of these, or names none of the tools, and, whatever it is,
    for a tool without a name or whose parameters are no object.
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
            raise GrammarError(f"tool_choice names {name!r}, which is none of the tools", field="tool_choice")
    elif choice not in ("required", "any"):
        raise GrammarError(
            f"tool_choice must be auto, none, required or name a function, not {choice!r}", field="tool_choice"
        )
    if not functions:
        raise GrammarError(f"tool_choice is {choice!r}, and there are no tools", field="tool_choice")
    return StructuredOutputs(grammar="start: called\n" + _calls(functions, parallel))


def or_tools(
    spec: StructuredOutputs, tools: Sequence[Mapping[str, Any]], parallel: bool, spaced: bool
) -> StructuredOutputs:
    """The grammar of a model that is free to call tools, and otherwise writes what `spec` asks for.

    `spaced` is lark's. A grammar of the user's own stands as it is: it may name <TOOL_CALLS> itself.
    """
    if spec.grammar is not None:
        return spec
    functions = {i: _function(i, tool) for i, tool in enumerate(tools)}
    text = lark(spec, spaced).removesuffix(OPTIONS).removeprefix("start:")
    return StructuredOutputs(grammar=f"start: said | called\nsaid:{text}" + _calls(functions, parallel))


def _calls(functions: Mapping[int, Mapping[str, Any]], parallel: bool) -> str:
    """Rules for `called`: a list of calls of these functions, each by its place among the tools."""
    lines = [
        "called: <TOOL_CALLS> GAP? calls",
        'GAP: " "',
        'calls: "[" call (", " call)* "]"' if parallel else 'calls: "[" call "]"',
        "call: " + " | ".join(f"call_{i}" for i in functions),
    ]
    for i, function in functions.items():
        head = json.dumps(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ')
        schema = {"type": "object", **(function.get("parameters") or {"additionalProperties": False})}
        lines.append(f'call_{i}: {head} arguments_{i} "}}"')
        lines.append(rules(schema, f"tools[{i}].function.parameters", f"arguments_{i}", AS_TRAINED))
    return "\n".join(lines)


def _function(place: int, tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stands in a tool of OpenAI's form. GrammarError unless it has a name, and arguments of an object."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise GrammarError(f"tools[{place}] has no function with a name", field=f"tools[{place}]")
    parameters = function.get("parameters")
    where = f"tools[{place}].function.parameters"
    if parameters is not None and not isinstance(parameters, Mapping):
        raise GrammarError(f"{where} must be the JSON schema of an object, not {parameters!r:.80}", field=where)
    if parameters and parameters.get("type", "object") != "object":
        raise GrammarError(f"{where}.type must be 'object', not {parameters['type']!r:.80}", field=f"{where}.type")
    return function
