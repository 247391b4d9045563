"""Docstrings as Markdown: the house's columns of arguments become lists.

params      for all prompts        Attributes:
tokenizer   needed for text            page_size: tokens of a KV page
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

COLUMNS = re.compile(r"^(\*{0,2}\w[\w, ]*?) {2,}(\S.*(?:\n {6,}\S.*)*)$", re.M)
SECTION = re.compile(r"^(?:Attributes|Args):\n((?: {4}.*\n?)+)", re.M)
FIELD = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)$", re.M)


def as_markdown(docstring: str) -> str:
    def item(found: re.Match[str]) -> str:
        return f"- `{found[1]}`: {' '.join(found[2].split())}"

    docstring = SECTION.sub(lambda section: FIELD.sub(item, section[1]), docstring)
    lines = COLUMNS.sub(item, docstring).split("\n")
    spaced = [""] + [  # Markdown wants an empty line before a list
        ("\n" if line.startswith("- `") and above and not above.startswith("- `") else "") + line
        for above, line in zip(["", *lines], lines, strict=False)
    ]
    return "\n".join(spaced[1:])


class Columns(Extension):
    """Applies `as_markdown` to every docstring that the site shows."""

    def on_object(self, *, obj: Object, **rest: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
