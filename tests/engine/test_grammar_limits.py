"""Invalid and expensive grammars, and the state that completions share."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from refusals import refused
from waiting import soon

from mistral_7b.engine.grammar import client, matcher
from mistral_7b.engine.grammar.client import Grammars
from mistral_7b.engine.grammar.matcher import CompiledGrammar, MatcherState
from mistral_7b.engine.grammar.spec import GrammarSpec
from mistral_7b.engine.grammar.vocabulary import Vocabulary
from mistral_7b.errors import GrammarError, SamplingError
from mistral_7b.sampling.params import StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer
from tests.engine.drawing import SPECS, allowed, draw, opened


@pytest.fixture(scope="module")
def v3() -> tuple[Tokenizer, Grammars]:
    return opened("v3")


@pytest.mark.wording
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "string", "format": "colour"}}, "Unknown format: colour"),
        ({"json": {"$ref": "#/$defs/none"}}, "none"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "nsatisfiable|no text matches"),
        ({"grammar": "start: rule"}, "rule"),
        ({"grammar": "nonsense"}, "grammar"),
        ({"grammar": "start: X\nX: /a/ & /b/"}, "no text matches"),
        ({"grammar": "root ::= other"}, "other"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no text matches"),
    ],
)
def test_invalid_grammars_are_refused(v3: tuple[Tokenizer, Grammars], spec: dict[str, Any], words: str) -> None:
    with pytest.raises(GrammarError, match=words) as e:
        v3[1].start(StructuredOutputs(**spec), [1])
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500
    assert isinstance(e.value, SamplingError)


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}
HOSTILE = {
    "multiples": {"json": {"type": "integer", "multipleOf": 999983}},
    "multiples of multiples": {"json": {"allOf": [{"multipleOf": 211}, {"multipleOf": 199}], "type": "integer"}},
    "multiples in disguise": {"grammar": 'start: %json {"type": "integer", "multiple\\u004ff": 999983}'},
    "deep": {"json": DEEP},
    "long": {"regex": "a" * 2_000_000},
    "many states": {"regex": r"(a|b)*a(a|b){40}c"},
    "repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "many rules": {"grammar": "start: x{1,10000}\nx: y{1,10000}\ny: z{1,10000}\nz: /a/"},
    "intersections": {"grammar": "start: X\nX: /.*a.{15}.*/ & /.*b.{16}.*/ & /.*c.{17}.*/ & /.*d.{18}.*/"},
    "products": {
        "json": {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(8)]} for i in range(8)]}
    },
    "many properties": {
        "json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    },
    "parentheses": {"grammar": "start: " + "(" * 100_000 + '"a"' + ")" * 100_000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_bounded(v3: tuple[Tokenizer, Grammars], name: str) -> None:
    """They are refused, or followed within the limits, and neither takes long."""
    grammars = v3[1]

    def followed() -> None:
        grammars._processes.clear()  # so that it is compiled
        with contextlib.suppress(GrammarError):
            state = grammars.start(StructuredOutputs(**HOSTILE[name]), [1])
            chance = random.Random(0)
            for _ in range(50):
                if state.finished:
                    break
                state.accept(int(chance.choice(allowed(state.masks()[0][0]))))

    # By the clock, on a busy machine: of the CPU's time it is 6 at most.
    soon(30, followed, clock=time.monotonic, attempts=3)
    if name.startswith("multiples"):
        with pytest.raises(GrammarError):
            grammars.start(StructuredOutputs(**HOSTILE[name]), [1])


def test_many_choices_and_multiples_compile(v3: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = v3
    many = [f"value {i}" for i in range(5000)]
    assert draw(grammars.start(StructuredOutputs(choice=many), [1]), tokenizer, [1], random.Random(0))[1] in many
    prices = {"type": "array", "items": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 9}}
    for multiple in (0.01, 5, 1000, 1e-6):
        grammars.start(StructuredOutputs(json={"allOf": [prices, {"items": {"multipleOf": multiple}}]}), [1])


def test_model_and_tokenizer_vocabularies_may_differ() -> None:
    tokenizer = Tokenizer.from_pretrained()
    spec = StructuredOutputs(regex=".*")
    whole = allowed(Grammars(tokenizer, tokenizer.vocab_size).start(spec, [1]).masks()[0][0])
    wide = allowed(Grammars(tokenizer, 9000).start(spec, [1]).masks()[0][0])
    narrow = Grammars(tokenizer, 1001).start(spec, [1])
    assert np.array_equal(whole, wide)
    assert np.array_equal(allowed(narrow.masks()[0][0]), whole[whole < 1001])
    with pytest.raises(GrammarError):
        narrow.accept(2000)


def test_compiled_grammars_are_cached_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_pretrained()
    grammars = Grammars(tokenizer, tokenizer.vocab_size, max_idle=2)
    begun: list[str] = []

    class Noted(client.GrammarProcess):
        def __init__(self, server: client.ForkServer, key: str) -> None:
            super().__init__(server, key)
            begun.append(key)

    monkeypatch.setattr(client, "GrammarProcess", Noted)
    for regex in "abacaab":  # b is out when it comes again
        grammars.start(StructuredOutputs(regex=regex), [1])
    assert [json.loads(json.loads(key)[0])[0]["regex"] for key in begun] == list("abcb")
    one, other = (grammars.start(StructuredOutputs(regex="bb"), [1]) for _ in range(2))
    one.accept(tokenizer.encode("b")[-1])
    assert np.array_equal(other.masks()[0][0], grammars.start(StructuredOutputs(regex="bb"), [1]).masks()[0][0])


def test_lexer_states_are_not_exhausted_by_other_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lexer states are shared and limited: a completion that runs out recompiles, with the same masks."""
    tokenizer = Tokenizer.from_pretrained()
    text = GrammarSpec(StructuredOutputs(regex="(a|b)*a(a|b){40}c")).lark(leading_space=False)
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    letters = {tokenizer.surface(t): t for t in range(tokenizer.vocab_size)}
    free = CompiledGrammar(vocabulary, text)
    monkeypatch.setattr(matcher, "MAX_LEXER_STATES", 1000)
    tight = CompiledGrammar(vocabulary, text)
    with monkeypatch.context() as patched:
        patched.setattr(matcher, "RENEWAL_INTERVAL", 10**9)  # no renewal beyond the first
        state = tight.start(at_start=True)
        with refused(GrammarError, field="structured_outputs"):
            walk([state], letters, 600)
    for _ in range(3):
        walk([tight.start(at_start=True), free.start(at_start=True)], letters, 250)
    state = tight.start(at_start=True)
    walk([state], letters, 100)
    draft = [letters[letter] for letter in random.Random(4).choices("ab", k=600)]
    masks, over = state.masks(draft)
    assert len(masks) == len(over) + 1 < 600  # the draft ends where states do, and is no error
    walk([state], letters, 10)


def walk(states: list[MatcherState], letters: dict[str | bytes | None, int], n: int) -> None:
    """Append n letters to all states, and check that their masks are equal."""
    chance = random.Random(n)
    for _ in range(n):
        masks = [state.masks()[0][0] for state in states]
        assert all(np.array_equal(mask, masks[0]) for mask in masks)
        token = letters[chance.choice("ab")]
        for state in states:
            state.accept(token)


def test_threads_may_share_grammars(v3: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = v3
    texts: list[str] = []

    def work(seed: int) -> None:
        for spec, _ in SPECS.values():
            texts.append(draw(grammars.start(spec, [1]), tokenizer, [1], random.Random(seed))[1])

    threads = [threading.Thread(target=work, args=(7,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4 * len(SPECS)
    assert len(set(texts)) <= len(SPECS)


def test_without_llguidance_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with refused(GrammarError, field="structured_outputs") as e:
        Grammars(Tokenizer.from_pretrained(), 4096)
    assert isinstance(e.value.__cause__, ImportError)
    assert e.value.hint
