"""Modelfiles: a turn has the ids of the model's own template."""

from __future__ import annotations

import re

import pytest
from template_shapes import CHATML

from mistral_7b.text.chat_template import ChatTemplate
from mistral_7b.text.modelfile import modelfile, turn_template
from mistral_7b.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def of(source: str) -> Tokenizer:
    template = ChatTemplate(source, name="a template", special=SPECIAL, controls=("<s>", "</s>"))
    return Tokenizer.from_template(Tokenizer.v3().vocabulary, template)


def filled(template: str, system: str, prompt: str, response: str) -> str:
    """What Ollama makes of a turn."""
    chosen = r"\1" if system else r"\2"
    condition = r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}"
    template = re.sub(condition, chosen, template, flags=re.DOTALL)
    for name, value in (("System", system), ("Prompt", prompt), ("Response", response)):
        template = template.replace(f"{{{{ .{name} }}}}", value)
    return template


@pytest.mark.parametrize(
    ("tokenizer", "answer"),  # of v1, whose [/INST] is plain text, it begins with a space
    [(Tokenizer.v1(), " Two"), (Tokenizer.v3(), "Two"), (of(CHATML), "Two")],
    ids=["v1", "v3", "chatml"],
)
def test_turns_encode_as_with_the_models_own_template(tokenizer: Tokenizer, answer: str) -> None:
    template = turn_template(tokenizer)
    assert template is not None
    system, user, assistant = (
        {"role": role, "content": text} for role, text in (("system", "Be"), ("user", "One"), ("assistant", "Two"))
    )
    until, after = template.split("{{ .Response }}")
    once = filled(until, "Be", "One", "")
    twice = filled(until, "", "One", "") + answer + after + filled(until, "", "One", "")
    for messages, text in (([system, user], once), ([user, assistant, user], twice)):
        ids = tokenizer.encode_chat(messages)
        assert tokenizer.encode_rendered(text) == (ids[1:] if ids[0] == tokenizer.bos_id else ids)


def test_a_template_that_is_no_turn_is_left_to_the_file() -> None:
    numbered = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}answer: "
    assert turn_template(of(numbered)) is None
    assert 'TEMPLATE "' not in modelfile("a.gguf", of(numbered))
    assert turn_template(of("{{ messages[0].content }} {{ '{{' }}")) is None


def test_a_modelfile_names_its_file_and_what_ends_an_answer() -> None:
    lines = modelfile("my.gguf", Tokenizer.v3()).splitlines()
    assert lines[0] == "FROM ./my.gguf"
    assert lines[-1] == 'PARAMETER stop "</s>"'
    assert modelfile("my.gguf", None) == "FROM ./my.gguf\n"
