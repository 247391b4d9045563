"""For random schemas, every complete text of the grammar matches the schema, and no text reaches a dead end."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistral_7b.engine.grammar import digits, rules, shapes, strings
from mistral_7b.engine.grammar import schema as schema_module
from mistral_7b.engine.grammar.matcher import DEAD_END, MatcherState
from mistral_7b.errors import GrammarError
from mistral_7b.sampling.params import StructuredOutputs
from tests.engine.drawing import allowed, in_process
from tests.engine.schemas import VALUES, Drawing, exact, faults

SCHEMAS, PIECES = 1000, 8
QUOTE, BRACKETS = {'"'}, {"}", "]"}
USEFUL = QUOTE | BRACKETS | set(",01ab.:x-ZW") | set("ö".encode().decode("latin1"))  # for patterns and formats
TIRED = 80  # tokens after which a text is to end as soon as it may
TEXTS = 2  # of each schema


class Walk:
    """Samples texts under a grammar's masks: half the tokens are USEFUL, and long texts are closed."""

    def __init__(self) -> None:
        self.tokenizer, self.grammars = in_process("demo")
        pieces = [self.tokenizer.piece_bytes(i).decode("latin1") for i in range(self.tokenizer.vocab_size)]
        self._useful, self._quote, self._brackets = (
            np.array([piece in some for piece in pieces]) for some in (USEFUL, QUOTE, BRACKETS)
        )
        self._opening = np.array([bool({*"{["} & {*piece}) or not piece.strip() for piece in pieces])

    def text(self, state: MatcherState, chance: random.Random) -> str:
        decoder, text, count = self.tokenizer.stream([1]), "", 0
        while not state.finished:
            found = allowed(state.masks()[0][0])
            tired = count > TIRED
            if self.tokenizer.eos_id in found and (tired or chance.random() < 0.5):
                break
            if tired:
                found = self._ending(found, text, chance)
            elif chance.random() < 0.5:
                found = _those(found, self._useful)
            state.accept(token := int(chance.choice(found)))
            if token == self.tokenizer.eos_id:
                break
            text += decoder.push(token)
            count += 1
            assert count < 3000, f"no end: {text[:300]}"
        return text + decoder.flush()

    def _ending(self, found: np.ndarray, text: str, chance: random.Random) -> np.ndarray:
        """The tokens that close something, or else those that open nothing."""
        if re.sub(r"\\.", "", text).count('"') % 2:  # within a string
            found = found if len(found) < 40 else _those(found, self._useful)
            return _those(found, self._quote) if chance.random() < 0.5 else found
        found = _those(found, ~self._opening)
        return _those(found, self._brackets)


def _those(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The wanted tokens among those found; all of them if there are none."""
    few = found[wanted[found]]
    return few if len(few) else found


@pytest.fixture(scope="module")
def walk() -> Walk:
    return Walk()


def refusal(walk: Walk, spec: StructuredOutputs) -> str:
    """The reason why a schema is refused, or ""."""
    try:
        walk.grammars.start(spec, [1])
    except GrammarError as e:
        return str(e)
    return ""


def check(walk: Walk, schema: Any, seed: int) -> str:
    """Test a schema: "" if it can be used, else the reason why not."""
    chance = random.Random(seed)
    spec = StructuredOutputs(json=schema)
    reason = refusal(walk, spec)
    assert DEAD_END not in reason, f"a dead end, and {schema} is not refused"
    if "no text matches the schema" in reason:
        assert all(faults(schema, [exact(value) for value in VALUES])), f"refused, though obeyed: {schema}"
    if reason:
        return reason
    texts = [walk.text(walk.grammars.start(spec, [1]), chance) for _ in range(TEXTS)]
    for text, fault in zip(
        texts, faults(schema, [json.loads(text, parse_float=Decimal) for text in texts]), strict=True
    ):
        assert not fault, f"{fault}: {text} of {json.dumps(schema)}"
    return ""


@pytest.mark.parametrize("piece", range(PIECES))
def test_texts_of_random_schemas_match_and_end(walk: Walk, piece: int) -> None:
    reasons = []
    for seed in range(piece * SCHEMAS // PIECES, (piece + 1) * SCHEMAS // PIECES):
        reasons.append(check(walk, Drawing(seed).schema(), seed))
    used = reasons.count("")
    assert used > 0.6 * len(reasons)


def off_by_one(patched: pytest.MonkeyPatch) -> None:
    original = digits.integers
    patched.setattr(digits, "integers", lambda low, high: original(low, high if high is None else high + 1))


def no_dead_ends_found(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(rules._Writer, "_is_satisfiable", lambda self, shape: True)


def one_schema_a_name(patched: pytest.MonkeyPatch) -> None:
    original = shapes.Properties.subschemas_of
    patched.setattr(
        shapes.Properties, "subschemas_of", lambda self, name, matched: original(self, name, matched)[:1]
    )


def oneof_as_anyof(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(schema_module.SchemaReader, "_check_disjoint", lambda self, place, options: None)


def lengths_left_out(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(strings, "of_length", lambda least, most: strings.STRING)


SABOTAGE = [off_by_one, no_dead_ends_found, one_schema_a_name, oneof_as_anyof, lengths_left_out]


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_random_schemas_detect_injected_faults(
    walk: Walk, sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def search() -> None:
        for seed in range(SCHEMAS):
            check(walk, Drawing(seed).schema(), seed)

    sabotage(monkeypatch)
    with pytest.raises((AssertionError, GrammarError)):
        search()


def test_random_schemas_detect_faults_of_llguidance_alone() -> None:
    """In a separate process, because some schemas crash it."""
    code = """
import json
from mistral_7b.engine.grammar import lark
from tests.engine.test_random_schemas import *
lark.rules = lambda schema, where, name, style=None: f"{name}: %json {json.dumps(schema)}"
walk = Walk()
for seed in range(100):
    check(walk, Drawing(seed).schema(), seed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parents[2])
    assert done.returncode != 0
    assert not done.stderr or re.search("AssertionError|PanicException|DEAD_END", done.stderr.decode()), (
        done.stderr
    )
