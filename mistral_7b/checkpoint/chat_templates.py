"""The chat templates in a folder, from the places where transformers looks. Imports no torch.

chat_template.jinja                      if any of these is there, they count alone
additional_chat_templates/NAME.jinja     (also in a folder chat_templates)
tokenizer_config.json                    "chat_template": a text, or a list of {name, template}
chat_template.json                       "chat_template": the same
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..errors import TokenizerError
from .json_files import read_object, read_text


class Source(NamedTuple):
    """The text of a template, and where it comes from."""

    text: str
    name: str


def chat_templates(folder: pathlib.Path) -> dict[str, Source]:
    """Return a folder's templates by name, "default" first. TokenizerError for files that cannot be read."""
    files = {"default": folder / "chat_template.jinja"}
    for name in ("chat_templates", "additional_chat_templates"):
        files |= {f.stem: f for f in sorted((folder / name).glob("*.jinja"))}
    found = {name: Source(read_text(f, TokenizerError), str(f)) for name, f in files.items() if f.is_file()}
    for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        if not found:
            found = {name: Source(text, str(file)) for name, text in _entries(file)}
    return {name: found[name] for name in sorted(found, key=lambda name: name != "default")}


def _entries(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yield the named templates of a JSON file."""
    value = read_object(file).get("chat_template")
    if isinstance(value, Mapping):
        value = [{"name": name, "template": text} for name, text in value.items()]
    if value is None:
        return
    if isinstance(value, str):
        value = [{"name": "default", "template": value}]
    for entry in value if isinstance(value, list) else [value]:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise TokenizerError(
                "chat_template must be a text or a list of {name, template}", field="chat_template", place=file
            )
        yield name, text
