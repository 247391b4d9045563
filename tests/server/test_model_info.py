"""What /v1/models says of the loaded model: precision, tokenizer, chat template, whether it is a base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from gguf_inputs import BLOCKS, TEXT, built, pairs_of
from serving import HELLO, Serving, serving
from tiny import tiny_args, tiny_model
from tokenizer_files import sentencepiece_folder

from mistral_7b.checkpoint.hub import DEMO
from mistral_7b.quantization import quantize
from mistral_7b.server.openai.model_info import calls_tools, has_chat_template, precision
from mistral_7b.text.tokenizer import Tokenizer

MISTRAL = Tokenizer.v3()


def test_a_served_model_reports_both(server: Serving) -> None:
    models = json.loads(server.ask("GET", "/v1/models")[2])["data"]
    assert [(m["precision"], m["chat_template"]) for m in models] == [("float32", None)] * 2
    for model in models:
        assert model["tokenizer"] == {
            "kind": "SentencePiece", "file": "mistral_instruct_tokenizer_240323.model.v3", "vocab_size": 32768,
            "added_tokens": 0, "ends": [{"id": 2, "token": "</s>"}],
            "chat": {"name": "mistral-v3, by mistral-common", "tools": True, "system": True},
        }  # fmt: skip
        assert model["capabilities"] == {"completion_chat": True, "function_calling": True}


def test_the_models_own_sampling_defaults_are_told(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    monkeypatch.setattr(server.llm.inputs, "model_defaults", defaults)
    (model, _) = json.loads(server.ask("GET", "/v1/models")[2])["data"]
    assert model["sampling_defaults"] == defaults
    lines = server.post("/api/show", {"model": "tiny"})[1]["parameters"].splitlines()
    told = dict(line.split() for line in lines)
    assert told == {"stop": '"</s>"', "temperature": "0.6", "top_k": "20", "repeat_penalty": "1.1"}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_precision_is_the_quantization(scheme: str) -> None:
    assert precision(quantize(tiny_model().bfloat16(), scheme)) == scheme


@pytest.mark.parametrize(("files", "expected"), [
    ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, True),
    ({"tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}, True),
    ({"tokenizer_config.json": '{"bos_token": "<s>"}'}, False),
    ({"tokenizer_config.json": "[]"}, None), ({"tokenizer_config.json": "{"}, None), ({}, None),
])  # fmt: skip
def test_a_chat_template_is_found_beside_the_weights(
    tmp_path: Path, files: dict[str, str], expected: bool | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert has_chat_template(tmp_path, MISTRAL) is expected
    assert has_chat_template(tmp_path / "model.safetensors", MISTRAL) is expected


def test_the_bundled_model_is_a_base_model() -> None:
    assert has_chat_template(DEMO, Tokenizer.from_pretrained(DEMO)) is False
    assert has_chat_template(None, MISTRAL) is None


def test_a_tokenizer_tells_of_other_templates(tmp_path: Path) -> None:
    base = Tokenizer.from_pretrained(sentencepiece_folder(tmp_path))
    assert (base.chat, has_chat_template(tmp_path, base), calls_tools(base)) == (None, False, False)
    chosen = Tokenizer.from_pretrained(tmp_path, "chatml")
    assert has_chat_template(tmp_path, chosen) is True
    assert calls_tools(MISTRAL)
    assert not calls_tools(Tokenizer.v1())
    assert not calls_tools(chosen)  # [TOOL_CALLS] is there, but no place for tools in the template
    assert has_chat_template(tmp_path, None) is False


def test_a_model_without_a_template_is_a_base_model_that_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(sentencepiece_folder(tmp_path))
    model = tiny_model(tiny_args(vocab_size=tokenizer.vocab_size))
    with serving(trained=model, tokenizer=tokenizer) as it:
        (told,) = json.loads(it.ask("GET", "/v1/models")[2])["data"]
        assert (told["chat_template"], told["tokenizer"]["chat"]) == (False, None)
        assert told["tokenizer"]["added_tokens"] == 2
        assert not told["capabilities"]["completion_chat"]
        shown = it.post("/api/show", {"model": "tiny"})[1]
        assert (shown["template"], "tools" in shown["capabilities"]) == ("", False)
        status, answer = it.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2})
        assert (status, "--chat-template" in json.dumps(answer)) == (400, True)
        page = {"model": "tiny", "prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
        status, _, frames = it.ask("POST", "/v1/completions", {**page, "max_tokens": 2})
        assert (status, frames.count(b'"text"') > 0) == (200, True)


def test_a_gguf_file_tells_by_its_key(tmp_path: Path) -> None:
    for pairs, expected in (({}, False), ({"tokenizer.chat_template": (TEXT, "{{ messages }}")}, True)):
        (tmp_path / "x.gguf").write_bytes(built(pairs_of(BLOCKS) | pairs, []))
        assert has_chat_template(tmp_path / "x.gguf", MISTRAL) is expected
