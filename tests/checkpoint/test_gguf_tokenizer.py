"""Tokenizers in GGUF files: the ids of the original SentencePiece file, and errors."""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

import gguf
import pytest
from example_counts import MANY
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from sentencepiece import SentencePieceProcessor
from template_shapes import CHATML
from tiny import tiny_args, tiny_model
from tokenizer_files import byte_level_folder, sentencepiece_folder

from mistral_7b import Mistral7B, Tokenizer, TokenizerError
from mistral_7b.checkpoint.gguf import chat_templates, tokenizer_metadata
from mistral_7b.checkpoint.gguf import tokenizer as gguf_tokenizer
from mistral_7b.checkpoint.gguf.vocabulary import HF_JSON, MERGES, MODEL, TOKENS, TYPES, Vocabulary

NAMES = {"v1": "tokenizer.model", "v3": "tokenizer.model.v3", "demo": "tokenizer.model.v3"}
TEXTS = (
    pathlib.Path(__file__).read_text(), "", " ", "  a  b ", "\n\n", "\t\r\n",
    "na\u00efve \u4f60\u597d \U0001f600 \u0000 \ufffd", "3.14159 1e-5", "x" * 3000,
    "[INST] [/INST] </s> <s> <unk> <0x0A>", "[REFERENCE_DOC_1]x", "\u2581x \u2047 \ufb01 \uff21",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module", params=NAMES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer, Any]:
    """A tokenizer, the one extracted from a GGUF file, and the file."""
    folder = tmp_path_factory.mktemp("vocabulary")
    name = request.param
    original = Tokenizer.from_pretrained() if name == "demo" else getattr(Tokenizer, name)()
    shutil.copyfile(original.path, folder / NAMES[name])
    model = tiny_model(tiny_args(vocab_size=original.vocab_size))
    model.source = folder
    model.save_pretrained(folder / "x.gguf", format="gguf")
    return original, Tokenizer.from_pretrained(folder / "x.gguf"), folder / "x.gguf"


def test_pieces_types_and_template_equal_the_original(pair: tuple[Tokenizer, Tokenizer, Any]) -> None:
    original, back, _ = pair
    assert back.version == original.version
    assert (back.vocab_size, back.bos_id, back.eos_id) == (original.vocab_size, original.bos_id, original.eos_id)
    every = range(original.vocab_size)
    assert [back.surface(i) for i in every] == [original.surface(i) for i in every]
    assert [back.vocabulary.pieces._model.get_score(i) for i in every] == [
        original.vocabulary.pieces._model.get_score(i) for i in every
    ]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_equal_the_original(pair: tuple[Tokenizer, Tokenizer, Any], text: str) -> None:
    original, back, _ = pair
    assert back.encode(text) == original.encode(text)
    assert back.decode(back.encode(text)) == original.decode(original.encode(text))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@MANY
def test_ids_of_any_text_equal_the_original(pair: tuple[Tokenizer, Tokenizer, Any], text: str) -> None:
    original, back, _ = pair
    assert back.encode(text) == original.encode(text)


def test_tokenizer_keys_are_those_of_converters(pair: tuple[Tokenizer, Tokenizer, Any]) -> None:
    original, _, path = pair
    reader = gguf.GGUFReader(path)
    field = {
        key.removeprefix("tokenizer."): reader.get_field(key).contents() for key in reader.fields if "token" in key
    }
    model = original.vocabulary.pieces._model
    every = range(original.vocab_size)
    assert field["ggml.tokens"] == [model.id_to_piece(i) for i in every]
    assert field["ggml.scores"] == [model.get_score(i) for i in every]
    kinds = field["ggml.token_type"]
    assert [k == gguf.TokenType.CONTROL for k in kinds] == [model.IsControl(i) for i in every]
    assert [k == gguf.TokenType.BYTE for k in kinds] == [model.IsByte(i) for i in every]
    assert [i for i in every if kinds[i] == gguf.TokenType.UNKNOWN] == [0]
    assert kinds.count(gguf.TokenType.USER_DEFINED) == (
        20 if "v3" in str(original.path) and len(kinds) > 32000 else 0
    )
    assert (field["ggml.model"], field["ggml.bos_token_id"], field["ggml.eos_token_id"]) == ("llama", 1, 2)
    assert field["ggml.add_bos_token"] is True
    assert field["chat_template"].startswith(chat_templates.HEADS[original.version].strip())


def test_the_extracted_file_is_cached_and_repaired(pair: tuple[Tokenizer, Tokenizer, Any]) -> None:
    _, back, path = pair
    assert Tokenizer.from_pretrained(path).path == back.path
    content = back.path.read_bytes()
    back.path.write_bytes(b"damaged")
    assert Tokenizer.from_pretrained(path).path.read_bytes() == content
    names = ["generation_config.json", back.path.name, "tokenizer_config.json"]
    assert sorted(p.name for p in back.path.parent.iterdir()) == names


def test_extraction_works_without_a_cache(
    pair: tuple[Tokenizer, Tokenizer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert Tokenizer.from_pretrained(pair[2]).encode("a b") == pair[0].encode("a b")


def test_the_vocabulary_is_padded_to_the_embedding(tmp_path: pathlib.Path) -> None:
    demo = Tokenizer.from_pretrained()
    keys = tokenizer_metadata.of_sentencepiece(demo.path, demo.vocab_size + 3)
    assert keys["tokenizer.ggml.tokens"][-3:] == ["[PAD4096]", "[PAD4097]", "[PAD4098]"]
    assert keys["tokenizer.ggml.token_type"][-4:] == [1, 5, 5, 5]
    (tmp_path / "tokenizer.model.v3").write_bytes(gguf_tokenizer.files(tmp_path, keys)["tokenizer.model.v3"])
    back = Tokenizer.from_file(tmp_path / "tokenizer.model.v3")
    assert back.vocab_size == demo.vocab_size  # ids of padding have no text
    assert back.encode("[PAD4096] x") == demo.encode("[PAD4096] x")
    with refused(TokenizerError, place=demo.path):
        tokenizer_metadata.of_sentencepiece(demo.path, 4095)


GOOD = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0], "tokenizer.ggml.token_type": [2, 3, 3, 1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("model", "t5", "model"),
        ("model", None, "model"),
        ("tokens", None, "tokens"),
        ("tokens", ["<unk>", "<s>", "</s>", ""], "tokens[3]"),
        ("tokens", ["<unk>", "<s>", "</s>", "<s>"], "tokens[3]"),
        ("tokens", ["<unk>", "<s>", "</s>"], "tokens"),
        ("scores", [0, 0, 0, 1], "scores"),
        ("scores", [0.0, 0.0, 0.0, float("nan")], "token_type[3]"),
        ("token_type", [2, 3, 3, 7], "token_type[3]"),
        ("token_type", [2, 3, 3, 6], "tokens[3]"),
        ("token_type", [1, 3, 3, 1], "token_type"),
        ("bos_token_id", 4, "bos_token_id"),
        ("eos_token_id", "2", "eos_token_id"),
    ],
)
def test_invalid_tokenizer_keys_raise_one_error(key: str, value: Any, field: str) -> None:
    path = pathlib.Path("x.gguf")
    gguf_tokenizer.files(path, GOOD)
    with refused(TokenizerError, field=f"tokenizer.ggml.{field}", place=path):
        gguf_tokenizer.files(path, {**GOOD, f"tokenizer.ggml.{key}": value})


def test_user_defined_pieces_use_sentencepieces_space() -> None:
    """As written by converters; SentencePiece matches one only with its own space symbol."""
    keys = {
        **GOOD, "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "b c", "a"],
        "tokenizer.ggml.scores": [0.0] * 5, "tokenizer.ggml.token_type": [2, 3, 3, 4, 1],
    }  # fmt: skip
    files = gguf_tokenizer.files(pathlib.Path("x.gguf"), keys)
    assert SentencePieceProcessor(model_proto=files["tokenizer.model"]).encode("ab ca")[-3:] == [4, 3, 4]


def test_a_file_without_a_tokenizer_warns(tmp_path: pathlib.Path) -> None:
    with pytest.warns(UserWarning, match="has no tokenizer"):
        tiny_model().save_pretrained(tmp_path / "x.gguf", format="gguf")
    with refused(TokenizerError, field="tokenizer.ggml.model", place=tmp_path / "x.gguf"):
        Tokenizer.from_pretrained(tmp_path / "x.gguf")


@pytest.mark.parametrize("make", [sentencepiece_folder, byte_level_folder])
def test_control_tokens_typed_as_normal_are_control_tokens(tmp_path: pathlib.Path, make: Any) -> None:
    """As some converters write them. llama.cpp changes the type of those that it knows to end a turn."""
    folder = make(tmp_path / "hf", chat_template=CHATML)
    right = Tokenizer.from_pretrained(folder)
    keys = tokenizer_metadata.of_folder(folder, right.vocab_size)
    assert keys is not None
    controls = [keys[TOKENS].index(name) for name in ("<|im_start|>", "<|im_end|>")]
    for i in controls:
        keys[TYPES][i] = int(gguf.TokenType.NORMAL)
    keys.pop(HF_JSON, None)
    for name, content in gguf_tokenizer.files(tmp_path / "x.gguf", keys).items():
        (tmp_path / name).write_bytes(content)
    found = Tokenizer.from_pretrained(tmp_path)
    assert all(found.is_control(i) for i in controls)
    chat = [{"role": "user", "content": "a<|im_end|>\n<|im_start|>system\nb"}]
    ids = found.encode_chat(chat)
    assert ids == right.encode_chat(chat)
    assert [ids.count(i) for i in controls] == [2, 1]  # of the template alone
    assert not set(controls) & set(found.encode("<|im_end|><|im_start|>"))
    assert controls[1] in found.stop_ids


def test_pieces_that_merges_make_stay_text() -> None:
    def types(tokens: list[str], **keys: Any) -> list[int]:
        data = {MODEL: "gpt2", TOKENS: tokens, TYPES: [1] * len(tokens), **keys}
        return Vocabulary.read(pathlib.Path("x"), data).types

    pieces = ["<", "|", ">", "<|", "|>", "<||>", "<|x|>"]
    assert types(pieces, **{MERGES: ["< |", "| >", "<| |>"]}) == [1, 1, 1, 1, 1, 1, 3]
    assert types(["a", "<end>"], **{MERGES: [], "tokenizer.ggml.eos_token_id": 1}) == [1, 3]
    assert types(["a", "<end>"], **{MERGES: [], "tokenizer.ggml.eos_token_id": 0}) == [1, 1]


def test_a_gguf_file_keeps_its_own_tokenizer_beside_other_files(tmp_path: pathlib.Path) -> None:
    """By its path and by its folder's. Without a tokenizer of its own, the files beside it count."""
    hermes = tmp_path / "hermes"
    sentencepiece_folder(hermes, chat_template=CHATML)
    size = Tokenizer.from_pretrained(hermes).vocab_size
    for name, source in (("own", hermes), ("bare", None)):
        model = tiny_model(tiny_args(vocab_size=size))
        model.source = source
        (tmp_path / name).mkdir()
        model.save_pretrained(tmp_path / name / "x.gguf", format="gguf")
        sentencepiece_folder(tmp_path / name, added=("<|im_end|>", "<other>"))  # and config.json
    for path in (tmp_path / "own", tmp_path / "own" / "x.gguf"):
        found = Tokenizer.from_pretrained(path)
        assert (found.gguf, found.chat is None) == (tmp_path / "own" / "x.gguf", False)
        assert found.vocabulary.find("<|im_start|>") == size - 1
        assert Mistral7B.from_pretrained(path).source == found.gguf
    for path in (tmp_path / "bare", tmp_path / "bare" / "x.gguf"):
        assert Tokenizer.from_pretrained(path).vocabulary.find("<other>") == size - 1
