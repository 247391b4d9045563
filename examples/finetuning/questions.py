"""Questions, and pairs of a short and a long answer to each: data of shorten.py.

The rejected answer is the model's own, up to its last whole sentence; the chosen one is its beginning. So the pair
differs in length alone, and nothing in it was written by another model or by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

FORMS = ("What is {}?", "How does {} work?", "Tell me about {}.", "Why do people use {}?")
THINGS = (
    "a bicycle", "a lighthouse", "a compass", "a telescope", "a library", "a windmill", "a violin", "an umbrella",
    "a refrigerator", "a bridge", "a candle", "a microscope", "a printing press", "a sailing boat", "a greenhouse",
    "a clock", "a thermometer", "a piano", "a steam engine", "a water pump",
)  # fmt: skip
HELD_OUT_FORMS = ("Explain {} to me.", "What should I know about {}?")
HELD_OUT_THINGS = (
    "a camera", "an elevator", "a tractor", "a museum", "a kettle", "a guitar", "a submarine", "a parachute",
    "a newspaper", "a magnet", "a volcano", "a garden", "a railway", "a mirror", "a barometer",
)  # fmt: skip
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9*\"])")
FEWEST_WORDS = 6  # of a chosen answer


def questions(forms: Sequence[str], things: Sequence[str]) -> list[str]:
    """Return each question about each thing."""
    return [form.format(thing) for thing in things for form in forms]


def sentences(text: str) -> list[str]:
    """Return the whole sentences of a text; an unfinished last one is left out."""
    found = SENTENCE.split(text.strip())
    return found if found[-1].endswith((".", "!", "?")) else found[:-1]


def pair(question: str, answer: str) -> dict[str, Any] | None:
    """Return a row of data from a question and the model's answer; None if the answer is no longer than short.

    The chosen answer is the first sentence, or the first two if one has fewer than FEWEST_WORDS words.
    """
    whole = sentences(answer)
    taken = 1 if whole and len(whole[0].split()) >= FEWEST_WORDS else 2
    if len(whole) <= taken:
        return None
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": " ".join(whole[:taken]),
        "rejected": answer[: answer.rindex(whole[-1]) + len(whole[-1])].strip(),
    }


def figures(answers: Sequence[Any], asked: Sequence[str]) -> dict[str, float]:
    """Return what is measured of answers (`text`, `token_ids`, `finish_reason`) to questions about things.

    tokens          mean length
    cut             share that reached the token limit
    whole           share that are whole sentences, of FEWEST_WORDS words at least
    on_topic        share that name the thing that was asked about
    """
    n = len(answers)
    things = [next(t for t in HELD_OUT_THINGS if t in question) for question in asked]
    named = [thing.split(" ", 1)[1] in made.text.lower() for made, thing in zip(answers, things, strict=True)]
    texts = [made.text.strip() for made in answers]
    whole = [text.endswith((".", "!", "?")) and len(text.split()) >= FEWEST_WORDS for text in texts]
    return {
        "tokens": sum(len(made.token_ids) for made in answers) / n,
        "cut": sum(made.finish_reason == "length" for made in answers) / n,
        "whole": sum(whole) / n,
        "on_topic": sum(named) / n,
    }
