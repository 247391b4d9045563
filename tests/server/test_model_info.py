"""What /v1/models says of the loaded model: the precision of its weights, and whether it is a base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from serving import Serving
from tiny import tiny_model

from mistral_7b.checkpoint.hub import DEMO
from mistral_7b.quantization import quantize
from mistral_7b.server.openai.model_info import has_chat_template, precision


def test_a_served_model_reports_both(server: Serving) -> None:
    models = json.loads(server.ask("GET", "/v1/models")[2])["data"]
    assert [(m["precision"], m["chat_template"]) for m in models] == [("float32", None)] * 2


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
    assert has_chat_template(tmp_path) is expected
    assert has_chat_template(tmp_path / "model.safetensors") is expected


def test_the_bundled_model_is_a_base_model() -> None:
    assert has_chat_template(DEMO) is False
    assert has_chat_template(None) is None
