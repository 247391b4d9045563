"""Files of data: the forms that are recognised, what is bad about a line, and what no data may be."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from template_shapes import ALPACA
from tokenizer_files import byte_level_folder

from mistral_7b.errors import TokenizerError, TrainingError
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.training.encoding import Pair, Prompt, Thumb
from mistral_7b.training.examples import SHOWN, read_data
from mistral_7b.training.forms import form_of

V3 = Tokenizer.v3()
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "What?"}
CHAT = {"messages": [USER, ANSWER]}
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "add", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def written(path: Path, *rows: Any) -> str:
    """A file of JSON lines; a text is a line as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def read(path: Path, *rows: Any, method: str = "lora", **options: Any) -> Any:
    return read_data([written(path / "a.jsonl", *rows)], V3, method, 256, **options)


def texts(data: Any) -> list[tuple[str, str]]:
    """What is not trained of each item, and what is."""
    return [
        tuple(V3.decode(item.ids[mask].tolist()) for mask in (~item.trained, item.trained)) for item in data.items
    ]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"text": "Some text"}, "", "Some text"),
        ({"text": "Some text", "id": 7}, "", "Some text"),
        (CHAT, "Hi", "Hello"),
        ({"messages": [{"role": "developer", "content": "S"}, USER, ANSWER], "tools": None}, "S\n\nHi", "Hello"),
        ({"messages": [USER, {**OTHER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}, "Hi What? Hi", "Hello"),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": "Hello"}]}]}, "Hi", "Hello"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "Hi", "Hello"),
        ({"system": "S", "conversations": [{"from": "user", "value": "Hi"}, {"from": "bot", "value": "Hello"}]},
         "S\n\nHi", "Hello"),
        ({"instruction": "Say it", "input": "Hi", "output": "Hello"}, "Say it\n\nHi", "Hello"),
        ({"instruction": "Say it", "input": "", "output": "Hello", "text": "Below is..."}, "Say it", "Hello"),
        ({"prompt": "Hi", "completion": " Hello"}, "Hi", "Hello"),
        ({"prompt": [USER], "completion": [ANSWER]}, "Hi", "Hello"),
        ({"prompt": [USER, OTHER, USER], "completion": "Hello"}, "Hi What? Hi", "Hello"),
    ],
)  # fmt: skip
def test_forms_are_recognised_by_their_keys(tmp_path: Path, row: Any, prompt: str, answer: str) -> None:
    ((before, trained),) = texts(read(tmp_path, row))
    assert (before.strip(), trained.strip()) == (prompt, answer)


def test_functions_of_sharegpt_are_tool_calls(tmp_path: Path) -> None:
    turns = [
        ("human", "1+1?"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "2"),
        ("gpt", "It is 2."),
    ]  # fmt: skip
    tools = json.dumps([TOOL["function"]])
    row = {"conversations": [{"from": who, "value": said} for who, said in turns], "tools": tools}
    (item,) = read(tmp_path, row).items
    text = V3.decode(item.ids[item.trained].tolist())
    assert '[{"name": "add", "arguments": {"a": 1}' in text
    assert text.endswith("It is 2.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "Hi", "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "score_chosen": 5},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": "Hello", "rejected": "What?"},
        {"prompt": [USER], "chosen": ANSWER, "rejected": OTHER},
    ],
)
def test_preferences(tmp_path: Path, row: Any) -> None:
    (pair,) = read(tmp_path, row, method="dpo").items
    assert isinstance(pair, Pair)
    prompt = V3.encode_chat([USER])
    for side, text in ((pair.chosen, "Hello"), (pair.rejected, "What?")):
        assert side.ids[~side.trained].tolist() == prompt
        assert V3.decode(side.ids[side.trained].tolist()).strip() == text


def test_preferences_of_texts_are_completions(tmp_path: Path) -> None:
    (pair,) = read(tmp_path, {"prompt": "Hi", "chosen": " a", "rejected": " b"}, method="dpo").items
    assert pair.chosen.ids.tolist() == V3.encode("Hi a", eos=True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [OTHER], "label": False},
        {"messages": [USER, OTHER], "label": False},
        {"messages": [USER, ANSWER, USER, OTHER], "label": False},
    ],
)
def test_thumbs_judge_the_last_answer(tmp_path: Path, row: Any) -> None:
    (thumb,) = read(tmp_path, row, method="kto").items
    assert isinstance(thumb, Thumb)
    assert not thumb.good
    assert V3.decode(thumb.answer.ids[thumb.answer.trained].tolist()).strip() == "What?"


def test_prompts_keep_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "completion": "5", "promt": 1}, {"prompt": "1+1=", "answer": 2}]
    data = read(tmp_path, *rows, method="grpo")
    assert all(isinstance(item, Prompt) for item in data.items)
    assert [item.row for item in data.items] == rows
    assert [item.ids.tolist() for item in data.items] == [V3.encode_chat([USER]), V3.encode("1+1=")]


BAD = {
    "no JSON": '{"messages": [',
    "NaN": '{"text": NaN}',
    "infinity": '{"text": "a", "x": -Infinity}',
    "half a character": '{"text": "a\\ud800"}',
    "nested": '{"text": ' + "[" * 100_000,
    "a list": "[1]",
    "a number": "5",
    "no form": {"question": "a"},
    "misspelt": {"mesages": [USER, ANSWER]},
    "misspelt option": {"messages": [USER, ANSWER], "tool": []},
    "misspelt field": {"messages": [{"role": "user", "contents": "Hi"}, ANSWER]},
    "type": {"messages": "Hi"},
    "type of a message": {"messages": ["Hi", ANSWER]},
    "type of content": {"messages": [{"role": "user", "content": 5}, ANSWER]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
    "role": {"messages": [{"role": "human", "content": "Hi"}, ANSWER]},
    "no content": {"messages": [{"role": "user"}, ANSWER]},
    "empty": {"messages": [USER, {"role": "assistant", "content": " \n"}]},
    "empty parts": {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]},
    "no answer": {"messages": [USER]},
    "nothing said": {"messages": []},
    "unanswered": {"messages": [USER, ANSWER, USER]},
    "two answers": {"messages": [USER, ANSWER, OTHER]},
    "first": {"messages": [ANSWER]},
    "order": {"messages": [USER, {"role": "system", "content": "S"}, ANSWER]},
    "all muted": {"messages": [USER, {**ANSWER, "weight": 0}]},
    "weight": {"messages": [USER, {**ANSWER, "weight": 0.5}]},
    "weight of a user": {"messages": [{**USER, "weight": 0}, ANSWER]},
    "prefix": {"messages": [USER, {**ANSWER, "prefix": True}]},
    "arguments": {"messages": [USER, {"role": "assistant", "tool_calls": [
        {**CALL, "function": {"name": "add", "arguments": "{"}}]}]},
    "call without a function": {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
    "result of no call": {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]},
                                       {"role": "tool", "tool_call_id": "other", "content": "2"}, ANSWER]},
    "tools": {"messages": [USER, ANSWER], "tools": [{"function": {}}]},
    "long": {"messages": [{"role": "user", "content": "1" * 300}, ANSWER]},
    "writer": {"conversations": [{"from": "robot", "value": "Hi"}]},
    "turn": {"conversations": [{"from": "human", "valu": "Hi"}]},
    "output": {"instruction": "a", "output": ""},
    "completion": {"prompt": "a", "completion": ""},
    "text": {"text": ["a"]},
    "blank": {"text": "  "},
    "of another method": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "thumb": {**CHAT, "label": False},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_found_and_can_be_left_out(tmp_path: Path, name: str) -> None:
    good = BAD[name] if isinstance(BAD[name], dict) and name not in ("of another method",) else {}
    like = next((row for key, row in GOOD.items() if key in good), CHAT)
    with refused(TrainingError, field="data"):
        read(tmp_path, like, "", BAD[name])
    data = read(tmp_path, like, "", BAD[name], skip_bad=True)
    (source,) = data.report
    assert (source.rows, [line.place for line in source.bad]) == (1, [f"{tmp_path / 'a.jsonl'}:3"])


GOOD = {
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "instruction": {"instruction": "a", "output": "b"},
    "completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": [ANSWER]}),
        ("dpo", {"chosen": [ANSWER], "rejected": [OTHER]}),
        ("dpo", {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "Ho"}, ANSWER]}),
        ("dpo", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]}),
        ("dpo", CHAT),
        ("kto", {**CHAT, "label": 1}),
        ("kto", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("grpo", {"prompt": [USER, ANSWER]}),
        ("grpo", {"prompt": ""}),
        ("grpo", CHAT),
    ],
)
def test_bad_preferences_thumbs_and_prompts(tmp_path: Path, method: str, row: Any) -> None:
    with refused(TrainingError, field="data"):
        read(tmp_path, row, method=method)


@pytest.mark.wording
def test_reasons_say_where_and_why(tmp_path: Path) -> None:
    rows = [BAD[name] for name in ("no JSON", "misspelt", "empty", "long", "weight", "thumb")]
    with pytest.raises(TrainingError) as caught:
        read(tmp_path, CHAT, *rows, {"text": "a"})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("7 lines of the data cannot be used")
    place = tmp_path / "a.jsonl"
    reasons = [
        "is not JSON: Expecting value (column 15)", "'messages'?", "messages[1], of role 'assistant', is empty",
        "has 306 tokens, and seq_len is 256", "messages[1].weight must be 0 or 1, not 0.5", "--method kto",
        "is of the form text, and the lines before it are chat",
    ]  # fmt: skip
    for n, reason in enumerate(reasons):
        assert lines[n + 1].startswith(f"  {place}:{n + 2}: ")
        assert reason in lines[n + 1]
    assert "--skip-bad" in lines[-1]


@pytest.mark.wording
def test_lines_with_one_reason_are_listed_together(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        read(tmp_path, CHAT, *[{"text": "b"}] * 9, BAD["empty"], {"text": "b"})
    lines = str(caught.value).splitlines()
    place = tmp_path / "a.jsonl"
    assert lines[1].startswith(f"  {place}:2, 3, 4, 5, 6 and 5 more: is of the form text")
    assert lines[2].startswith(f"  {place}:11: messages[1]")
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([CHAT, *[{"text": "b"}] * 3]))
    with pytest.raises(TrainingError) as caught:
        read_data([str(listed)], V3, "lora", 256)
    assert str(caught.value).splitlines()[1].startswith(f"  {listed}: item 2, 3 and 4: is of the form text")
    with pytest.raises(TrainingError) as caught:
        read(tmp_path, CHAT, *[{**CHAT, f"no{n}": 1, "messages": [{"role": f"r{n}"}]} for n in range(SHOWN + 3)])
    assert str(caught.value).splitlines()[SHOWN + 1] == "  and 3 lines more"


@pytest.mark.parametrize("weight", ["1e9", "0", "-1", "inf", "nan", "x"])
def test_an_absurd_weight_is_refused(tmp_path: Path, weight: str) -> None:
    path = written(tmp_path / "a.jsonl", CHAT)
    with refused(TrainingError, field="data"):
        read_data([f"{path}:{weight}"], V3, "full", 64)


def test_sources_are_weighted_and_counted(tmp_path: Path) -> None:
    colon = written(tmp_path / "a:2.jsonl", CHAT, CHAT)
    listed = tmp_path / "b.json"
    listed.write_text("\ufeff\n" + json.dumps([{"text": "some text " * 100}], indent=1), encoding="utf-8")
    plain = tmp_path / "c.txt"
    plain.write_text('{"text": 1}', encoding="utf-8")
    data = read_data([colon, f"{listed}:0.5", f"{plain}:3"], V3, "full", 64)
    assert data.weights == (1.0, 0.5, 3.0)
    assert [source.rows for source in data.report] == [2, 1, 1]
    assert np.bincount(data.source_of).tolist() == [source.items for source in data.report]
    assert data.report[1].items > 3
    assert V3.decode(data.items[-1].ids.tolist()) == '{"text": 1}'
    for k, source in enumerate(data.report):
        items = [item for item, of in zip(data.items, data.source_of, strict=True) if of == k]
        assert source.tokens == sum(len(item.ids) for item in items)
        assert source.trained == sum(item.trained.sum() for item in items)


@pytest.mark.parametrize(
    "named",
    [
        "none.jsonl",
        "none.jsonl:2",
        "a.jsonl:0",
        "a.jsonl:x",
        "a.jsonl:nan",
        "empty.jsonl",
        "p.jsonl",
        "",
        "bad.txt",
        "wide.jsonl",
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", CHAT)
    written(tmp_path / "empty.jsonl", "", " ")
    (tmp_path / "p.jsonl").write_bytes(b"PAR1\0\0PAR1")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "wide.jsonl").write_text((tmp_path / "a.jsonl").read_text(), encoding="utf-16")
    with refused(TrainingError, field="data") as caught:
        read_data([named], V3, "lora", 64, skip_bad=True)
    assert ("UTF-16" in caught.value.message) == (named in ("bad.txt", "wide.jsonl"))
    assert not caught.value.message.startswith("is a folder")


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    with refused(TrainingError, field="data", place=tmp_path / "a.jsonl"):
        read(tmp_path, "{", skip_bad=True)
    with refused(TrainingError, field="data"):
        read_data([], V3, "lora", 64)


def test_trap_25_answers_without_a_trained_end_are_refused(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model")
    (folder / "t.jinja").write_text(ALPACA, encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(folder, folder / "t.jinja")
    chats, text = written(tmp_path / "a.jsonl", CHAT), written(tmp_path / "b.jsonl", {"text": "a"})
    for sources in ([chats], [chats, text]):
        with refused(TrainingError, field="chat_template"):
            read_data(sources, tokenizer, "lora", 64)
    assert read_data([text], tokenizer, "lora", 64).items


def test_a_chat_for_a_model_without_a_template_is_refused_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_level_folder(tmp_path / "model"))
    for method, row in [
        ("lora", CHAT), ("dpo", {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}),
        ("kto", {**CHAT, "label": True}), ("grpo", {"prompt": [USER]}),
    ]:  # fmt: skip
        with refused(TokenizerError, field="messages", place=tmp_path / "model"):
            read_data([written(tmp_path / "a.jsonl", row)], tokenizer, method, 64, skip_bad=True)


def test_a_reward_may_have_keys_of_every_name() -> None:
    form_of({"prompt": "a", "chosen": 1, "rejected": 2, "tool": 3}, "grpo").check_keys({"prompt": "a", "tool": 3})


def test_the_snippet_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    snippet = page.split("```python\n")[1].split("```")[0]
    shown = page.split("<!-- output -->\n```\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "docs/data.md", "exec"), {})
    assert out.getvalue() == shown
