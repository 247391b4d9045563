"""Tasks of usual size from the topics of Python's help: made on the fly, equal wherever Python is the same."""

from __future__ import annotations

import pydoc_data.topics
import random
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]


def passages(words: int) -> list[tuple[str, str]]:
    """(topic, passage): the first `words` words of each topic that has more of them."""
    split = {topic: text.split() for topic, text in sorted(pydoc_data.topics.topics.items())}
    return [(topic, " ".join(text[:words])) for topic, text in split.items() if len(text) > words]


def endings(**kwargs: Any) -> dict[str, Dataset]:
    """24 passages of 80 words, with four ends of 20 words each: the true one and those of others."""
    found, draw = passages(100), random.Random(0)
    rows = []
    for _, text in found[:24]:
        begin, true = (" ".join(part) for part in (text.split()[:80], text.split()[80:]))
        others = draw.sample([" ".join(other.split()[80:]) for _, other in found if other != text], 3)
        answer = draw.randrange(4)
        others.insert(answer, true)
        rows.append({"context": begin, "choices": [f" {choice}" for choice in others], "answer": answer})
    return {"test": Dataset.from_list(rows)}


def letters(**kwargs: Any) -> dict[str, Dataset]:
    """29 passages of 40 words and four topics with letters; the first five are the examples of all others."""
    found, draw = passages(40), random.Random(0)
    rows = []
    for topic, text in found[:29]:
        names = draw.sample([other for other, _ in found if other != topic], 3)
        answer = draw.randrange(4)
        names.insert(answer, topic)
        listed = "\n".join(f"{letter}. {name}" for letter, name in zip("ABCD", names, strict=True))
        rows.append({"context": f"{text}\n{listed}\nAnswer:", "answer": answer})
    return {"few": Dataset.from_list(rows[:5]), "test": Dataset.from_list(rows[5:])}
