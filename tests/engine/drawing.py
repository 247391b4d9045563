"""Texts drawn under a grammar's masks, for the tests of grammars."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from mistral_7b.engine.grammar.client import Grammars, GrammarState
from mistral_7b.engine.grammar.matcher import CompiledGrammar, MatcherState
from mistral_7b.engine.grammar.spec import GrammarSpec
from mistral_7b.engine.grammar.vocabulary import Vocabulary
from mistral_7b.sampling.params import StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer

SPARE = 70  # ids that the model has and the tokenizer has not
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "größe": {"type": "number", "minimum": 0.5, "maximum": 2.5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["a", "b ü", 3, None, "日本", '"\\']},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 1, "maxItems": 3},
        "home": {"$ref": "#/$defs/home"},
    },
    "required": ["name", "age", "kind", "home"],
    "additionalProperties": False,
    "$defs": {
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "own": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
REGEX = r" ?[a-c]{2}-\d+( é|日本|😀 ?)*"
CHOICES = (" a", "a", "  ab", "日本", '\u2028"\\\n\t\x7f/é<TOOL_CALLS>', "", "yes", "Yes please")
LARK = 'start: sum\nsum: NUMBER | sum "+" NUMBER | "(" sum ")"\nNUMBER: /[0-9]{1,3}/'
GBNF = 'root ::= "a" item{1,4}\nitem ::= [xyz] " "?'


def sums(text: str) -> bool:
    """Whether a text obeys LARK."""
    while (less := re.sub(r"(?<!\d)\(\d{1,3}(\+\d{1,3})*\)", "1", text)) != text:
        text = less
    return re.fullmatch(r"\d{1,3}(\+\d{1,3})*", text) is not None


def person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


SPECS: dict[str, tuple[StructuredOutputs, Callable[[str], Any]]] = {
    "json": (StructuredOutputs(json=PERSON), person),
    "json_object": (StructuredOutputs(json_object=True), lambda text: isinstance(json.loads(text), dict)),
    "regex": (StructuredOutputs(regex=REGEX), lambda text: re.fullmatch(REGEX, text)),
    "choice": (StructuredOutputs(choice=CHOICES), lambda text: text in CHOICES),
    "lark": (StructuredOutputs(grammar=LARK), sums),
    "gbnf": (StructuredOutputs(grammar=GBNF), lambda text: re.fullmatch("a([xyz] ?){1,4}", text)),
}


class InProcess:
    """Grammars compiled and followed in the tests' own process, where they can be tampered with."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_size)

    def start(self, spec: StructuredOutputs, after: list[int]) -> MatcherState:
        """As Grammars.start."""
        at_start = not after or not self._vocabulary.has_text(after[-1])
        text = GrammarSpec(spec).lark(leading_space=not at_start)
        return CompiledGrammar(self._vocabulary, text).start(at_start)


@functools.cache
def in_process(name: str) -> tuple[Tokenizer, InProcess]:
    """As `opened`."""
    tokenizer = opened(name)[0]
    return tokenizer, InProcess(tokenizer, tokenizer.vocab_size + SPARE)


@functools.cache
def opened(name: str) -> tuple[Tokenizer, Grammars]:
    """A tokenizer by its version, or the bundled one, and its grammars."""
    tokenizer = {"v1": Tokenizer.v1, "v3": Tokenizer.v3, "demo": Tokenizer.from_pretrained}[name]()
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size + SPARE)


def beginnings(tokenizer: Tokenizer) -> Iterator[list[int]]:
    """What a completion may follow upon: nothing, BOS, text, a chat (which ends in a control token in v3)."""
    yield from ([], [tokenizer.bos_id], tokenizer.encode("It says:"), tokenizer.encode("a  "))
    yield tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def admits(spec: StructuredOutputs, text: str) -> bool:
    """Whether a text can be written under a specification, and end there."""
    tokenizer, grammars = in_process("demo")
    ids = {tokenizer.surface(t): t for t in range(tokenizer.vocab_size)}
    state = grammars.start(spec, [1])
    for byte in text.encode():
        if state.finished or not state.allows(ids[bytes([byte])]):
            return False
        state.accept(ids[bytes([byte])])
    return state.finished or state.allows(tokenizer.eos_id)


def allowed(mask: np.ndarray) -> np.ndarray:
    assert mask.dtype == np.int32
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def draw(
    state: GrammarState, tokenizer: Tokenizer, after: list[int], chance: random.Random, ending: float = 0.3
) -> tuple[list[int], str]:
    """Tokens drawn among those allowed, now and then of those that close JSON, and EOS with the chance `ending`;
    and their text."""
    decoder, tokens, text = tokenizer.stream(after), list[int](), ""
    closing = tokenizer.encode('"}] ]}', bos=False)
    while len(tokens) < 1500:
        found = allowed(state.masks()[0][0])
        closers = np.intersect1d(found, closing) if chance.random() < 0.2 else found
        token = int(chance.choice(closers if len(closers) else found))
        if tokenizer.eos_id in found and (chance.random() < ending or state.finished):
            token = tokenizer.eos_id
        if state.finished:
            assert found.tolist() == [tokenizer.eos_id]
        state.accept(token)
        if token == tokenizer.eos_id:
            assert state.finished
            return tokens, text + decoder.flush()
        tokens.append(token)
        text += decoder.push(token)
    pytest.fail(f"no end after {len(tokens)} tokens: {text!r:.200}")
