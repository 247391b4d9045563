"""Expands JSON schemas in a user's own Lark grammar, `%json {...}`, into the exact rules of rules.py.

    answer: "Result: " %json {"type": "integer"}
    answer: "Result: " %lark {              a nested grammar: its names and %ignore are separate from the user's
    start: value
    value: VALUE_0
    ...
    }

llguidance's own %json rounds large integers and ignores keywords that schema.py refuses.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ...errors import GrammarError
from ...sampling.params import as_written
from .rules import FLEXIBLE, Style, rules

FIELD = "structured_outputs.grammar"
# Tokens of llguidance's lexer that may contain "%json", and the start of a line. All else is skipped.
TOKEN = re.compile(
    r"""
      "(?:\\.|[^"\\\n])*"                                               # a string, also inside JSON
    | (?:\#|//)[^\n]*                                                  # a comment
    | /(?:\\.|[^/\\])+/                                                # a regular expression
    | <[^<>\s]+>                                                       # a control token
    | ^[ \t]*(?P<head>%ignore|_?[A-Z][A-Z0-9_-]*|[!?_]*[a-z][a-z0-9_-]*)  # what the line defines
    | (?P<json>%json)[ \t\r\n]*
    """,
    re.VERBOSE | re.MULTILINE,
)
_decoder = json.JSONDecoder(parse_float=as_written, parse_constant=as_written)


def expand_json_schemas(text: str) -> str:
    """A Lark grammar with its JSON schemas expanded into rules.

    Raises GrammarError, with line and column, for invalid JSON, for a schema that cannot be enforced exactly, and
    for a schema where only a terminal is allowed.
    """
    parts: list[str] = []
    done = at = 0
    head = ""
    while found := TOKEN.search(text, at):
        at = found.end()
        head = found["head"] or head
        if found["json"] is None:
            continue
        start = found.start()
        line, column = text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
        where = f"{FIELD}: the %json in line {line}, column {column}"
        try:
            value, at = _decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise GrammarError(f"{where} is not followed by valid JSON: {e}", field=FIELD) from e
        if head == "%ignore" or head.lstrip("_")[:1].isupper():
            raise GrammarError(
                f"{where}: {head} accepts only terminals, and a schema is a rule",
                field=FIELD,
                hint="use the schema in a rule, which has a lower-case name",
            )
        schema, style = _whitespace_style(value, where)
        try:
            written = rules(schema, where, "value", style)
        except GrammarError as e:
            raise GrammarError.of(e, field=FIELD) from e
        parts += [text[done:start], f"%lark {{\nstart: value\n{written}\n}}"]
        done = at
    return "".join([*parts, text[done:]])


def _whitespace_style(schema: Any, where: str) -> tuple[Any, Style]:
    """A schema without llguidance's keyword "x-guidance", and the whitespace style that it selects."""
    if not isinstance(schema, dict) or "x-guidance" not in schema:
        return schema, FLEXIBLE
    asked = schema["x-guidance"]
    if asked not in ({}, {"whitespace_flexible": True}, {"whitespace_flexible": False}):
        raise GrammarError(
            f"{where}: x-guidance supports only whitespace_flexible, not {asked!r:.80}", field=FIELD
        )
    style = FLEXIBLE if asked.get("whitespace_flexible", True) else Style()
    return {key: value for key, value in schema.items() if key != "x-guidance"}, style
