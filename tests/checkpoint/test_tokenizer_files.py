"""Tokenizers carried from layout to layout: ids, added tokens, ends and chat templates stay as they were."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from typing import Any

import pytest
import tokenizer_folders as folders
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of
from tokenizers import Tokenizer as Fast
from transformers import AutoTokenizer

from mistral_7b import Tokenizer as Ours
from mistral_7b import TokenizerError
from mistral_7b.checkpoint import convert, quantize
from mistral_7b.checkpoint.chat_templates import chat_templates
from mistral_7b.checkpoint.gguf import file as gguf_file
from mistral_7b.checkpoint.gguf import tokenizer as gguf_tokenizer
from mistral_7b.checkpoint.gguf import tokenizer_metadata
from mistral_7b.checkpoint.gguf.transformers_templates import TEMPLATES as FOR_TRANSFORMERS
from mistral_7b.checkpoint.tokenizer_files import TokenizerFiles

TEXTS = folders.fuzzed(300)
SIZES = {"sentencepiece": 4128, "fast": 4100}  # with and without padding of the embedding; others 768


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module", params=folders.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint in Hugging Face's layout with a tokenizer of one kind."""
    made, out = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("model") / request.param
    folders.KINDS[request.param](made)
    model = tiny_model(tiny_args(vocab_size=SIZES.get(request.param, 768)))
    model.source = made
    model.save_pretrained(out)
    return out


def contents(path: pathlib.Path) -> dict[str, Any]:
    """Return the tokenizer files of a folder or GGUF file: JSON parsed, others as bytes."""
    files = TokenizerFiles.of(path).files
    return {name: json.loads(raw) if name.endswith(".json") else raw for name, raw in files.items()}


def templates(path: pathlib.Path) -> dict[str, str]:
    return {name: template.text for name, template in chat_templates(path).items()}


def ids_of(path: pathlib.Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text())
    return {name: config[name] for name in ("bos_token_id", "eos_token_id")}


def test_save_pretrained_carries_the_files_of_the_source(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folders.KINDS[folder.name](tmp_path)
    before, after = contents(tmp_path), contents(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) <= {"generation_config.json"}
    assert ids_of(folder) == ids_of(tmp_path)


def test_every_round_trip_keeps_files_and_ids(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Hugging Face -> GGUF -> GGUF -> Hugging Face -> Mistral -> Hugging Face."""
    convert(folder, tmp_path / "a.gguf", to="gguf")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", to="gguf", type="f16")
    convert(tmp_path / "b.gguf", tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "d", to="mistral")
    convert(tmp_path / "d", tmp_path / "e")
    before, generation = contents(folder), contents(folder)["generation_config.json"]
    for place in ("c", "e"):
        after = contents(tmp_path / place)
        names = before.keys() - {"tokenizer.model", "tokenizer_config.json", "generation_config.json"}
        assert {name: after[name] for name in names} == {name: before[name] for name in names}
        config, was = after["tokenizer_config.json"], before["tokenizer_config.json"]
        assert config["added_tokens_decoder"].items() >= was.get("added_tokens_decoder", {}).items()
        assert {**config, "added_tokens_decoder": was.get("added_tokens_decoder")}.items() >= was.items()
        assert after["generation_config.json"] == generation
        assert ids_of(tmp_path / place)["bos_token_id"] == ids_of(folder)["bos_token_id"]
    assert ids_of(tmp_path / "c") == ids_of(folder)
    assert templates(tmp_path / "e") == templates(folder)
    if "tokenizer.json" in before:
        assert contents(tmp_path / "e")["tokenizer.json"] == before["tokenizer.json"]
        assert not list((tmp_path / "e").glob("tokenizer.model*"))  # as before: none takes precedence


def auto(folder: pathlib.Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, tokenizer_type=None, local_files_only=True)


def test_transformers_gives_the_same_ids_ends_and_prompts(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    if folder.name == "sentencepiece":
        pytest.skip("transformers' own reading of tokenizer.model is not that of SentencePiece")
    convert(folder, tmp_path / "a.gguf", to="gguf")
    convert(tmp_path / "a.gguf", tmp_path / "b", to="mistral")
    before, after = auto(folder), auto(tmp_path / "b")
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids
    assert (after.eos_token, after.bos_token) == (before.eos_token, before.bos_token)
    chat = [{"role": "user", "content": "Hello"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)


def stripped(path: pathlib.Path) -> dict[str, Any]:
    """Return a file's metadata without what only this package writes: a file of another converter."""
    keys = gguf_file.read(path).metadata
    return {k: v for k, v in keys.items() if not k.startswith(("huggingface.", "tokenizer.huggingface"))}


def test_other_converters_files_give_the_same_ids(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A tokenizer.json built from tokens, scores and merges alone, against the original."""
    convert(folder, tmp_path / "a.gguf", to="gguf")
    files = gguf_tokenizer.files(tmp_path, stripped(tmp_path / "a.gguf"))
    built = Fast.from_str(files["tokenizer.json"].decode())
    if folder.name == "sentencepiece":
        folders.fast(tmp_path)
        original = Fast.from_file(str(tmp_path / "tokenizer.json"))
    else:
        original = Fast.from_file(str(folder / "tokenizer.json"))
    for special in (False, True):
        built.encode_special_tokens = original.encode_special_tokens = not special
        for text in TEXTS:
            wanted = original.encode(text, add_special_tokens=False).ids
            assert built.encode(text, add_special_tokens=False).ids == wanted
            assert built.decode(wanted, skip_special_tokens=False) == original.decode(
                wanted, skip_special_tokens=False
            )
    config, generation = (json.loads(files[f"{n}_config.json"]) for n in ("tokenizer", "generation"))
    assert config["eos_token"] == "<|im_end|>"
    ends = {"sentencepiece": [4096, 2], "fast": [4096, 2]}.get(folder.name, 2)
    assert generation["eos_token_id"] == ends
    assert auto_templates(config) == templates(folder)
    special = {t["content"]: t["special"] for t in config["added_tokens_decoder"].values()}
    assert [special[t] for t in ("<|im_start|>", "<|im_end|>", "<tool_call>")] == [True, True, False]


def auto_templates(config: dict[str, Any]) -> dict[str, str]:
    given = config["chat_template"]
    return {"default": given} if isinstance(given, str) else {t["name"]: t["template"] for t in given}


def test_added_tokens_follow_the_pieces_and_padding_has_no_text(tmp_path: pathlib.Path) -> None:
    folders.sentencepiece(tmp_path)
    keys = tokenizer_metadata.of_folder(tmp_path, 4128)
    assert keys is not None
    assert keys["tokenizer.ggml.tokens"][4095:4101] == [
        Ours.from_file(folders.PIECES).piece(4095).replace(" ", "\u2581"), *folders.CONTROLS, *folders.WORDS,
        "[PAD4100]",
    ]  # fmt: skip
    assert keys["tokenizer.ggml.token_type"][4095:4102] == [1, 3, 3, 4, 4, 5, 5]
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (4096, 2)
    files = gguf_tokenizer.files(tmp_path, keys)
    assert json.loads(files["added_tokens.json"]) == {
        t: 4096 + i for i, t in enumerate(folders.CONTROLS + folders.WORDS)
    }
    (tmp_path / "back.model").write_bytes(files["tokenizer.model.v3"])
    back, original = Ours.from_file(tmp_path / "back.model"), Ours.from_file(folders.PIECES)
    assert back.vocab_size == 4096
    assert [back.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]


def test_early_converters_user_defined_controls_are_special(tmp_path: pathlib.Path) -> None:
    folders.sentencepiece(tmp_path)
    keys = tokenizer_metadata.of_folder(tmp_path, 4100)
    assert keys is not None
    early = {k: v for k, v in keys.items() if not k.startswith("huggingface.")}
    early["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"][:4096], 4, 4, 4, 4]
    config = json.loads(gguf_tokenizer.files(tmp_path, early)["tokenizer_config.json"])
    flags = [config["added_tokens_decoder"][str(4096 + i)]["special"] for i in range(4)]
    assert flags == [True, True, False, False]


def test_a_template_or_end_edited_in_the_file_wins_over_what_was_kept(tmp_path: pathlib.Path) -> None:
    folders.sentencepiece(tmp_path)
    keys = tokenizer_metadata.of_folder(tmp_path, 4100)
    assert keys is not None
    edited = {k: v for k, v in keys.items() if not k.startswith("tokenizer.chat_template")}
    edited |= {"tokenizer.chat_template": "new", "tokenizer.ggml.eos_token_id": 4097}
    files = gguf_tokenizer.files(tmp_path, edited)
    config, generation = (json.loads(files[f"{n}_config.json"]) for n in ("tokenizer", "generation"))
    assert (config["chat_template"], config["eos_token"]) == ("new", "<|im_start|>")
    assert generation == {**folders.GENERATION, "eos_token_id": [4097, 2]}


def test_a_kept_tokenizer_json_that_is_not_the_files_is_ignored(tmp_path: pathlib.Path) -> None:
    folders.byte_level(tmp_path)
    keys = tokenizer_metadata.of_folder(tmp_path, 768)
    assert keys is not None
    given = gguf_tokenizer.files(tmp_path, keys)["tokenizer.json"]
    assert given == (tmp_path / "tokenizer.json").read_bytes()
    tokens = list(keys["tokenizer.ggml.tokens"])
    at = tokens.index("<|im_end|>")
    tokens[at] = "<|renamed|>"
    made = json.loads(gguf_tokenizer.files(tmp_path, {**keys, "tokenizer.ggml.tokens": tokens})["tokenizer.json"])
    assert made["model"]["vocab"]["<|renamed|>"] == at
    for bad in ("[]", "{", '{"model": 1}', '{"model": {"vocab": {"a": "b"}}}', 5):
        files = gguf_tokenizer.files(tmp_path, {**keys, "tokenizer.huggingface.json": bad})
        built, original = (Fast.from_str(raw.decode()) for raw in (files["tokenizer.json"], given))
        assert [built.encode(text).ids for text in TEXTS] == [original.encode(text).ids for text in TEXTS]


def test_a_space_before_the_first_word_alone_is_kept_and_warned_about(tmp_path: pathlib.Path) -> None:
    folders.fast(tmp_path, first_only=True)
    with pytest.warns(UserWarning, match="first word only"):
        keys = tokenizer_metadata.of_folder(tmp_path, 4100)
    assert keys is not None
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert gguf_tokenizer.files(tmp_path, keys)["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


def test_merges_beyond_sentencepiece_warn(tmp_path: pathlib.Path) -> None:
    folders.fast(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"].pop(100)
    folders.write(tmp_path, "tokenizer.json", data)
    with pytest.warns(UserWarning, match="rare words"):
        tokenizer_metadata.of_folder(tmp_path, 4100)


def edited(folder: pathlib.Path, **parts: Any) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    for name, value in parts.items():
        if name == "model":
            data["model"].update(value)
        else:
            data[name] = value
    folders.write(folder, "tokenizer.json", data)


@pytest.mark.parametrize(
    ("kind", "parts", "field"),
    [
        ("smollm", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "pre_tokenizer"),
        ("smollm", {"model": {"ignore_merges": True}}, "pre_tokenizer"),
        ("smollm", {"model": {"type": "Unigram"}}, "model"),
        ("smollm", {"model": {"vocab": 5}}, "model"),
        ("smollm", {"model": {"merges": [["a b", "c"]]}}, "model.merges"),
        ("fast", {"normalizer": {"type": "NFKC"}}, "normalizer"),
        ("fast", {"pre_tokenizer": {"type": "Whitespace"}}, "normalizer"),
        ("fast", {"model": {"byte_fallback": False}}, "model.byte_fallback"),
        ("fast", {"added_tokens": [{"id": "x"}]}, None),
        ("smollm", {"model": {"vocab": {"a": 1.5}}}, "model"),
        ("smollm", {"model": {"vocab": {"a": 10**12}}}, "model.vocab"),
        ("smollm", {"model": {"merges": [["a", 3]]}}, None),
        ("fast", {"model": {"merges": [["a", 3]]}}, None),
        ("fast", {"post_processor": {"processors": [3]}}, None),
        ("fast", {"post_processor": {"type": "TemplateProcessing", "single": 3}}, None),
    ],
)
def test_a_tokenizer_that_gguf_cannot_hold_is_refused(
    tmp_path: pathlib.Path, kind: str, parts: dict[str, Any], field: str | None
) -> None:
    folders.KINDS[kind](tmp_path)
    edited(tmp_path, **parts)
    place = tmp_path if field is None else tmp_path / "tokenizer.json"
    with refused(TokenizerError, field=field, place=place):
        tokenizer_metadata.of_folder(tmp_path, 4100)


GPT_2 = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("pre", "made-up", "pre"),
        ("merges", None, "merges"),
        ("merges", ["a  b"], "merges[0]"),
        ("merges", ["a c"], "merges[0]"),
        ("merges", ["b a"], "merges[0]"),
        ("tokens", ["a", "b", "ab", "a"], "tokens[3]"),
        ("eos_token_id", 4, "eos_token_id"),
    ],
)
def test_invalid_byte_level_keys_raise_one_error(key: str, value: Any, field: str) -> None:
    path = pathlib.Path("x.gguf")
    made = Fast.from_str(gguf_tokenizer.files(path, GPT_2)["tokenizer.json"].decode())
    assert made.encode("ab<e>").ids == [2, 3]
    with refused(TokenizerError, field=f"tokenizer.ggml.{field}", place=path):
        gguf_tokenizer.files(path, {**GPT_2, f"tokenizer.ggml.{key}": value})


def test_mistrals_layout_keeps_ends_that_only_config_json_has(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    folders.write(tmp_path / "a", "config.json", {**config, "bos_token_id": 3, "eos_token_id": [7, 9]})
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    convert(tmp_path / "b", tmp_path / "c")
    assert ids_of(tmp_path / "c") == {"bos_token_id": 3, "eos_token_id": [7, 9]}


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mistrals_own_vocabulary_gets_its_template_unless_the_folder_has_one(
    tmp_path: pathlib.Path, version: str
) -> None:
    shutil.copyfile(getattr(Ours, version)().path, tmp_path / "tokenizer.model")
    keys = tokenizer_metadata.of_folder(tmp_path, 32768)
    assert keys is not None
    assert f"({version})" in keys["tokenizer.chat_template"]
    files = gguf_tokenizer.files(tmp_path, keys)
    written = json.loads(files["tokenizer_config.json"]).get("chat_template")
    assert written == FOR_TRANSFORMERS[version]
    assert "tokenizer.json" not in files
    (tmp_path / "chat_template.jinja").write_text("its own")
    keys = tokenizer_metadata.of_folder(tmp_path, 32768)
    assert keys is not None
    assert keys["tokenizer.chat_template"] == "its own"


def test_templates_are_found_where_transformers_looks(tmp_path: pathlib.Path) -> None:
    folders.sentencepiece(tmp_path)
    assert templates(tmp_path) == {"default": folders.CHATML, "tool_use": folders.TOOLS}
    (tmp_path / "chat_template.jinja").write_text("a")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("b")
    assert templates(tmp_path) == {"default": "a", "rag": "b"}
    folders.write(tmp_path, "tokenizer_config.json", [])
    with refused(TokenizerError, place=tmp_path / "tokenizer_config.json"):
        tokenizer_metadata.of_folder(tmp_path, 4100)


def test_an_unknown_kind_of_tokenizer_in_a_gguf_file_is_warned_about(tmp_path: pathlib.Path) -> None:
    folders.byte_level(tmp_path)
    model = tiny_model(tiny_args(vocab_size=768))
    model.source = tmp_path
    model.save_pretrained(tmp_path / "x.gguf", format="gguf")
    raw = (tmp_path / "x.gguf").read_bytes()
    assert raw.count(b"\x04\0\0\0\0\0\0\0gpt2") == 1
    (tmp_path / "y.gguf").write_bytes(raw.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0rwkv"))
    with pytest.warns(UserWarning, match="'rwkv'"):
        convert(tmp_path / "y.gguf", tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    with refused(TokenizerError, field="tokenizer.ggml.model", place=tmp_path / "y.gguf"):
        gguf_tokenizer.extract(tmp_path / "y.gguf")


def test_a_quantized_folder_keeps_the_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantize(folder, tmp_path / "out", "int8", tokens_of((1, 20)), "random tokens")
    assert contents(tmp_path / "out") == contents(folder)
    assert ids_of(tmp_path / "out") == ids_of(folder)


STARTER = pathlib.Path(os.environ.get("MISTRAL_7B_STARTER", "no such file"))


@pytest.mark.skipif(not STARTER.is_file(), reason="MISTRAL_7B_STARTER names no SmolLM2-135M-Instruct GGUF file")
def test_the_starters_tokenizer() -> None:
    out = gguf_tokenizer.extract(STARTER)
    built = Fast.from_file(str(out / "tokenizer.json"))
    text = "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n"
    assert built.encode(text).tokens == [
        "<|im_start|>", "user", "\u010a", "What", "\u0120is", "\u0120", "1", "2", "\u0120+", "\u0120", "3", "4",
        "?", "<|im_end|>", "\u010a",
    ]  # fmt: skip
    assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "<|im_start|>assistant" in templates(out)["default"]


def test_v3_in_mistrals_layout_becomes_a_folder_for_transformers(tmp_path: pathlib.Path) -> None:
    """By way of a GGUF file: the same chats, tools and tool calls here, and their text in transformers."""
    tiny_model(tiny_args(vocab_size=32768)).save_pretrained(tmp_path / "a", format="mistral")
    shutil.copyfile(Ours.v3().path, tmp_path / "a" / "tokenizer.model.v3")
    convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf")
    convert(tmp_path / "b.gguf", tmp_path / "c", to="huggingface")
    assert {"tokenizer.model", "tokenizer.model.v3"} <= {file.name for file in (tmp_path / "c").iterdir()}
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}]
    call = {"id": "abcDEF123", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    chat = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcDEF123", "content": "sunny"}, {"role": "assistant", "content": "x"},
        {"role": "user", "content": "v"},
    ]  # fmt: skip
    sent = json.loads(json.dumps(chat).replace('{"a": 1}', '"{\\"a\\": 1}"'))
    ours = Ours.v3()
    wanted = ours.encode_chat(sent, tools)
    for path in (tmp_path / "a", tmp_path / "b.gguf", tmp_path / "c"):
        found = Ours.from_pretrained(path)
        assert (found.version, found.encode_chat(sent, tools)) == ("v3", wanted)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "c")
    text = theirs.apply_chat_template(chat, tools, tokenize=False)
    markers = re.compile(r"\s*(</?s>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])\s*")
    encoded = "".join(ours.piece(i) for i in wanted)
    assert markers.sub(r"\1", text) == markers.sub(r"\1", encoded).replace("<0x0A>", "\n")
    assert chat_templates(tmp_path / "c").keys() == {"default"}
