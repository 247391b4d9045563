"""The dialogue without a model: messages, commands, files, state after Ctrl-C and errors."""

from __future__ import annotations

import io
import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator

import pyte
import pytest
from command import interrupt
from rich.console import Console

from mistral_7b.cli.conversation import Conversation
from mistral_7b.cli.render import as_markdown, as_python, live_text, uninterrupted
from mistral_7b.cli.repl import Answer, Message, Repl, read_message, state_file
from mistral_7b.errors import GenerationError

Talk = Callable[..., tuple[str, str]]


def echo(messages: list[Message]) -> Iterator[str]:
    """Echoes the question, one word at a time."""
    for word in f"heard {messages[-1]['content']}".split(" "):
        yield word + " "


@pytest.fixture
def talk(monkeypatch, capsys) -> Talk:
    """Enter lines in a dialogue; return stdout and stderr."""

    def call(*lines: str, answer: Answer = echo, conversation: Conversation | None = None) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        Repl(answer, Conversation() if conversation is None else conversation).loop()
        return capsys.readouterr()

    return call


def test_turns_enter_the_conversation(talk: Talk) -> None:
    conversation = Conversation("be brief")
    out, _ = talk("one", "", "two", "/exit", "three", conversation=conversation)
    assert out == "heard one \nheard two \n"
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("system", "be brief"),
        ("user", "one"), ("assistant", "heard one"),
        ("user", "two"), ("assistant", "heard two"),
    ]  # fmt: skip


def test_the_model_sees_all_of_it(talk: Talk) -> None:
    seen: list[list[str]] = []

    def answer(messages: list[Message]) -> Iterator[str]:
        seen.append([m["content"] for m in messages])
        yield "ok"

    talk("one", "/system be kind", "two", "/reset", "three", "/system -", "four", answer=answer)
    assert seen == [["one"], ["be kind", "one", "ok", "two"], ["be kind", "three"], ["three", "ok", "four"]]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["plain"], "plain"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""', "  a", "", "b", '"""'], "   a\n\nb"),
        (['"""a', 'b"""'], " a\nb"),
        (['"""a"""'], " a"),
        (['"""', "/reset", '"""'], " /reset"),
        (["cut off\\"], "cut off\n"),
        (['"""', "cut off"], " cut off"),
    ],
)
def test_messages_of_several_lines(monkeypatch, typed: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    assert read_message() == message
    with pytest.raises(EOFError):
        read_message()


@pytest.mark.wording
def test_commands_are_not_messages(talk: Talk) -> None:
    out, err = talk("/help", "/nope", "/system", " /usr is a folder")
    assert out == "heard /usr is a folder \n"
    assert "/save FILE" in err
    assert "there is no command /nope" in err
    assert "system: (none)" in err


def test_save_and_load(talk: Talk, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "talk.json"
    talk("/system s", "grüße", f"/save {file}")
    assert [m["content"] for m in json.loads(file.read_text(encoding="utf-8"))["messages"]] == [
        "s", "grüße", "heard grüße",
    ]  # fmt: skip
    conversation = Conversation()
    talk("gone", f"/load {file}", "more", f"/save {file}", conversation=conversation)
    assert [m["content"] for m in conversation.messages] == ["s", "grüße", "heard grüße", "more", "heard more"]
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == conversation.messages
    assert [f.name for f in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.wording
def test_save_writes_over_conversations_only(talk: Talk, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    _, err = talk("hello", f"/save {file}", "/save", f"/save {tmp_path / 'no' / 'folder'}", f"/save {tmp_path}")
    assert file.read_text() == "years of work"
    assert "not overwritten" in err
    assert "needs a file name" in err
    assert "No such file" in err
    assert "Is a directory" in err
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.wording
def test_a_save_that_fails_leaves_the_old_file(talk: Talk, tmp_path: pathlib.Path, monkeypatch) -> None:
    file = tmp_path / "talk.json"
    talk("one", f"/save {file}")
    before = file.read_text()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    _, err = talk("two", f"/save {file}")
    assert "No space left" in err
    assert file.read_text() == before
    assert [f.name for f in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.wording
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("3", 'it has no list of "messages"'),
        ('[{"role": "user"}]', "message 1 is not"),
        ('[{"role": "user", "content": "x"}]', "has no answer"),
        ('[{"role": "assistant", "content": "x"}]', "turn 1 has role 'assistant', not 'user'"),
    ],
)
def test_a_file_that_cannot_be_loaded_changes_nothing(
    talk: Talk, tmp_path: pathlib.Path, text: str, message: str
) -> None:
    (tmp_path / "x.json").write_text(text)
    conversation = Conversation()
    _, err = talk("one", f"/load {tmp_path / 'x.json'}", conversation=conversation)
    assert message in err
    assert len(conversation.turns) == 2


def test_ctrl_c_stops_the_answer_and_keeps_it(talk: Talk) -> None:
    def answer(messages: list[Message]) -> Iterator[str]:
        if messages[-1]["content"] != "nothing":
            yield "half an "
        if messages[-1]["content"] != "go on":
            raise KeyboardInterrupt

    conversation = Conversation()
    out, err = talk("one", "nothing", "go on", answer=answer, conversation=conversation)
    assert out == "half an \n\nhalf an \n"
    assert "(stopped)" in err
    assert "(stopped before the first token; the message is not added)" in err
    assert [m["content"] for m in conversation.messages] == ["one", "half an", "go on", "half an"]


@pytest.mark.wording
def test_an_error_is_told_and_the_dialogue_goes_on(talk: Talk) -> None:
    def answer(messages: list[Message]) -> Iterator[str]:
        if messages[-1]["content"] == "late":
            yield "some"
        raise GenerationError("no room")

    conversation = Conversation()
    _, err = talk("early", "late", answer=answer, conversation=conversation)
    assert err.count("no room") == 2
    assert [m["content"] for m in conversation.messages] == ["late", "some"]


def test_an_empty_answer_is_not_kept(talk: Talk) -> None:
    conversation = Conversation()
    _, err = talk("one", answer=lambda messages: iter(["", " \n"]), conversation=conversation)
    assert "empty answer" in err
    assert conversation.messages == []


def test_state_lies_where_xdg_says(monkeypatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_file("x") == tmp_path / "mistral-7b" / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("", "not/absolute"):  # the specification requires ignoring these
        monkeypatch.setenv("XDG_STATE_HOME", relative)
        assert state_file("x") == tmp_path / ".local" / "state" / "mistral-7b" / "x"


LONG = (
    "# Title\n\nA *word*.\n\n"
    + "".join(f"- item {i} **bold**\n" for i in range(40))
    + "\n```python\nx = 1\n```\nend"
)


def drawn(text: str, render: Callable[[str], object], pieces: int) -> list[str]:
    """Return the screen and scrollback of a 12-line terminal to which text is streamed."""
    screen = pyte.HistoryScreen(60, 12, history=1000, ratio=0.5)
    screen.set_mode(pyte.modes.LNM)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, height=12, legacy_windows=False)
    size = max(1, -(-len(text) // pieces))
    with live_text(console, render) as live:  # type: ignore[arg-type]
        for start in range(0, len(text), size):
            live._due = 0.0  # draw every time
            live.push(text[start : start + size])
    pyte.Stream(screen).feed(file.getvalue())
    lines = ["".join(row[x].data for x in range(60)) for row in screen.history.top] + screen.display
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize(("text", "render"), [(LONG, as_markdown), (LONG, as_python), ("", as_markdown)])
def test_growing_text_ends_as_if_printed_at_once(text: str, render: Callable[[str], object]) -> None:
    whole = drawn(text, render, pieces=1)
    assert drawn(text, render, pieces=97) == whole
    if render is as_markdown and text:
        assert whole[1:4] == ["A word.", " • item 0 bold", " • item 1 bold"]
        assert whole[-1] == "end"


def test_ctrl_c_waits_for_what_must_not_be_cut() -> None:
    steps = []

    def drawing() -> None:
        with uninterrupted():
            interrupt(signal.SIGINT)
            steps.append("whole")
        steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        drawing()
    assert steps == ["whole"]
