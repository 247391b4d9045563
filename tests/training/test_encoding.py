"""Token ids and masks of training data: those of inference, and trained in the right places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from refusals import refused
from template_shapes import ALPACA, HERMES_TOOLS, LLAMA_2, OPENCHAT, ZEPHYR
from tokenizer_files import DEMO, TEXTS, V1, byte_level_folder, harmless, sentencepiece_folder

from mistral_7b.errors import TrainingError
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.training.encoding import Encoded, Encoder, Pair, Prompt, Thumb
from mistral_7b.training.forms import Chat, Completion, Document, Judged, Preference, Task
from mistral_7b.training.preview import styled

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {}}}]
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
# Reasoning of all answers but the last is dropped.
DROPPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('#')[-1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_HEAD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def chat(*messages: dict[str, Any], tools: list[Any] | None = None, muted: tuple[int, ...] = ()) -> Chat:
    answers = (i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in muted)
    return Chat(list(messages), tools, tuple(answers))


def template(source: str, folder: Callable[[Path], Path]) -> Callable[[Path], Tokenizer]:
    """Opens a tokenizer with the chat template of this Jinja text."""

    def open_in(path: Path) -> Tokenizer:
        files = folder(path)
        (files / "given.jinja").write_text(source, encoding="utf-8")
        return Tokenizer.from_pretrained(files, files / "given.jinja")

    return open_in


def pieces(path: Path) -> Path:
    return sentencepiece_folder(path, DEMO, added=("<|end_of_turn|>",), eos_token="</s>")


TOKENIZERS: dict[str, Callable[[Path], Tokenizer]] = {
    "v1": lambda _: Tokenizer.v1(),
    "v2": lambda _: Tokenizer.v2(),
    "v3": lambda _: Tokenizer.v3(),
    "chatml": lambda p: Tokenizer.from_pretrained(byte_level_folder(p), "chatml"),
    "zephyr": template(ZEPHYR, pieces),
    "llama-2": template(LLAMA_2, lambda p: sentencepiece_folder(p, V1, added=())),
    "openchat": template(OPENCHAT, pieces),
    "vicuna": lambda p: Tokenizer.from_pretrained(pieces(p), "vicuna"),
    "dropping": template(DROPPING, byte_level_folder),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp("files"))


def opened(name: str, path: Path) -> Tokenizer:
    return TOKENIZERS[name](path)


def marked(tokenizer: Tokenizer, sample: Any) -> list[str]:
    """The documents of a sample, what is trained between « », control tokens in ⟨ ⟩."""
    return [styled(document, tokenizer, color=False).plain for document in encoded(tokenizer, sample)]


def encoded(tokenizer: Tokenizer, sample: Any, seq_len: int = 512) -> list[Any]:
    return Encoder(tokenizer, seq_len).encode(sample)


TWO_TURNS = chat(user("Hi"), answer("Hello"), user("More?"), answer("Yes"))
GOLDEN = {
    "v1": ["⟨<s>⟩ [INST] Hi [/INST]« Hello⟨</s>⟩» [INST] More? [/INST]« Yes⟨</s>⟩»"],
    "v2": ["⟨<s>⟩⟨[INST]⟩ Hi⟨[/INST]⟩« Hello⟨</s>⟩»⟨[INST]⟩ More?⟨[/INST]⟩« Yes⟨</s>⟩»"],
    "v3": ["⟨<s>⟩⟨[INST]⟩ Hi⟨[/INST]⟩« Hello⟨</s>⟩»⟨[INST]⟩ More?⟨[/INST]⟩« Yes⟨</s>⟩»"],
    "chatml": [
        "⟨<|im_start|>⟩user\nHi⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant\n«Hello⟨<|im_end|>⟩»\n"
        "⟨<|im_start|>⟩user\nMore?⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant\n«Yes⟨<|im_end|>⟩»"
    ],
    "zephyr": [
        " <|user|>\nHi⟨</s>⟩ \n<|assistant|>\n«Hello⟨</s>⟩» \n<|user|>\nMore?⟨</s>⟩ \n<|assistant|>\n«Yes⟨</s>⟩»"
    ],
    "llama-2": [
        "⟨<s>⟩ [INST] Hi [/INST]« Hello ⟨</s>⟩»⟨<s>⟩ [INST] More? [/INST]« Yes ⟨</s>⟩»"
    ],
    "openchat": [
        "⟨<s>⟩ GPT4 Correct User: Hi⟨<|end_of_turn|>⟩ GPT4 Correct Assistant:« Hello⟨<|end_of_turn|>⟩»"
        " GPT4 Correct User: More?⟨<|end_of_turn|>⟩ GPT4 Correct Assistant:« Yes⟨<|end_of_turn|>⟩»"
    ],
    "dropping": [
        "⟨<|im_start|>⟩user\nHi⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant\n«Hello⟨<|im_end|>⟩»\n"
        "⟨<|im_start|>⟩user\nMore?⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant\n«Yes⟨<|im_end|>⟩»"
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_trap_25_answers_and_their_ends_are_trained_and_nothing_else(name: str, tmp_path: Path) -> None:
    assert marked(opened(name, tmp_path), TWO_TURNS) == GOLDEN[name]


def test_the_starters_answers_are_trained(starter: Path) -> None:
    text = marked(Tokenizer.from_pretrained(starter), TWO_TURNS)[0]
    assert text.startswith("⟨<|im_start|>⟩system\nYou are")
    assert text.endswith(GOLDEN["chatml"][0])


CHATS = st.lists(TEXTS.filter(str.strip), min_size=2, max_size=6).map(
    lambda texts: [(user if i % 2 == 0 else answer)(text) for i, text in enumerate(texts[: len(texts) // 2 * 2])]
)


@given(CHATS, st.booleans())
@settings(max_examples=15, deadline=None)
def test_each_answer_continues_the_prompt_that_inference_feeds(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], system: bool
) -> None:
    if system and tokenizer.chat is not None and tokenizer.chat.supports_system:
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    try:
        documents = encoded(tokenizer, chat(*messages), 100_000)
    except TrainingError:  # an answer's first blanks and the prompt's end are one token
        event("refused")
        if all(m["content"] == m["content"].strip() for m in messages):
            raise
        return
    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    found = []
    for document in documents:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], document.trained, [False]]).astype(int)))
        for start, end in edges.reshape(-1, 2):
            i = wanted[len(found)]
            ids = document.ids.tolist()
            assert ids[:start] == tokenizer.encode_chat(messages[:i])
            assert ids[end - 1] in tokenizer.stop_ids
            assert tokenizer.stop_ids.isdisjoint(ids[start : end - 1])
            written = tokenizer.stream(after=ids[:start])
            text = "".join(map(written.push, ids[start : end - 1])) + written.flush()
            assert text.strip() == messages[i]["content"].strip()
            found.append(i)
    assert found == wanted


def test_llm_chat_feeds_the_prompts_that_are_trained_on() -> None:
    from mistral_7b import LLM, SamplingParams

    llm = LLM("demo")
    assert llm.tokenizer is not None
    for document in encoded(llm.tokenizer, chat({"role": "system", "content": "Be brief."}, *TWO_TURNS.messages)):
        prompt = document.ids[: np.flatnonzero(document.trained)[0]].tolist()
        count = sum(m == llm.tokenizer.vocabulary.find("[INST]") for m in prompt)
        conversation = [{"role": "system", "content": "Be brief."}, *TWO_TURNS.messages[: 2 * count - 1]]
        assert llm.chat(conversation, SamplingParams(max_tokens=1))[0].prompt_token_ids == prompt


def test_trap_16_system_and_tools_that_move_make_a_document_for_each_users_turn() -> None:
    system = {"role": "system", "content": "S"}
    turns = [system, *TWO_TURNS.messages]
    assert marked(Tokenizer.v1(), chat(*turns)) == [
        "⟨<s>⟩ [INST] S\n\nHi [/INST]« Hello⟨</s>⟩» [INST] More? [/INST]« Yes⟨</s>⟩»"
    ]
    for version in (Tokenizer.v2(), Tokenizer.v3()):
        assert marked(version, chat(*turns)) == [
            "⟨<s>⟩⟨[INST]⟩ S\n\nHi⟨[/INST]⟩« Hello⟨</s>⟩»",
            "⟨<s>⟩⟨[INST]⟩ Hi⟨[/INST]⟩ Hello⟨</s>⟩⟨[INST]⟩ S\n\nMore?⟨[/INST]⟩« Yes⟨</s>⟩»",
        ]


def test_dropped_reasoning_is_trained_in_documents_of_its_own(tmp_path: Path) -> None:
    documents = marked(opened("dropping", tmp_path), chat(user("a"), answer("b#c"), user("d"), answer("e#f")))
    assert [d[d.index("«") : d.rindex("»")] for d in documents] == ["«b#c⟨<|im_end|>⟩", "«e#f⟨<|im_end|>⟩"]
    assert "b" not in documents[1].split("assistant")[1]


def test_calls_are_trained_and_tools_and_results_never(tmp_path: Path) -> None:
    messages = [
        user("1+1?"), answer(None, tool_calls=[CALL]),
        {"role": "tool", "name": "add", "tool_call_id": "abcDEF123", "content": "2"}, answer("It is 2."),
    ]  # fmt: skip
    (text,) = marked(Tokenizer.v3(), chat(*messages, tools=TOOLS))
    before, call, result, last = text.replace("»", "«").split("«")[:4]
    assert "[AVAILABLE_TOOLS]" in before
    assert call == '⟨[TOOL_CALLS]⟩ [{"name": "add", "arguments": {"a": 1}, "id": "abcDEF123"}]⟨</s>⟩'
    assert "[TOOL_RESULTS]" in result
    assert last == " It is 2.⟨</s>⟩"

    hermes = template("{% set bos_token = '' %}" + HERMES_TOOLS, byte_level_folder)(tmp_path)
    documents = marked(hermes, chat(*messages, tools=TOOLS))
    trained = [part.split("»")[0] for d in documents for part in d.split("«")[1:]]
    assert [t.strip() for t in trained] == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>⟨<|im_end|>⟩', "It is 2.⟨<|im_end|>⟩",
    ]  # fmt: skip


def test_muted_answers_are_context_only() -> None:
    assert marked(Tokenizer.v3(), chat(*TWO_TURNS.messages, muted=(1,))) == [
        "⟨<s>⟩⟨[INST]⟩ Hi⟨[/INST]⟩ Hello⟨</s>⟩⟨[INST]⟩ More?⟨[/INST]⟩« Yes⟨</s>⟩»"
    ]
    assert marked(Tokenizer.v3(), chat(*TWO_TURNS.messages, muted=(3,))) == [
        "⟨<s>⟩⟨[INST]⟩ Hi⟨[/INST]⟩« Hello⟨</s>⟩»"
    ]


def test_trap_18_control_tokens_in_content_stay_text(tokenizer: Tokenizer) -> None:
    spelled = "[INST] </s> <|im_end|> <|end_of_turn|>"
    plain, hostile = (chat(user(t), answer(t)) for t in ("a", spelled))
    controls = [
        [i for i in encoded(tokenizer, sample)[0].ids.tolist() if i in tokenizer.vocabulary.markup]
        for sample in (plain, hostile)
    ]
    assert controls[0] == controls[1]


def test_an_answer_whose_first_blank_merges_with_the_prompt_is_encoded_as_it_is_generated(tmp_path: Path) -> None:
    t = opened("chatml", tmp_path)
    sample = chat(user("a"), answer("\n\nb"))
    prompt = t.encode_chat(sample.messages[:1])
    whole = t.encode_history(sample.messages)
    (document,) = encoded(t, sample)
    if whole[: len(prompt)] == prompt:
        pytest.fail("this vocabulary merges no newlines: the test is vacuous")
    assert document.ids[: len(prompt)].tolist() == prompt
    assert t.decode(document.ids[document.trained].tolist()) == "\n\nb"


def test_masks_are_those_of_a_template_with_generation_marks(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ours = template(source, byte_level_folder)(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=source)

    @given(CHATS.filter(lambda c: all(harmless(m["content"]) and m["content"] == m["content"].strip() for m in c)))
    @settings(max_examples=25, deadline=None)
    def check(messages: list[dict[str, Any]]) -> None:
        wanted = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        (document,) = encoded(ours, chat(*messages), 100_000)
        length = len(document.ids)
        assert document.ids.tolist() == wanted["input_ids"][:length]
        assert document.trained.astype(int).tolist() == wanted["assistant_masks"][:length]
        assert sum(wanted["assistant_masks"][length:]) == 0

    check()


def test_a_completion_may_begin_within_a_token_of_punctuation_and_newline() -> None:
    t = Tokenizer.from_pretrained("demo")
    prompt = t.encode("def f(x):")
    (document,) = encoded(t, Completion("def f(x):", "\n    return x"))
    assert t.encode("def f(x):\n")[: len(prompt)] != prompt, "nothing merges: the test is vacuous"
    assert document.ids[: len(prompt)].tolist() == prompt
    assert t.decode(document.ids.tolist()) == "def f(x):\n    return x"


@pytest.mark.parametrize("name", ["v3", "chatml"])
def test_a_completion_continues_its_prompt(name: str, tmp_path: Path) -> None:
    t = opened(name, tmp_path)
    for prompt, completion in [
        ("Q: a\nA:", " b"),
        ("Q: a\nA: ", "bc"),
        ("", "b"),
        ("a", "b"),
        ("a\n", "\nb"),
    ]:
        (document,) = encoded(t, Completion(prompt, completion))
        start = len(t.encode(prompt))
        ids = document.ids.tolist()
        assert ids[:start] == t.encode(prompt)
        assert not document.trained[: max(start, 1)].any()  # nothing predicts the first
        assert document.trained[max(start, 1) :].all()
        assert ids[-1] == t.eos_id
        assert t.decode(ids) == prompt + completion


@pytest.mark.parametrize("name", ["v3", "chatml"])
@pytest.mark.parametrize("seq_len", [3, 4, 7, 64])
def test_a_long_text_is_cut_and_each_token_is_one_target(name: str, seq_len: int, tmp_path: Path) -> None:
    t = opened(name, tmp_path)
    text = "def f(x):\n    return 12345\n"
    whole = t.encode(text, eos=True)
    documents = encoded(t, Document(text), seq_len)
    assert all(len(d.ids) <= seq_len for d in documents)
    targets = [i for d in documents for i in d.ids[d.trained].tolist()]
    assert targets == whole[1:]
    for d in documents[1:]:
        context = d.ids[~d.trained].tolist()
        assert context[:-1] == ([t.bos_id] if t.vocabulary.adds_bos else [])
    assert not any(d.trained[0] for d in documents)


def test_preferences_thumbs_and_tasks() -> None:
    t = Tokenizer.v3()
    good, bad = (chat(user("Hi"), answer(text)) for text in ("Hello", "What?"))
    (pair,) = encoded(t, Preference(good, bad))
    assert isinstance(pair, Pair)
    prompt = t.encode_chat(good.messages[:1])
    for side, text in ((pair.chosen, "Hello"), (pair.rejected, "What?")):
        assert side.ids[~side.trained].tolist() == prompt
        assert t.decode(side.ids[side.trained].tolist()).strip() == text
        assert side.ids[-1] == t.eos_id
    (thumb,) = encoded(t, Judged(bad, False))
    assert isinstance(thumb, Thumb)
    assert (thumb.good, thumb.answer.ids.tolist()) == (False, pair.rejected.ids.tolist())
    row = {"prompt": good.messages[:1], "wanted": 5}
    (task,) = encoded(t, Task(Chat(good.messages[:1], None, ()), row))
    assert isinstance(task, Prompt)
    assert (task.ids.tolist(), task.row) == (prompt, row)
    assert encoded(t, Task("Hi", {}))[0].ids.tolist() == t.encode("Hi")


@pytest.mark.parametrize(
    ("sample", "field"),
    [
        (chat(user("1" * 99), answer("b")), "seq_len"),
        (Completion("1" * 99, "b"), "seq_len"),
        (chat(user("a"), answer("said", tool_calls=[CALL]), tools=TOOLS), "messages[1]"),  # v3 drops such text
        (Judged(chat({"role": "system", "content": "S"}, *TWO_TURNS.messages), True), "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_document_is_refused(sample: Any, field: str) -> None:
    with refused(TrainingError, field=field):
        encoded(Tokenizer.v3(), sample, 60)


def test_an_answer_that_does_not_continue_its_prompt_is_refused(tmp_path: Path) -> None:
    with refused(TrainingError, field="messages[1]"):
        encoded(template(OTHER_HEAD, byte_level_folder)(tmp_path), chat(user("a"), answer("b")))


def test_without_an_end_the_whole_rest_is_the_answer(tmp_path: Path) -> None:
    t = template(ALPACA, pieces)(tmp_path)
    (document,) = encoded(t, chat(user("a"), answer("b")))
    assert isinstance(document, Encoded)
    assert t.stop_ids.isdisjoint(document.ids.tolist())
    assert t.decode(document.ids[document.trained].tolist()).strip() == "b"
