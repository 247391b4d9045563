"""Vocabularies of fine-tunes, compared with transformers on random text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_counts import SOME
from hypothesis import example, given
from hypothesis import strategies as st
from refusals import refused
from tokenizer_files import (
    CHATML,
    DEMO,
    MISTRAL,
    ODD,
    SPELLINGS,
    TEXTS,
    V1,
    byte_fallback_folder,
    byte_level_folder,
    decoder_entry,
    harmless,
    pieces,
    sentencepiece_folder,
    write,
)
from tokenizers import AddedToken

from mistral_7b.errors import TokenizerError
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.text.vocabularies.fast import FastVocabulary
from mistral_7b.text.vocabularies.folder import release_of
from mistral_7b.text.vocabularies.sentencepiece import SentencePieceVocabulary

TOOLS = [AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)]
FLAGS = [
    AddedToken("<|im_end|>", special=True, normalized=False, rstrip=True),
    AddedToken("<|im_start|>", special=False, normalized=False, lstrip=True),
    AddedToken("<tool_call>", special=False, normalized=True),
    AddedToken("user", special=False, normalized=False, single_word=True),
]
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "v1, prepend": lambda f: byte_fallback_folder(f, "prepend", V1),
    "prepend": lambda f: byte_fallback_folder(f, "prepend", added=FLAGS[:2] + TOOLS),
    "first": lambda f: byte_fallback_folder(f, "first"),
    "first, flags": lambda f: byte_fallback_folder(f, "first", added=FLAGS),
    "never": lambda f: byte_fallback_folder(f, "never", added=TOOLS),
    "byte level": byte_level_folder,
    "byte level, flags": lambda f: byte_level_folder(f, FLAGS[2:] + TOOLS),
    "decoder of tokenizer_config": lambda f: byte_fallback_folder(
        f, "first", added_tokens_decoder={str(pieces(DEMO)[2]): decoder_entry("<|im_end|>", lstrip=True)}
    ),
}


@pytest.fixture(scope="module", params=FOLDERS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Our tokenizer and transformers', of one folder."""
    from transformers import AutoTokenizer

    folder = FOLDERS[request.param](tmp_path_factory.mktemp("files"))
    return Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def theirs(tokenizer: Any, text: str, **options: bool) -> list[int]:
    ids: list[int] = tokenizer(text, **options).input_ids
    return ids


@given(TEXTS)
@example("a  <|im_end|>  b  <|im_start|>  user users <tool_call> c")
@SOME
def test_ids_are_those_of_transformers(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, auto = both
    assert ours.encode_rendered(text) == theirs(auto, text, add_special_tokens=False)
    if harmless(text):
        assert ours.encode(text, bos=False) == theirs(auto, text, add_special_tokens=False)
        assert ours.encode(text) == theirs(auto, text, add_special_tokens=True)


@given(TEXTS)
@SOME
def test_trap_18_text_never_becomes_a_control_token(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, _ = both
    ids = ours.encode(text, bos=False)
    assert ours.vocabulary.markup.isdisjoint(ids)
    if not any(name in text for name in ("user", "tool_call>")):  # the flags of these take spaces, or add some
        assert ours.decode(ids) in (text, text.removeprefix(" "))  # Metaspace adds no space to one
        assert ours.decode(ids) == text or "prepend_scheme=first" in repr(ours.vocabulary._full.pre_tokenizer)


@given(TEXTS, st.data())
@SOME
def test_trap_19_streamed_text_is_the_text_of_transformers(
    both: tuple[Tokenizer, Any], text: str, data: st.DataObject
) -> None:
    ours, auto = both
    ids = ours.encode_rendered(text)
    stream = ours.stream()
    whole = "".join([stream.push(i) for i in ids]) + stream.flush()
    assert whole == ours.decode(ids)
    if "<|im_start|>" not in text:  # without the special flag transformers shows it, and so do we
        kept = [i for i in ids if not ours.is_control(i)]
        assert whole == auto.decode(kept, clean_up_tokenization_spaces=False)
    cut = data.draw(st.integers(0, len(ids)))
    stream = ours.stream(after=ids[:cut])
    rest = "".join([stream.push(i) for i in ids[cut:]]) + stream.flush()
    begins_within = cut == 0 or not ours.is_control(ids[cut - 1])  # behind a control token, it begins anew
    if begins_within and "\ufffd" not in ours.decode(ids[:cut]) + rest:
        assert ours.decode(ids[:cut]) + rest == whole


@given(st.lists(st.tuples(st.sampled_from([*CHATML, "\n", "a b", " "]), TEXTS), min_size=1, max_size=5))
@SOME
def test_trap_18_control_tokens_in_messages_stay_text(
    both: tuple[Tokenizer, Any], turns: list[tuple[str, str]]
) -> None:
    """Template text and message text alternate: control tokens come from the template's text only."""
    ours, _ = both
    text, plain, wanted = "", [], []
    names = {ours.vocabulary.names[i]: i for i in ours.vocabulary.markup}
    for template, message in turns:
        wanted += [names[template]] if template in names else []
        text += template
        plain.append((len(text), len(text) + len(message)))
        text += message
    ids = ours.encode_rendered(text, plain)
    assert [i for i in ids if i in ours.vocabulary.markup] == wanted
    harmless_plain = [span for span in plain if not any(s in text[span[0] : span[1]] for s in SPELLINGS)]
    if len(harmless_plain) == len(plain) and all(harmless(message) for _, message in turns):
        assert ids == ours.encode_rendered(text) or not harmless(text)


def test_a_control_token_spelled_across_a_border_stays_text(tmp_path: Path) -> None:
    for folder in (byte_level_folder(tmp_path / "a"), sentencepiece_folder(tmp_path / "b", V1)):
        ours = Tokenizer.from_pretrained(folder)
        text = "<|im_end|>\n<|im_" + "start|>x<|im_end|>"  # the template has all but "start|>x"
        start = text.index("start|>")
        ids = ours.encode_rendered(text, [(start, start + 8)])
        end = ours.vocabulary.find("<|im_end|>")
        assert [i for i in ids if i in ours.vocabulary.markup] == [end, end]
        assert ours.decode(ids).strip(" ") == "\n<|im_start|>x"


def test_trap_18_merges_make_no_control_token(tmp_path: Path) -> None:
    """Nor does a word that a vocabulary holds whole, with ignore_merges."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": ["a b", "ab c"]}
    added = [{"id": 3, **decoder_entry("ab")}]
    for number, more in enumerate(({}, {"ignore_merges": True})):
        folder = write(tmp_path / str(number), tokenizer={"added_tokens": added, "model": {**model, **more}})
        t = Tokenizer.from_pretrained(folder)
        assert t.encode("ab", bos=False) == [0, 1]
        assert t.encode_rendered("ab") == t.encode_rendered("ab", [(5, 6)]) == [3]
        assert t.encode_rendered("abab", [(0, 2)]) == [0, 1, 3]


@pytest.fixture(scope="module", params=["prepend", "first"])
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours of tokenizer.model and added tokens, and the tokenizer.json that transformers 4 made of such files."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("pieces")
    ours = sentencepiece_folder(root / "pieces", V1, legacy=request.param == "prepend")
    auto = byte_fallback_folder(root / "fast", request.param, V1)
    return Tokenizer.from_pretrained(ours), AutoTokenizer.from_pretrained(auto)


@given(TEXTS)
@SOME
def test_a_sentencepiece_file_with_added_tokens(beside: tuple[Tokenizer, Any], text: str) -> None:
    ours, auto = beside
    assert isinstance(ours.vocabulary, SentencePieceVocabulary)
    if ours.vocabulary.legacy or not text.startswith(" "):  # Metaspace adds no space to one
        assert ours.encode_rendered(text) == theirs(auto, text, add_special_tokens=False)
    ids = ours.encode(text, bos=False)
    assert ours.vocabulary.markup.isdisjoint(ids)
    assert ours.decode(ids) == text
    assert ours.encode(text) == [1, *ids]


def test_flags_of_tokens_added_to_a_sentencepiece_file(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, V1)
    write(folder, tokenizer_config={"added_tokens_decoder": {
        "32000": decoder_entry("<|im_end|>", rstrip=True),
        "32001": decoder_entry("<|im_start|>", False, lstrip=True),
        "32003": decoder_entry("<tool_call>", False), "32004": decoder_entry("user", False, single_word=True),
        "32005": decoder_entry("<tool_call>s", False),
    }})  # fmt: skip
    t = Tokenizer.from_pretrained(folder)
    assert t.vocab_size == 32006
    assert t.encode_rendered("a \n<|im_start|>b<|im_end|>  c") == [
        *t.encode("a", bos=False), 32001, *t.encode("b", bos=False), 32000, *t.encode("c", bos=False),
    ]  # fmt: skip
    assert t.encode("user users", bos=False) == [32004, *Tokenizer.v1().encode(" users", bos=False)]
    assert t.encode("<tool_call>", bos=False) == [32003]
    assert t.encode("<tool_call>s", bos=False) == [32005]
    assert 32001 not in t.encode("<|im_start|>")  # no special token, but a mark of turns
    assert (t.surface(32000), t.surface(32001), t.surface(32002)) == (None, "<|im_start|>", None)
    assert (t.piece(32000), t.piece(32002), t.piece(32003)) == ("<|im_end|>", "<unused_32002>", "<tool_call>")
    assert t.decode([32003, 32000, 32002, 32004]) == "<tool_call>user"


def test_added_tokens_json_is_read_without_a_decoder(tmp_path: Path) -> None:
    folder = write(
        tmp_path, added_tokens={"<|im_end|>": 32000, "<extra>": 32001},
        special_tokens_map={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"},
    )  # fmt: skip
    shutil.copy(V1, folder / "tokenizer.model")
    t = Tokenizer.from_pretrained(folder)
    assert (t.vocab_size, t.surface(32000), t.surface(32001)) == (32002, None, "<extra>")
    assert 32001 in t.encode("a<extra>")


def test_a_release_of_mistral_is_read_by_mistral_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer.json gives the same ids; with other tokens or another template it is preferred."""
    v1 = tuple(Tokenizer.from_file(V1).vocabulary.names)
    assert (release_of(v1), release_of(v1[:-1])) == ("v1", None)
    demo = Tokenizer.from_file(DEMO)
    controls = [demo.piece(i) for i in sorted(demo.vocabulary.markup) if i > 2]
    added = [AddedToken(name, special=True, normalized=False) for name in controls]
    byte_fallback_folder(tmp_path, "prepend", DEMO, added)
    fast = Tokenizer.from_pretrained(tmp_path)
    shutil.copy(DEMO, tmp_path / "tokenizer.model")
    assert isinstance(Tokenizer.from_pretrained(tmp_path).vocabulary, FastVocabulary)  # not one of Mistral's
    monkeypatch.setattr("mistral_7b.text.vocabularies.folder.release_of", lambda pieces: "v3")
    both = Tokenizer.from_pretrained(tmp_path)
    assert (both.version, isinstance(fast.vocabulary, FastVocabulary)) == ("v3", True)
    for text in ("Hello  world", *ODD):
        assert both.encode(text) == demo.encode(text) == fast.encode(text)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for changed in (
        {"chat_template": "{% for m in messages %}<|{{ m.role }}|>{% endfor %}"},
        {"added_tokens_decoder": {str(demo.vocab_size): decoder_entry("<|im_end|>")}},
    ):
        write(tmp_path, tokenizer_config=config | changed)
        assert isinstance(Tokenizer.from_pretrained(tmp_path).vocabulary, FastVocabulary)


def test_bos_is_added_where_the_model_has_it(tmp_path: Path) -> None:
    assert Tokenizer.from_pretrained(byte_fallback_folder(tmp_path / "a")).encode("a")[0] == 1
    smol = Tokenizer.from_pretrained(byte_level_folder(tmp_path / "b"))
    assert smol.encode("a") == smol.encode("a", bos=False)
    assert smol.start_id == smol.eos_id == 2
    assert smol.encode("a", eos=True)[-1] == 2
    nameless = write(byte_level_folder(tmp_path / "c"), tokenizer_config={})
    t = Tokenizer.from_pretrained(nameless)
    assert (t.bos_id, t.eos_id, t.unk_id, t.stop_ids) == (None, None, None, frozenset())
    for bad in (lambda: t.encode("a", eos=True), lambda: t.start_id):
        with refused(TokenizerError, place=nameless / "tokenizer.json"):
            bad()
    added = sentencepiece_folder(tmp_path / "d", add_bos_token=False)
    assert 1 not in Tokenizer.from_pretrained(added).encode("a")


def test_pieces_of_byte_level_tokens(tmp_path: Path) -> None:
    t = Tokenizer.from_pretrained(byte_level_folder(tmp_path))
    ids = t.encode(" naïve 日本語🙂", bos=False)
    assert b"".join(map(t.piece_bytes, ids)).decode() == " naïve 日本語🙂"
    first = t.encode("\u3042", bos=False)[0]  # a character that the training did not see
    assert t.piece(first).startswith("<0xE3>")
    assert t.piece(t.encode(" n", bos=False)[0])[0] == " "


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    for folder in (byte_level_folder(tmp_path / "a"), sentencepiece_folder(tmp_path / "b")):
        t = Tokenizer.from_pretrained(folder)
        for encode in (t.encode, t.encode_rendered, lambda text, t=t: t.encode_rendered(text, [(0, 1)])):
            with refused(TokenizerError, field="text"):
                encode("a\ud800")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", [POINTER, b"", b'{"model"', b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    make = sentencepiece_folder if name == "tokenizer.model" else byte_fallback_folder
    folder = make(tmp_path / "model")
    (folder / name).write_bytes(content)
    with refused(TokenizerError, place=folder / name):
        Tokenizer.from_pretrained(folder)


@pytest.mark.wording
def test_a_pointer_is_told_as_one(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(TokenizerError, match="Git LFS pointer"):
            Tokenizer.from_pretrained(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "model",
    [
        {"type": "Unigram", "vocab": [["a", 0.0]]}, {"type": "WordPiece", "vocab": {"a": 0}},
        {"type": "WordLevel", "vocab": {"a": 0}}, {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
        {"type": "BPE", "vocab": {"a": "x"}, "merges": []}, {"type": "BPE", "vocab": ["a"], "merges": []},
    ],
)  # fmt: skip
def test_other_and_inconsistent_models_are_refused(tmp_path: Path, model: dict[str, Any]) -> None:
    write(tmp_path, tokenizer={"version": "1.0", "added_tokens": [], "model": model}, config=MISTRAL)
    with refused(TokenizerError, place=tmp_path / "tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [{"x": {}}, {"1": 3}, {"-1": {"content": "a"}}, {"40000": {"content": ""}}, [1], {"1" * 20: {"content": "a"}}],
)
def test_bad_added_tokens_are_refused(tmp_path: Path, decoder: Any) -> None:
    folder = sentencepiece_folder(tmp_path, added_tokens_decoder=decoder)
    with refused(TokenizerError, place=folder / "tokenizer_config.json"):
        Tokenizer.from_pretrained(folder)


def test_named_ends_precede_those_of_a_sentencepiece_file(tmp_path: Path) -> None:
    """As OpenHermes has them: </s> is no longer the end, and <|im_end|> is written after an answer."""
    ours = Tokenizer.from_pretrained(sentencepiece_folder(tmp_path / "a", V1))
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (1, 32000, frozenset({32000}))
    assert ours.encode("a", eos=True)[-1] == 32000
    for name in ("nowhere", "the"):  # no token, and one that text becomes
        folder = sentencepiece_folder(tmp_path / name, V1, bos_token=name, eos_token=name)
        assert (Tokenizer.from_pretrained(folder).bos_id, Tokenizer.from_pretrained(folder).eos_id) == (1, 2)


SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
FRAME = {"type": "TemplateProcessing", "single": [SEQUENCE], "pair": [SEQUENCE], "special_tokens": {}}
LOST = {"SpecialToken": {"id": "<lost>", "type_id": 0}}


def test_a_post_processor_of_lost_tokens_is_refused(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    file = folder / "tokenizer.json"
    frame = FRAME | {"single": [LOST, SEQUENCE]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": frame}))
    with refused(TokenizerError, place=file):  # where the tokenizers package panics
        Tokenizer.from_pretrained(folder)


def test_an_id_that_would_need_a_list_of_many_gigabytes_is_refused(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 4_000_000_000}, "merges": []}
    write(tmp_path, tokenizer={"version": "1.0", "added_tokens": [], "model": model}, config=MISTRAL)
    with refused(TokenizerError, place=tmp_path / "tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_special_tokens_that_are_no_list_are_refused(tmp_path: Path) -> None:
    folder = write(byte_level_folder(tmp_path), special_tokens_map={"additional_special_tokens": 3})
    with refused(TokenizerError, field="additional_special_tokens", place=folder):
        Tokenizer.from_pretrained(folder)
