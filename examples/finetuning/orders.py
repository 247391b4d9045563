"""Orders in English, and the one line of JSON that each has to become: data and validator of teach_format.py.

    Anna Keller wants 3 bags of rice in Porto by Friday.
    {"item":"bags of rice","count":3,"city":"Porto","day":"fri","buyer":"Anna Keller"}

Held-out rows share no name, item, city or count with those to train on, and half of them have a form of sentence
that is not trained on either. Most names to train on are invented: a few dozen real ones, a small model learns by
heart, in place of copying what the sentence says.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
KEYS = ("item", "count", "city", "day", "buyer")
FORMAT = '{"item":text,"count":number,"city":text,"day":"mon" to "sun","buyer":text}'
PROMPT = f"Write the order as one line of JSON without spaces between the fields, {FORMAT}: "


class Words(NamedTuple):
    """What the orders of one split are made of."""

    sentences: tuple[str, ...]
    firsts: tuple[str, ...]
    lasts: tuple[str, ...]
    items: tuple[str, ...]
    cities: tuple[str, ...]
    counts: tuple[int, ...]


ONSETS = (
    *("b", "br", "d", "f", "fl", "g", "gr", "h", "k", "l", "m", "n"),
    *("p", "pr", "qu", "r", "s", "st", "t", "tr", "v", "w", "z"),
)


def invented(count: int, seed: int) -> tuple[str, ...]:
    """Return names of two or three random syllables, such as Brovin."""
    rng, names = random.Random(seed), set[str]()
    codas = ("", "", "n", "r", "l", "s", "ck", "th", "nd")
    while len(names) < count:
        syllables = [
            rng.choice(ONSETS) + rng.choice("aeiou") + rng.choice(codas) for _ in range(rng.randint(2, 3))
        ]
        names.add("".join(syllables).capitalize())
    return tuple(sorted(names))


KINDS = ("bags of", "crates of", "small", "yellow", "heavy", "second-hand", "Spanish", "round")
THINGS = ("ropes", "tiles", "lemons", "radios", "carpets", "hammers", "shovels", "ribbons", "onions", "bells")
TRAIN = Words(
    sentences=(
        "{buyer} wants {count} {item} in {city} by {day}.",
        "On {day}, please deliver {count} {item} to {buyer} in {city}.",
        "We need {count} {item} for {buyer}. They must reach {city} on {day}.",
        "Please send {buyer} of {city} {count} {item}; {day} is fine.",
        "{city}, {day}: {count} {item} were ordered by {buyer}.",
        "Could {buyer} have {count} {item} on {day}? The address is in {city}.",
        "Hi, {buyer} here. I would like {count} {item}, delivered to {city} next {day}.",
        "Order for {day}: {item}, {count} of them, for {buyer}, {city}.",
    ),
    firsts=(
        "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karin",
        "Louis", "Mira", "Noah", "Olga", "Paul", *invented(80, 1),
    ),
    lasts=(
        "Adler", "Brown", "Costa", "Dubois", "Evans", "Fischer", "Garcia", "Hansen", "Ivanov", "Jensen",
        "Keller", "Lopez", "Moore", *invented(80, 2),
    ),
    items=(
        "bags of rice", "red chairs", "wool blankets", "bottles of milk", "steel pipes", "desk lamps", "apples",
        "boxes of nails", "paper cups", "tins of paint", "garden tables", "pairs of boots", "candles", "keyboards",
        "jars of honey", "pillows", "cotton shirts", "bicycle tyres", "packs of tea", "notebooks",
        *(f"{kind} {thing}" for kind in KINDS for thing in THINGS),
    ),
    cities=(
        "Porto", "Vienna", "Madrid", "Oslo", "Paris", "Berlin", "Dublin", "Athens", "Milan", "Warsaw",
        "Geneva", "Bergen", "Toulouse", "Graz", *invented(80, 3),
    ),
    counts=tuple(n for n in range(2, 100) if n % 4),
)  # fmt: skip
HELD_OUT = TRAIN._replace(
    firsts=("Quentin", "Rosa", "Stefan", "Tanja", "Ursula", "Victor", "Wanda", "Yusuf"),
    lasts=("Novak", "Olsen", "Petrov", "Rossi", "Schmidt", "Tanaka", "Vogel", "Walker"),
    items=(
        "green umbrellas", "loaves of bread", "glass vases", "sacks of flour", "wooden spoons", "kettles",
        "mirrors", "rolls of tape", "winter coats", "baskets of pears",
    ),
    cities=("Lisbon", "Prague", "Zurich", "Helsinki", "Naples", "Bristol", "Leipzig", "Antwerp"),
    counts=tuple(range(4, 100, 4)),
)  # fmt: skip
UNSEEN = HELD_OUT._replace(
    sentences=(
        "{count} {item} should be in {city} before {day} ends, says {buyer}.",
        "For {buyer} we ship {count} {item} to {city}, arriving {day}.",
    )
)


def line(order: dict[str, Any]) -> str:
    """Return the one right line of an order."""
    return json.dumps({key: order[key] for key in KEYS}, separators=(",", ":"))


def orders(words: Words, count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` rows of data, no two alike: messages of a sentence and its line."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        order = {
            "item": rng.choice(words.items),
            "count": rng.choice(words.counts),
            "city": rng.choice(words.cities),
            "buyer": f"{rng.choice(words.firsts)} {rng.choice(words.lasts)}",
        }
        day = rng.choice(DAYS)
        sentence = rng.choice(words.sentences).format(**order, day=day)
        rows[sentence] = line({**order, "day": day[:3].lower()})
    return [
        {"messages": [{"role": "user", "content": PROMPT + asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in rows.items()
    ]


def scores(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of answers that are the right line, that hold the right fields, and that are JSON.

    exact     the line, character by character
    fields    JSON of the same keys and values, however it is written
    json      any JSON object
    """
    wanted = [row["messages"][-1]["content"] for row in rows]
    found = [_object(answer) for answer in answers]
    pairs = list(zip(answers, found, wanted, strict=True))
    return {
        "exact": sum(answer == right for answer, _, right in pairs) / len(pairs),
        "fields": sum(read == json.loads(right) for _, read, right in pairs) / len(pairs),
        "json": sum(read is not None for read in found) / len(pairs),
    }


def _object(text: str) -> dict[str, Any] | None:
    try:
        read = json.loads(text)
    except ValueError:
        return None
    return read if isinstance(read, dict) else None
