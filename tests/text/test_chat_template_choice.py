"""Which template a folder has, compared with transformers where it reads the same files."""

from __future__ import annotations

import json

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from refusals import refused
from template_shapes import ALPACA, CHATML, LLAMA_2, MISTRAL_2023, MISTRAL_V1, MISTRAL_V3, SAIGA, ZEPHYR
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mistral_7b.checkpoint.gguf.chat_templates import chat_template
from mistral_7b.errors import TokenizerError
from mistral_7b.text.chat_template import ChatTemplate
from mistral_7b.text.template_choice import find_template, mistral_version, no_template
from mistral_7b.text.template_library import MISTRAL, TEMPLATES
from mistral_7b.text.vocabularies.files import TokenizerSettings

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ADDED = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
PIECES = {
    v: getattr(MistralTokenizer, v)().instruct_tokenizer.tokenizer.vocab() for v in ("v1", "v2", "v3")
}  # fmt: skip
LAYOUTS = {
    "config": {"tokenizer_config.json": {"chat_template": "A"}},
    "named": {"tokenizer_config.json": {"chat_template": [
        {"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"},
        {"name": "rag", "template": "C"},
    ]}},
    "jinja": {"chat_template.jinja": "A"},
    "jinja before config": {"chat_template.jinja": "A", "tokenizer_config.json": {"chat_template": "Z"}},
    "jinja files": {
        "chat_template.jinja": "A", "additional_chat_templates/tool_use.jinja": "B",
        "additional_chat_templates/rag.jinja": "C",
    },
    "jinja files before config": {
        "additional_chat_templates/default.jinja": "A", "additional_chat_templates/tool_use.jinja": "B",
        "tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "Z"}]},
    },
    "none": {"tokenizer_config.json": {"bos_token": "<s>"}},
}  # fmt: skip


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def vocabulary(folder):
    """A tokenizer that transformers opens."""
    bare = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_of_a_folder_are_read_as_in_transformers(layout, tmp_path):
    vocabulary(tmp_path)
    write(tmp_path, LAYOUTS[layout])
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    choice = find_template(tmp_path)
    if theirs is None:
        assert choice is None
        return
    named = theirs if isinstance(theirs, dict) else {"default": theirs}
    assert choice.default.text == named["default"] == "A"
    assert (choice.tool_use and choice.tool_use.text) == named.get("tool_use")
    for name, text in named.items():
        assert find_template(tmp_path, name).default.text == text


def test_chat_template_json_is_read_last(tmp_path):
    write(tmp_path, {"chat_template.json": {"chat_template": "A"}})
    assert find_template(tmp_path).default.text == "A"
    write(tmp_path, {"tokenizer_config.json": {"chat_template": "B"}})
    assert find_template(tmp_path).default.text == "B"


def test_a_folder_without_a_template_gets_no_other(tmp_path):
    assert find_template(tmp_path) is None
    assert all(name in no_template(tmp_path).hint for name in (*TEMPLATES, *MISTRAL))


def test_templates_without_a_default_need_a_name(tmp_path):
    write(tmp_path, {"chat_templates/rag.jinja": "C"})
    with refused(TokenizerError, field="chat_template", place=tmp_path):
        find_template(tmp_path)
    assert find_template(tmp_path, "rag").default.text == "C"


def test_a_template_by_name_or_file(tmp_path):
    write(tmp_path, {"chat_template.jinja": "A", "other.jinja": "B"})
    assert find_template(tmp_path, "chatml").default.text == TEMPLATES["chatml"]
    assert find_template(None, "mistral-v3").mistral == "v3"
    chosen = find_template(tmp_path, str(tmp_path / "other.jinja")).default
    assert (chosen.text, chosen.name) == ("B", str(tmp_path / "other.jinja"))
    with refused(TokenizerError, field="chat_template"):
        find_template(tmp_path, "nothing")


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"[]"), ("tokenizer_config.json", b"[" * 100_000),
     ("tokenizer_config.json", b'{"chat_template": 3}'),
     ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}'),
     ("tokenizer_config.json", b'{"chat_template": {"default": null}}'), ("chat_template.jinja", b"\xff"),
     ("chat_template.json", b"\xff")],
)  # fmt: skip
def test_a_damaged_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with refused(TokenizerError, place=tmp_path / name):
        find_template(tmp_path)


def test_an_invalid_template_is_refused_at_loading(tmp_path):
    write(tmp_path, {"chat_template.jinja": "{% if %}"})
    with refused(TokenizerError, field="chat_template", place=tmp_path / "chat_template.jinja"):
        find_template(tmp_path).load(SPECIAL, ())


def test_the_template_for_tools_is_loaded_beside_the_default(tmp_path):
    source = "{{ tools | tojson }}{{ messages[0].content }}"
    write(tmp_path, {"chat_template.jinja": ZEPHYR, "chat_templates/tool_use.jinja": source})
    template = find_template(tmp_path).load(SPECIAL, ("</s>",))
    user = [{"role": "user", "content": "Hi"}]
    assert template.render(user, [{"name": "f"}]).text == '[{"name": "f"}]Hi'
    assert template.render(user).text == "<|user|>\nHi</s>\n<|assistant|>\n"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": ADDED | {"content": "<|im_end|>"}}},
        {"tokenizer_config.json": {"bos_token": "<s>", "pad_token": None}},
        {"tokenizer_config.json": {"bos_token": "<s>"},
         "special_tokens_map.json": {"eos_token": {"content": "</s>"}}},
        {"tokenizer_config.json": {"eos_token": "a"}, "special_tokens_map.json": {"eos_token": "</s>"}},
        {"tokenizer_config.json": {"eos_token": "a", "added_tokens_decoder": {}},
         "special_tokens_map.json": {"eos_token": "</s>"}},
        {},
    ],
)  # fmt: skip
def test_special_tokens_are_those_of_transformers(files, tmp_path):
    vocabulary(tmp_path)
    write(tmp_path, files)
    assert TokenizerSettings(tmp_path).named == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map


# Mistral's own


def template(source):
    return ChatTemplate(source, name="x", special=SPECIAL, controls=("<s>", "</s>"))


@pytest.mark.parametrize(
    ("version", "source", "expected"),
    [
        ("v1", MISTRAL_2023, "v1"), ("v1", MISTRAL_V1, "v1"), ("v3", MISTRAL_V3, "v3"), ("v2", MISTRAL_V3, "v2"),
        ("v1", MISTRAL_V3, None), ("v3", MISTRAL_V1, None),  # where the system text stands
        ("v1", CHATML, None), ("v1", ZEPHYR, None), ("v1", LLAMA_2, None),
        ("v3", ALPACA, None), ("v1", SAIGA, None),
        ("v1", "{{ raise_exception('no') }}", None), ("v1", "{{ bos_token }}", None),
        ("v1", MISTRAL_V1.replace("[INST] ", "[INST] Think: "), None),
        ("v1", MISTRAL_V1.replace("+ eos_token", ""), None),
    ],
)  # fmt: skip
def test_a_template_is_mistrals_own_if_it_writes_what_mistral_common_encodes(version, source, expected, tmp_path):
    assert mistral_version(PIECES[version], template(source), tmp_path) == expected


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_template_that_gguf_files_get_is_mistrals_own(version, tmp_path):
    source = chat_template(version, ["<s>", "</s>", "<unk>", "[INST]", "[/INST]"])
    assert mistral_version(PIECES[version], template(source), tmp_path) == version


def test_a_vocabulary_with_added_tokens_is_another_models(tmp_path):
    assert mistral_version([*PIECES["v1"], "<|im_end|>"], template(MISTRAL_V1), tmp_path) is None
    assert mistral_version(PIECES["v1"][:-1], template(MISTRAL_V1), tmp_path) is None


def test_without_a_template_mistrals_layout_decides(tmp_path):
    assert mistral_version(PIECES["v3"], None, tmp_path) is None
    (tmp_path / "params.json").write_text("{}")
    assert mistral_version(PIECES["v3"], None, tmp_path) == "v3"
    assert mistral_version([*PIECES["v3"], "x"], None, tmp_path) is None
