"""`mistral-7b run`: answer one message, or chat. The bundled model, which cannot chat, continues the message."""

from __future__ import annotations

from . import chat, generate


def run(argv: list[str]) -> int:
    words = [word for word in argv[:2] if not word.startswith("-")]
    if len(words) == 2 and words[0] == "demo":
        return generate.run(argv)
    return chat.run(argv, "run")
