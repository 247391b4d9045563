"""Texts sampled under a grammar's masks match the grammar exactly, for every vocabulary and starting position."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from refusals import refused

from mistral_7b.engine.grammar.client import Grammars
from mistral_7b.errors import GrammarError
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.sampling.sampler import Row, adjust, sample_rows
from mistral_7b.text.tokenizer import SPACE, Tokenizer
from tests.engine.drawing import SPARE, SPECS, allowed, beginnings, draw, opened


@pytest.fixture(scope="module", params=["v1", "v3", "demo"])
def vocabulary(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(vocabulary: str) -> Tokenizer:
    return opened(vocabulary)[0]


@pytest.fixture(scope="module")
def grammars(vocabulary: str) -> Grammars:
    return opened(vocabulary)[1]


@pytest.fixture(scope="module")
def v3() -> tuple[Tokenizer, Grammars]:
    return opened("v3")


@pytest.mark.parametrize("name", SPECS)
def test_sampled_texts_match_the_grammar(name: str, tokenizer: Tokenizer, grammars: Grammars) -> None:
    spec, obeys = SPECS[name]
    chance = random.Random(5)
    texts = set()
    for after in beginnings(tokenizer):
        for _ in range(4):
            tokens, text = draw(grammars.start(spec, after), tokenizer, after, chance)
            assert obeys(text), (text, [tokenizer.piece(t) for t in tokens])
            assert not any(tokenizer.is_control(t) or t == tokenizer.unk_id for t in tokens)
            texts.add(text)
    assert len(texts) > 5


def test_the_first_words_space_follows_the_decoder(tokenizer: Tokenizer, grammars: Grammars) -> None:
    ids = {tokenizer.surface(t): t for t in range(tokenizer.vocab_size)}
    the, space = ids[SPACE + "the"], ids[SPACE]
    for choice, at_start, after_text in (("the", True, False), (" the", False, True)):
        spec = StructuredOutputs(choice=[choice])
        for after in beginnings(tokenizer):
            found = allowed(grammars.start(spec, after).masks()[0][0])
            first = not after or tokenizer.is_control(after[-1])
            assert (the in found) == (at_start if first else after_text)
            assert (space in found) == (first or choice == " the")
    state = grammars.start(StructuredOutputs(choice=[" the"]), [])
    state.accept(space)  # is nothing, and the next word is no first one any more
    state.accept(the)
    assert state.finished


def test_json_may_begin_with_the_models_space(tokenizer: Tokenizer, grammars: Grammars) -> None:
    spec = StructuredOutputs(json={"const": 1})
    seen = set()
    for after in beginnings(tokenizer):
        for seed in range(12):
            seen.add(draw(grammars.start(spec, after), tokenizer, after, random.Random(seed))[1])
    assert seen == {"1", " 1"}


def test_characters_may_be_split_into_byte_tokens(tokenizer: Tokenizer, grammars: Grammars) -> None:
    text = "é日😀"
    ids = {tokenizer.surface(t): t for t in range(tokenizer.vocab_size) if isinstance(tokenizer.surface(t), bytes)}
    for after in beginnings(tokenizer):
        state = grammars.start(StructuredOutputs(regex="(é|日|😀)+"), after)
        raw = text.encode()
        for i, byte in enumerate(raw):
            assert (tokenizer.eos_id in allowed(state.masks()[0][0])) == (i in (2, 5))
            state.accept(ids[bytes([byte])])
        assert not state.finished
        with refused(GrammarError, field="structured_outputs"):
            state.accept(ids[b"\xa9"])


def test_eos_is_allowed_exactly_where_the_text_may_end(v3: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = v3
    a = tokenizer.encode("a")[-1]
    only_a = next(t for t in range(tokenizer.vocab_size) if tokenizer.surface(t) == "a")
    state = grammars.start(StructuredOutputs(regex="(aa){1,2}"), [1])
    ends = []
    for token in (a, only_a, only_a, only_a):
        ends.append(tokenizer.eos_id in allowed(state.masks()[0][0]))
        assert not state.finished
        state.accept(token)
    assert ends == [False, False, True, False]
    assert state.finished
    assert allowed(state.masks()[0][0]).tolist() == [tokenizer.eos_id]
    state.accept(tokenizer.eos_id)
    assert state.finished
    empty = grammars.start(StructuredOutputs(regex=""), [1])
    assert allowed(empty.masks()[0][0]).tolist() == [tokenizer.eos_id]
    assert empty.finished


def test_masks_of_a_draft_equal_those_without_one(tokenizer: Tokenizer, grammars: Grammars) -> None:
    chance = random.Random(2)
    for spec, _ in SPECS.values():
        for after in beginnings(tokenizer):
            tokens, _ = draw(grammars.start(spec, after), tokenizer, after, chance)
            tokens.append(tokenizer.eos_id)
            state, plain = grammars.start(spec, after), grammars.start(spec, after)
            place = 0
            while place < len(tokens):
                draft = tokens[place : place + chance.randint(0, 6)]
                wrong = [tokenizer.vocab_size + 3, tokenizer.unk_id][: chance.randint(0, 2)]
                masks, count = state.masks([*draft, *wrong])
                assert (count, len(masks)) == (len(draft), count + 1)
                for token, mask in zip(draft, masks[:-1], strict=True):
                    assert np.array_equal(mask, plain.masks()[0][0])
                    plain.accept(token)
                assert np.array_equal(masks[-1], plain.masks()[0][0])
                for token in draft:
                    state.accept(token)
                assert state.finished == plain.finished
                place += len(draft)


def test_a_rejected_draft_does_not_change_the_state(v3: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = v3
    state = grammars.start(StructuredOutputs(choice=["one two"]), [1])
    one, two, three = (tokenizer.encode(word)[-1] for word in ("one", "two", "three"))
    assert state.masks([three])[1] == 0
    assert state.masks([one, three, two])[1] == 1
    assert state.masks([one, two, tokenizer.eos_id, tokenizer.eos_id])[1] == 3
    assert state.masks([one, tokenizer.eos_id])[1] == 1
    state.accept(one)
    state.accept(two)
    assert state.finished


def test_control_and_unknown_tokens_are_never_allowed(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """Not even by the complement of a text, which also contains invalid UTF-8."""
    controls = {t for t in range(tokenizer.vocab_size) if tokenizer.is_control(t)}
    for grammar in (
        "start: X\nX: ~/abc/",
        "start: <[*]> <[*]>",
        'start: "a" | <[^7-9]>',
        "start: X\nX: /(?s:.*)/",
    ):
        for after in ([], tokenizer.encode("a")):
            state = grammars.start(StructuredOutputs(grammar=grammar), after)
            mask = state.masks()[0][0]
            assert mask.shape == (-(-(tokenizer.vocab_size + SPARE) // 32),)
            assert not (controls - {tokenizer.eos_id}) & set(allowed(mask).tolist())
            assert allowed(mask).max() < tokenizer.vocab_size
            assert tokenizer.unk_id not in allowed(mask)


def test_a_grammar_may_name_control_tokens(v3: tuple[Tokenizer, Grammars]) -> None:
    _, grammars = v3
    for grammar in ('start: <TOOL_CALLS> "a" <[8-9]> </s>', 'start: <[5]> "a" <[8]> <[2]>'):
        state = grammars.start(StructuredOutputs(grammar=grammar), [4])
        assert allowed(state.masks()[0][0]).tolist() == [5]
        state.accept(5)
        assert "▁" not in grammar
        found = [t for t in allowed(state.masks()[0][0]) if t > 1028]
        assert sorted(Tokenizer.v3().piece(int(t)) for t in found) == [
            " ",
            " a",
            "a",
        ]  # still the text's first word
        state.accept(found[0])
        state.accept(8)
        assert not state.finished
        assert allowed(state.masks()[0][0]).tolist() == [2]
        state.accept(2)
        assert state.finished


def test_every_tokenization_of_a_text_is_allowed(v3: tuple[Tokenizer, Grammars]) -> None:
    """Forcing one would need the encoding of a text after other text, which SentencePiece does not define."""
    tokenizer, grammars = v3
    for options in ("", '%llguidance {"no_forcing": false}\n'):
        state = grammars.start(StructuredOutputs(grammar=f'{options}start: "the end"'), [1])
        found = {tokenizer.piece(int(t)) for t in allowed(state.masks()[0][0])}
        assert {"t", "th", "the", " the", " t", " "} <= found


def test_whitespace_in_json_is_bounded(v3: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = v3
    newline = next(t for t in range(tokenizer.vocab_size) if tokenizer.surface(t) == b"\n")
    state = grammars.start(StructuredOutputs(json_object=True), [1])
    state.accept(tokenizer.encode("{")[-1])
    n = 0
    while newline in allowed(state.masks()[0][0]) and n < 200:
        state.accept(newline)
        n += 1
    assert n == 64


def test_the_sampler_applies_masks(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """The project's own sampler, with two grammars and an unconstrained row in one batch."""
    specs = [SPECS["regex"], SPECS["choice"]]
    states = [grammars.start(spec, [tokenizer.bos_id]) for spec, _ in specs]
    decoders, texts = [tokenizer.stream([tokenizer.bos_id]) for _ in specs], ["", ""]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        logits = torch.randn(3, tokenizer.vocab_size + SPARE, generator=generator)
        logits[:, tokenizer.eos_id] = 5
        masks = [*(s.masks()[0][0] for s in states), None]
        u = torch.rand(3, generator=generator).tolist()
        rows = [Row(SamplingParams(), number, allowed=mask) for number, mask in zip(u, masks, strict=True)]
        assert torch.equal(adjust(logits, rows)[2], logits[2])
        for i, token in enumerate(sample_rows(logits, rows)[:2].tolist()):
            if not states[i].finished:
                states[i].accept(token)
                texts[i] += decoders[i].push(token)
        if all(s.finished for s in states):
            break
    for (_, obeys), text in zip(specs, texts, strict=True):
        assert obeys(text)
