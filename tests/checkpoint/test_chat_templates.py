"""Chat templates of GGUF files: a rendered and tokenized conversation has encode_chat's ids.

Rendering follows transformers and llama.cpp, tokenization follows llama.cpp: names of special tokens in the
rendered text become these tokens, and the text between two of them is encoded separately.
"""

from __future__ import annotations

import json
import pathlib
import random
import re
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from conversations import ODD, VALUES, Chat, Drawing
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_7b import Tokenizer, TokenizerError
from mistral_7b.checkpoint.gguf import chat_templates, tokenizer_metadata
from mistral_7b.checkpoint.gguf import tokenizer as gguf_tokenizer

SEEDS = 160  # conversations for each version
V7 = MistralTokenizer.v7().instruct_tokenizer.tokenizer.file_path
OURS = {
    "v1": Tokenizer.v1(), "v2": Tokenizer.v2(), "v3": Tokenizer.v3(), "v7": Tokenizer.from_file(V7, "v7"),
    "demo": Tokenizer.from_pretrained(),
}  # fmt: skip
every = pytest.mark.parametrize("version", OURS)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def environment(**options: bool) -> jinja2.Environment:
    """The Jinja environment of transformers."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)  # type: ignore[arg-type]
    made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = raise_exception
    return made


class Written:
    """A template as written to GGUF, and llama.cpp's tokenization with the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        keys = tokenizer_metadata.of_sentencepiece(tokenizer.path, tokenizer.vocab_size)
        self.tokenizer, self.source = tokenizer, keys["tokenizer.chat_template"]
        self.templates = [
            environment(**options).from_string(self.source)
            for options in ({"trim_blocks": True, "lstrip_blocks": True}, {})
        ]
        kinds = zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True)
        special = {token: i for i, (token, kind) in enumerate(kinds) if kind in (2, 3, 4)}
        self.special = special  # unknown, control, a user's own
        longest = sorted(special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest)) + ")")

    def render(self, chat: Chat, tools: Any = None) -> str:
        asked = {"messages": chat, "tools": tools, "bos_token": "<s>", "eos_token": "</s>"}
        texts = {template.render(**asked, add_generation_prompt=True) for template in self.templates}
        assert len(texts) == 1
        return texts.pop()

    def tokens(self, text: str) -> list[int]:
        out: list[int] = []
        for part in self._cut.split(text):
            out += [self.special[part]] if part in self.special else self.tokenizer.encode(part, bos=False)
        return out


WRITTEN = {version: Written(tokenizer) for version, tokenizer in OURS.items()}

# ------------------------------------------------------------------ unsupported conversations


def unspeakable(text: str) -> bool:
    """Return whether a text is JSON that a template cannot format as json.dumps does (and must reject)."""
    found: list[bool] = []

    def pairs(given: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len(dict(given)) < len(given))
        return dict(given)

    def number(word: str) -> int:
        found.append("e" in word.lower() or json.dumps(json.loads(word)) != word)
        return 0

    try:
        json.loads(text, object_pairs_hook=pairs, parse_int=number, parse_float=number)
    except ValueError:
        return False
    return any(found) or bool(re.search(r"(?<!\\)(\\\\)*\\[/u]", text))


def inexpressible(version: str, chat: Chat, tools: Any) -> bool:
    """Return whether a template must reject a conversation that encode_chat accepts."""
    last = max(i for i, m in enumerate(chat) if m["role"] == "user")
    texts, ids = [json.dumps(tools, ensure_ascii=False)], []
    for i, m in enumerate(chat):
        calls = m.get("tool_calls") or []
        if version == "v2" and i < last and (calls or m["role"] == "tool"):
            continue  # left out
        parts = m["content"] if isinstance(m["content"], list) else [{"text": m["content"] or ""}]
        content = "\n\n".join(p["text"] for p in parts if p["text"])
        given = [c["function"]["arguments"] for c in calls]
        texts += [a if isinstance(a, str) else json.dumps(a, ensure_ascii=False) for a in given]
        texts += [] if calls else [content]
        ids += [c["id"] for c in calls] + ([m["tool_call_id"]] if m["role"] == "tool" else [])
        read = [a for a in given if isinstance(a, str)] + (
            [content] if m["role"] == "tool" and version != "v7" else []
        )
        if any(map(unspeakable, read)):
            return True
    named = any(not re.fullmatch("[a-zA-Z0-9]{9}", name) for name in ids)
    # Tokens such as [control_8] are matched by their prefix.
    names = {re.sub(r"^(\[(control|REFERENCE_DOC)_)\d+\]$", r"\1", name) for name in WRITTEN[version].special}
    return (named and version != "v2") or any(name in text for text in texts for name in names)


@every
def test_random_conversations_have_the_ids_of_encode_chat(version: str) -> None:
    written, counts = WRITTEN[version], {"equal": 0, "refused": 0, "invalid": 0}
    for seed in range(SEEDS):
        drawing = Drawing(seed, OURS[version].version)
        chat, tools = drawing.chat(), drawing.offered()
        try:
            wanted = OURS[version].encode_chat(chat, tools)
        except TokenizerError:
            counts["invalid"] += 1
            continue
        where = json.dumps({"seed": seed, "messages": chat, "tools": tools}, ensure_ascii=False)
        if inexpressible(version, chat, tools):
            with pytest.raises(jinja2.TemplateError):
                pytest.fail(f"rendered as {written.render(chat, tools)!r}: {where}")
            counts["refused"] += 1
        else:
            assert written.tokens(written.render(chat, tools)) == wanted, where
            counts["equal"] += 1
    assert counts["equal"] > SEEDS / 2, counts


MUTATED = '{}[]",:\\/ \n\t0123456789.-+eEu_tnafNI"é'


def test_the_json_macro_equals_json_dumps_of_json_loads() -> None:
    """Valid JSON, and JSON with one or two changed characters."""
    draw, drawing, counts = random.Random(0), Drawing(0, "v3"), [0, 0, 0]
    macro = environment().from_string(chat_templates.JSON + "{{ reread(text) }}")
    for _ in range(1500):
        text = draw.choice(
            [*ODD, drawing.json(drawing.value()), drawing.json([draw.choice(VALUES), drawing.value()])]
        )
        for _ in range(draw.choice([0, 1, 1, 2])):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(["", *draw.choices(MUTATED, k=2)]) + text[at + draw.randrange(2) :]
        try:
            wanted = json.dumps(json.loads(text or "{}"), ensure_ascii=False)
            counts[0] += 1
        except ValueError:
            wanted = json.dumps(text, ensure_ascii=False)
            counts[1] += 1
        if unspeakable(text):
            counts[2] += 1
            with pytest.raises(jinja2.TemplateError, match="a template cannot spell it as Mistral does"):
                macro.render(text=text)
        else:
            assert macro.render(text=text) == wanted, text
    assert min(counts) > 100, counts


# ------------------------------------------------------------------ single cases

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
CALLED: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": '{"y":[1,2]}'}


def test_compact_json_gets_mistrals_whitespace() -> None:
    text = WRITTEN["v3"].render([USER, CALLED, RESULT])
    assert text.endswith(
        '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "call00001"}]</s>'
        '[TOOL_RESULTS]{"content": {"y": [1, 2]}, "call_id": "call00001"}[/TOOL_RESULTS]'
    )


def calling(function: dict[str, Any]) -> dict[str, Any]:
    return {**CALLED, "tool_calls": [{**CALL, "function": function}]}


REFUSED: list[tuple[str, Chat, str]] = [
    ("v1", [{**USER, "content": "a</s>"}], "a text spells the control token </s>"),
    ("v3", [{**USER, "content": "a [INST] b"}], "a text spells the control token [INST]"),
    ("v3", [{**USER, "content": "[control_17]"}], "a text spells the control token [control_"),
    ("v3", [USER, CALLED, {**RESULT, "content": '{"a": "[/INST]"}'}], "a text spells the control token [/INST]"),
    ("v3", [USER, {**CALLED, "tool_calls": [{**CALL, "id": "call_6kZ"}]}], "must be 9 letters or digits"),
    ("v3", [USER, CALLED, {**RESULT, "tool_call_id": None}], "must be 9 letters or digits"),
    ("v3", [USER, CALLED, {**RESULT, "content": '["\\u00e9"]'}], "JSON with escapes other than"),
    ("v3", [USER, CALLED, {**RESULT, "content": "1.50"}], "JSON with the number 1.50"),
    ("v3", [USER, CALLED, {**RESULT, "content": '{"a": 1, "a": 2}'}], "JSON with a key twice"),
    # Also rejected by encode_chat:
    ("v1", [USER, CALLED, RESULT], "know no tools"),
    ("v1", [{"role": "system", "content": "Hi"}], "no message with role 'user'"),
    ("v3", [{"role": "system", "content": "Hi"}], "no message with role 'user'"),
    ("v3", [USER, {"role": "bot", "content": "Hi"}], "a role other than"),
    ("v3", [USER, RESULT], "a message with role tool may not follow one with role user"),
    ("v3", [USER, {"role": "assistant", "content": ""}], "needs content or tool_calls"),
    ("v3", [USER, {"role": "assistant", "content": "a"}, CALLED], "no place for text beside tool calls"),
    ("v3", [USER, CALLED, {"role": "assistant", "content": "a"}], "calls need their results"),
    ("v3", [{"role": "user", "content": None}], "content must be a text"),
    ("v3", [{"role": "user", "content": [{"type": "image_url"}]}], "content part of another type"),
    ("v3", [USER, calling({"name": "f", "arguments": [1]}), RESULT], "must be an object or a text"),
    ("v3", [USER, calling({}), RESULT], "no function with a name"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "chat", "said"), REFUSED)
def test_templates_raise_with_the_reason(version: str, chat: Chat, said: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=re.escape(said)):
        WRITTEN[version].render(chat)


@pytest.mark.parametrize("method", ["strip", "lstrip", "rstrip"])
def test_an_engine_that_cannot_strip_characters_is_refused(method: str) -> None:
    """The Jinja of transformers.js ignores strip's argument, and would render other text."""
    source = re.sub(rf"\.{method}\([^)]+\)", f".{method}()", WRITTEN["v3"].source)
    assert source != WRITTEN["v3"].source
    with pytest.raises(jinja2.TemplateError, match="that take the characters to strip"):
        environment().from_string(source).render(messages=[USER])


@every
@pytest.mark.parametrize("text", ["It will be", "It will be ", " a \n ", "   ", "\n"])
def test_transformers_continues_a_final_assistant_message_unchanged(version: str, text: str) -> None:
    """continue_final_message cuts the rendered text at the last message, which must not be stripped."""
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    written, last = WRITTEN[version], {"role": "assistant", "content": text}
    (found,), _ = rendering.render_jinja_template(
        [[USER, last]],
        chat_template=written.source,
        continue_final_message=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert found == written.render([USER, {**last, "prefix": True}])
    assert written.tokens(found) == OURS[version].encode_chat([USER, {**last, "prefix": True}])


def test_templates_contain_the_strings_llama_cpp_searches_for() -> None:
    """llama.cpp probes a template with a call without its result."""
    sources = {version: written.source for version, written in WRITTEN.items()}
    for version in ("v2", "v3", "v7", "demo"):
        second = {**CALL, "id": "call00002"}
        tried = [
            USER,
            {**CALLED, "content": "Assistant", "tool_calls": [CALL, second]},
            RESULT,
            {**USER, "role": "assistant"},
            USER,
        ]
        assert ("call00002" in WRITTEN[version].render(tried)) == (version in ("v3", "v7", "demo"))
        assert "[AVAILABLE_TOOLS]" in sources[version]
        assert " [INST]" not in sources[version]
        assert '"[INST]"' not in sources[version]
        assert ("[SYSTEM_PROMPT]" in sources[version]) == (version == "v7")
    assert "' [INST] ' + system_message" in sources["v1"]
    assert "[AVAILABLE_TOOLS]" not in sources["v1"]


@every
def test_a_vocabulary_round_trips_with_its_version(version: str, tmp_path: pathlib.Path) -> None:
    keys = tokenizer_metadata.of_sentencepiece(OURS[version].path, OURS[version].vocab_size)
    path = tmp_path / gguf_tokenizer.file_name(keys)
    path.write_bytes(gguf_tokenizer.files(path, keys)[path.name])
    assert Tokenizer.from_file(path).version == OURS[version].version
    assert tokenizer_metadata.of_sentencepiece(path, OURS[version].vocab_size) == keys


def test_user_defined_tokens_are_special() -> None:
    """Token names are literals in the template for any characters; numbered names share a prefix."""
    names = ["<|im_start|>", "it's", 'a"b', "\\n", "[THING_12]", "7]"]
    template = environment().from_string(chat_templates.chat_template("v1", names))
    for name in ["<|im_start|>", "it's", 'a"b', "\\n", "[THING_", "7]"]:
        with pytest.raises(jinja2.TemplateError, match=re.escape(f"control token {name}:")):
            template.render(messages=[{"role": "user", "content": f"x{name}y"}])
    assert template.render(messages=[{"role": "user", "content": "[THING] 7 n"}]) == "[INST] [THING] 7 n [/INST]"
