"""What is told of a tokenizer: its kind, its file, its added tokens, its chat template and its ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_args, tiny_model
from tokenizer_files import byte_fallback_folder, byte_level_folder, sentencepiece_folder

from mistral_7b.text.facts import tokenizer_facts
from mistral_7b.text.template_library import TEMPLATES
from mistral_7b.text.tokenizer import Tokenizer

MAKERS = {
    "SentencePiece": (sentencepiece_folder, "tokenizer.model", 4098, 2, {"<|im_end|>": 4096}),
    "BPE with byte fallback": (byte_fallback_folder, "tokenizer.json", 4098, 2, {"</s>": 2}),
    "byte-level BPE": (byte_level_folder, "tokenizer.json", 700, 0, {"<|im_end|>": 2}),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_kinds(tmp_path: Path, kind: str) -> None:
    make, file, size, added, ends = MAKERS[kind]
    facts = tokenizer_facts(Tokenizer.from_pretrained(make(tmp_path)))
    assert (facts["kind"], facts["file"]) == (kind, file)
    assert (facts["vocab_size"], facts["added_tokens"]) == (size, added)
    assert {end["token"]: end["id"] for end in facts["ends"]} == ends
    assert facts["chat"] is None
    more = tokenizer_facts(Tokenizer.from_pretrained(tmp_path), [7])["ends"]
    assert [end["id"] for end in more] == sorted([7, *ends.values()])


def test_templates(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "model", chat_template=TEMPLATES["chatml"])

    def chat(template: str | None = None) -> object:
        return tokenizer_facts(Tokenizer.from_pretrained(folder, template))["chat"]

    assert chat() == {"name": "tokenizer_config.json", "tools": False, "system": True}
    assert chat("zephyr") == {"name": "zephyr", "tools": False, "system": True}
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson if tools }}")
    assert chat(str(mine)) == {"name": "mine.jinja", "tools": True, "system": True}
    assert chat("mistral-v1") == {"name": "mistral-v1, by mistral-common", "tools": False, "system": True}


def test_a_gguf_file_is_named_and_not_what_is_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_model(tiny_args(vocab_size=4098))
    model.source = sentencepiece_folder(tmp_path / "from", chat_template=TEMPLATES["chatml"])
    model.save_pretrained(tmp_path / "x.gguf", format="gguf")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "x.gguf").stopping_at([5])
    facts = tokenizer_facts(tokenizer)
    assert (facts["file"], facts["added_tokens"]) == ("x.gguf", 2)
    assert facts["chat"] == {"name": "tokenizer.chat_template", "tools": False, "system": True}
    assert str(tmp_path) not in json.dumps(facts)
