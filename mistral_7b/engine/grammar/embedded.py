"""JSON schemas that stand in a user's own Lark grammar, as `%json {...}`, written as our own exact rules.

    answer: "Result: " %json {"type": "integer"}
    answer: "Result: " %lark {              a grammar of its own: its names and its %ignore are not the user's
    start: value
    value: VALUE_0
    ...
    }

llguidance's own reading of %json rounds large integers and passes over keywords that schema.py refuses.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ...errors import GrammarError
from ...sampling.params import as_written
from .rules import FREE, Style, rules

FIELD = "structured_outputs.grammar"
# What llguidance's lexer takes whole, and what begins a line. Everything else is passed character by character.
TOKEN = re.compile(
    r"""
      "(?:\\.|[^"\\\n])*"                                               # a string, also one within JSON
    | (?:\#|//)[^\n]*                                                  # a comment
    | /(?:\\.|[^/\\])+/                                                # a regular expression
    | <[^<>\s]+>                                                       # a control token
    | ^[ \t]*(?P<head>%ignore|_?[A-Z][A-Z0-9_-]*|[!?_]*[a-z][a-z0-9_-]*)  # what the line is about
    | (?P<json>%json)[ \t\r\n]*
    """,
    re.VERBOSE | re.MULTILINE,
)
_decoder = json.JSONDecoder(parse_float=as_written, parse_constant=as_written)


def exact(text: str) -> str:
    """A Lark grammar with its JSON schemas written as rules.

    Raises GrammarError, with the line and the column, for a schema that cannot be obeyed exactly, for what is no
    JSON, and for a schema where only a terminal may stand.
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
            raise GrammarError(f"{where}: what follows is no JSON: {e}", field=FIELD) from e
        if head == "%ignore" or head.lstrip("_")[:1].isupper():
            raise GrammarError(
                f"{where}: {head} takes terminals, and a schema is none",
                field=FIELD,
                hint="give it to a rule, with a name in small letters",
            )
        schema, style = _styled(value, where)
        try:
            written = rules(schema, where, "value", style)
        except GrammarError as e:
            raise GrammarError.of(e, field=FIELD) from e
        parts += [text[done:start], f"%lark {{\nstart: value\n{written}\n}}"]
        done = at
    return "".join([*parts, text[done:]])


def _styled(schema: Any, where: str) -> tuple[Any, Style]:
    """A schema without llguidance's own "x-guidance", and how JSON is to be spaced as that says."""
    if not isinstance(schema, dict) or "x-guidance" not in schema:
        return schema, FREE
    asked = schema["x-guidance"]
    if asked not in ({}, {"whitespace_flexible": True}, {"whitespace_flexible": False}):
        raise GrammarError(
            f"{where}: of x-guidance only whitespace_flexible is supported, not {asked!r:.80}", field=FIELD
        )
    style = FREE if asked.get("whitespace_flexible", True) else Style()
    return {key: value for key, value in schema.items() if key != "x-guidance"}, style
