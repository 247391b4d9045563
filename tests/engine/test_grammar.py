"""Whatever is drawn under a grammar's masks, the text that comes out obeys the grammar: to the character, for
every vocabulary, and wherever the completion begins."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from mistral_7b.engine.grammar import Grammars, GrammarState, tool_spec
from mistral_7b.errors import GrammarError, SamplingError
from mistral_7b.sampling import SamplingParams, allow, sample
from mistral_7b.sampling_params import StructuredOutputs
from mistral_7b.tokenizer import SPACE, Tokenizer
from mistral_7b.tool_calls import ToolCallStream

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
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Zürich"]}, "days": {"$ref": "#/$defs/n"}},
        "required": ["city"], "additionalProperties": False, "$defs": {"n": {"type": "integer", "maximum": 9}}}}},
    {"type": "function", "function": {"name": "say_hi", "parameters": {
        "properties": {"to": {"type": "string", "maxLength": 6}}, "required": ["to"],
        "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip


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


@pytest.fixture(scope="module", params=["v1", "v3", "demo"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return {"v1": Tokenizer.v1, "v3": Tokenizer.v3, "demo": Tokenizer.from_pretrained}[request.param]()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + SPARE)


@pytest.fixture(scope="module")
def v3() -> tuple[Tokenizer, Grammars]:
    return Tokenizer.v3(), Grammars(Tokenizer.v3(), 32768)


def beginnings(tokenizer: Tokenizer) -> Iterator[list[int]]:
    """What a completion may follow upon: nothing, BOS, text, a chat (which ends in a control token in v3)."""
    yield from ([], [tokenizer.bos_id], tokenizer.encode("It says:"), tokenizer.encode("a  "))
    yield tokenizer.encode_chat([{"role": "user", "content": "hi"}])


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


@pytest.mark.parametrize("name", SPECS)
def test_what_is_drawn_obeys(name: str, tokenizer: Tokenizer, grammars: Grammars) -> None:
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


def test_a_first_word_loses_its_space_only_where_the_text_does(tokenizer: Tokenizer, grammars: Grammars) -> None:
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


def test_json_may_begin_with_the_space_that_the_model_writes(tokenizer: Tokenizer, grammars: Grammars) -> None:
    spec = StructuredOutputs(json={"const": 1})
    seen = set()
    for after in beginnings(tokenizer):
        for seed in range(12):
            seen.add(draw(grammars.start(spec, after), tokenizer, after, random.Random(seed))[1])
    assert seen == {"1", " 1"}


def test_characters_may_come_byte_by_byte(tokenizer: Tokenizer, grammars: Grammars) -> None:
    text = "é日😀"
    ids = {tokenizer.surface(t): t for t in range(tokenizer.vocab_size) if isinstance(tokenizer.surface(t), bytes)}
    for after in beginnings(tokenizer):
        state = grammars.start(StructuredOutputs(regex="(é|日|😀)+"), after)
        raw = text.encode()
        for i, byte in enumerate(raw):
            assert (tokenizer.eos_id in allowed(state.masks()[0][0])) == (i in (2, 5))
            state.accept(ids[bytes([byte])])
        assert not state.finished
        with pytest.raises(GrammarError, match="not what the grammar allows"):
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


def test_masks_of_a_draft_are_those_that_come_without_one(tokenizer: Tokenizer, grammars: Grammars) -> None:
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


def test_a_refused_draft_leaves_the_state_as_it_was(v3: tuple[Tokenizer, Grammars]) -> None:
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


def test_control_tokens_and_what_is_no_token_are_never_allowed(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """Not even by a grammar of anything but a text, whose complement holds no UTF-8 either."""
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


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "say_hi"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_tool_calls_are_forced_as_asked_for(
    v3: tuple[Tokenizer, Grammars], choice: str | dict, parallel: bool
) -> None:
    tokenizer, grammars = v3
    spec = tool_spec(TOOLS, choice, parallel)
    assert spec is not None
    control = tokenizer.encode_chat([{"role": "user", "content": "a"}], TOOLS)
    schemas = {t["function"]["name"]: t["function"].get("parameters", {"maxProperties": 0}) for t in TOOLS}
    counts, names, chance = set(), set(), random.Random(1)
    for after in ([4], tokenizer.encode("Well,"), control):
        for _ in range(12):
            tokens, _ = draw(grammars.start(spec, after), tokenizer, after, chance, ending=1)
            assert tokens[0] == 5
            stream, decoder = ToolCallStream(5, str), tokenizer.stream(after)
            content = [stream.push(t, decoder.push(t))[0] for t in tokens]
            assert "".join(content) + stream.close() == ""
            for call in stream.calls:
                arguments = json.loads(call.arguments)
                jsonschema.validate(arguments, schemas[call.name])
                assert call.arguments == json.dumps(arguments, ensure_ascii=False)
            counts.add(len(stream.calls))
            names.update(call.name for call in stream.calls)
    assert (max(counts) > 1) == (parallel and choice == "required")
    assert names == (set(schemas) if choice == "required" else {"say_hi"})


def test_what_tool_choice_cannot_be() -> None:
    assert tool_spec(TOOLS, "auto") is None
    assert tool_spec(TOOLS, "none") is None
    with pytest.raises(GrammarError, match="'fly', which is none of the tools"):
        tool_spec(TOOLS, {"type": "function", "function": {"name": "fly"}})
    with pytest.raises(GrammarError, match="there are no tools"):
        tool_spec([], "required")
    with pytest.raises(GrammarError, match="must be auto, none, required"):
        tool_spec(TOOLS, "sometimes")
    with pytest.raises(GrammarError, match=r"tools\[0\] has no function with a name"):
        tool_spec([{"type": "function"}], "any")
    v1 = Tokenizer.v1()
    with pytest.raises(GrammarError, match="TOOL_CALLS"):
        Grammars(v1, 32000).start(tool_spec(TOOLS, "required"), [1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "string", "format": "colour"}}, "Unknown format: colour"),
        ({"json": {"$ref": "#/$defs/none"}}, "none"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "nsatisfiable|no text obeys"),
        ({"grammar": "start: rule"}, "rule"),
        ({"grammar": "nonsense"}, "grammar"),
        ({"grammar": "start: X\nX: /a/ & /b/"}, "no text obeys"),
        ({"grammar": "root ::= other"}, "other"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no text obeys"),
    ],
)
def test_what_is_no_grammar_is_refused_at_once(
    v3: tuple[Tokenizer, Grammars], spec: dict[str, Any], words: str
) -> None:
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
    """They are refused, or followed as far as limits allow; and neither takes long."""
    grammars = v3[1]
    began = time.process_time()
    with contextlib.suppress(GrammarError):
        state = grammars.start(StructuredOutputs(**HOSTILE[name]), [1])
        chance = random.Random(0)
        for _ in range(50):
            if state.finished:
                break
            state.accept(int(chance.choice(allowed(state.masks()[0][0]))))
    assert time.process_time() - began < 3
    if name.startswith("multiples"):
        with pytest.raises(GrammarError, match="takes too long"):
            grammars.start(StructuredOutputs(**HOSTILE[name]), [1])


def test_many_choices_and_common_multiples_are_no_burden(v3: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = v3
    many = [f"value {i}" for i in range(5000)]
    assert draw(grammars.start(StructuredOutputs(choice=many), [1]), tokenizer, [1], random.Random(0))[1] in many
    prices = {"type": "array", "items": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 9}}
    for multiple in (0.01, 5, 1000, 1e-6):
        grammars.start(StructuredOutputs(json={"allOf": [prices, {"items": {"multipleOf": multiple}}]}), [1])


def test_no_grammar_can_ask_for_one_encoding_alone(v3: tuple[Tokenizer, Grammars]) -> None:
    """llguidance would then need the encoding of a text that follows upon others, which SentencePiece has not."""
    tokenizer, grammars = v3
    for options in ("", '%llguidance {"no_forcing": false}\n'):
        state = grammars.start(StructuredOutputs(grammar=f'{options}start: "the end"'), [1])
        found = {tokenizer.piece(int(t)) for t in allowed(state.masks()[0][0])}
        assert {"t", "th", "the", " the", " t", " "} <= found


def test_whitespace_in_json_comes_to_an_end(v3: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = v3
    newline = next(t for t in range(tokenizer.vocab_size) if tokenizer.surface(t) == b"\n")
    state = grammars.start(StructuredOutputs(json_object=True), [1])
    state.accept(tokenizer.encode("{")[-1])
    n = 0
    while newline in allowed(state.masks()[0][0]) and n < 200:
        state.accept(newline)
        n += 1
    assert n == 64


def test_a_model_may_have_more_tokens_than_its_tokenizer_or_fewer() -> None:
    tokenizer = Tokenizer.from_pretrained()
    spec = StructuredOutputs(regex=".*")
    whole = allowed(Grammars(tokenizer, tokenizer.vocab_size).start(spec, [1]).masks()[0][0])
    wide = allowed(Grammars(tokenizer, 9000).start(spec, [1]).masks()[0][0])
    narrow = Grammars(tokenizer, 1001).start(spec, [1])
    assert np.array_equal(whole, wide)
    assert np.array_equal(allowed(narrow.masks()[0][0]), whole[whole < 1001])
    with pytest.raises(GrammarError):
        narrow.accept(2000)


def test_compiled_grammars_are_kept_and_the_oldest_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_pretrained()
    grammars = Grammars(tokenizer, tokenizer.vocab_size, kept=2)
    compiled = []
    original = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda text: compiled.append(text) or original(text))
    for regex in "abacaab":  # b is out when it comes again
        grammars.start(StructuredOutputs(regex=regex), [1])
    assert [re.search("/(.)/", text)[1] for text in compiled] == list("abcb")  # type: ignore[index]
    one, other = (grammars.start(StructuredOutputs(regex="bb"), [1]) for _ in range(2))
    one.accept(tokenizer.encode("b")[-1])
    assert np.array_equal(other.masks()[0][0], grammars.start(StructuredOutputs(regex="bb"), [1]).masks()[0][0])


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


def test_sampling_under_masks(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """Through the project's own sampler, two grammars and a free row side by side."""
    specs = [SPECS["regex"], SPECS["choice"]]
    states = [grammars.start(spec, [tokenizer.bos_id]) for spec, _ in specs]
    decoders, texts = [tokenizer.stream([tokenizer.bos_id]) for _ in specs], ["", ""]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        logits = torch.randn(3, tokenizer.vocab_size + SPARE, generator=generator)
        logits[:, tokenizer.eos_id] = 5
        masks = [*(s.masks()[0][0] for s in states), None]
        masked = allow(logits, masks)
        assert torch.equal(masked[2], logits[2])
        u = torch.rand(3, generator=generator).tolist()
        for i, token in enumerate(sample(masked, SamplingParams(), u)[:2].tolist()):
            if not states[i].finished:
                states[i].accept(token)
                texts[i] += decoders[i].push(token)
        if all(s.finished for s in states):
            break
    for (_, obeys), text in zip(specs, texts, strict=True):
        assert obeys(text)


def test_without_llguidance_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"pip install 'mistral-7b\[serve\]'"):
        Grammars(Tokenizer.from_pretrained(), 4096)
