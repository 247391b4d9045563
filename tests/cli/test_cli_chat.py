"""`mistral-7b chat` with a model: through pipes, and on a terminal."""

from __future__ import annotations

import json
import pathlib
import signal
import sys
from functools import partial

import pexpect
import pytest
import torch
from command import write_model

from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.pages import PagePool
from mistral_7b.generate import generate
from mistral_7b.kernels.cpu import compiler
from mistral_7b.model import Mistral7B
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.tokenizer import Tokenizer


@pytest.mark.wording
def test_answers_are_those_of_the_chat_template(run, windowed: str) -> None:
    flags = ("--temperature", "0", "--max-tokens", "20", "--system", "be brief")
    code, out, err = run("chat", windowed, *flags, stdin="hello\n/exit\n")
    assert code == 0
    tokenizer = Tokenizer.from_pretrained(windowed)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    ids = tokenizer.encode_chat(messages)
    params = SamplingParams(temperature=0, max_tokens=20)
    wanted = generate(Mistral7B.from_pretrained(windowed), [ids], params, tokenizer)[0].outputs[0].text
    assert out == wanted + "\n"
    assert "cut off after 20 tokens; --max-tokens sets this limit" in err


def test_statistics_of_an_answer(run, windowed: str) -> None:
    flags = ("--temperature", "0", "--max-tokens", "3", "--logit-bias", "2", "-100")
    code, out, err = run("chat", windowed, *flags, "--verbose", stdin="hello\nagain\n")
    assert code == 0
    assert [line.split(" in ")[0].split(", ")[1] for line in err.splitlines() if "tokens/s" in line] == [
        "3 generated",
        "3 generated",
    ]
    assert "tokens/s" not in out
    assert "tokens/s" not in run("chat", windowed, *flags, stdin="hello\n").err


def test_int8_keys_and_values(run, windowed: str, monkeypatch) -> None:
    made: list[object] = []
    plain = PagePool.__init__

    def noted(pool: PagePool, *args: object, **how: object) -> None:
        made.append(how["int8"])
        plain(pool, *args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(PagePool, "__init__", noted)
    for flags in ([], ["--kv", "int8"], ["--kv", "model"]):
        code, out, err = run("chat", windowed, "--max-tokens", "4", *flags, stdin="hello\n")
        assert code == 0, err
        assert out
    assert made == [False, True, False]


@pytest.mark.parametrize("window", [None, 64])
def test_a_turn_computes_its_own_tokens_alone(
    run, tmp_path: pathlib.Path, monkeypatch, window: int | None
) -> None:
    """What was computed of the turns before is found again, up to a page."""
    folder = str(write_model(tmp_path / "model", sliding_window=window, max_seq_len=2048))
    tokenizer, page = Tokenizer.from_pretrained(folder), EngineConfig.page_size
    (hello,) = tokenizer.encode("Hello", bos=False)
    fed: list[int] = []
    plain = Mistral7B.hidden

    def noted(model: Mistral7B, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        fed.append(len(tokens))
        return plain(model, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Mistral7B, "hidden", noted)
    questions = ["some words " * 70, "and then?", "and then again?"]
    flags = ("--max-tokens", "20", "--logit-bias", str(hello), "100", "--dtype", "float32")
    code, out, err = run("chat", folder, *flags, stdin="\n".join(questions))
    assert code == 0, err
    answer = " ".join(["Hello"] * 20)  # whose ids are those that were generated
    assert out == f"{answer}\n" * 3
    read = [n for n in fed if n > 1]
    messages: list[dict[str, str]] = []
    lengths = []
    for question in questions:
        messages.append({"role": "user", "content": question.strip()})
        lengths.append(len(tokenizer.encode_chat(messages)))
        messages.append({"role": "assistant", "content": answer})
    assert lengths[0] > 2 * 64
    assert read[0] == lengths[0]
    for before, now, computed in zip(lengths, lengths[1:], read[1:], strict=False):
        known = before + 19  # the last token of an answer was never fed
        assert now - known <= computed == now - known // page * page < now - known + page


@pytest.mark.wording
def test_a_full_context_loses_nothing(run, short: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "talk.json"
    lines = f"hello\n{'many words ' * 60}\n/save {file}\n"
    code, out, err = run("chat", short, "--max-tokens", "8", "--ignore-eos", stdin=lines)
    assert code == 0
    assert "more than the context of 64: the message is not added" in err
    saved = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant"]
    assert saved[0]["content"] == "hello"
    assert out.strip() == saved[1]["content"]


@pytest.mark.wording
@pytest.mark.parametrize("limit", ["None", "1000"])
def test_an_answer_may_fill_the_context(run, short: str, limit: str) -> None:
    code, _, err = run("chat", short, "--max-tokens", limit, "--ignore-eos", stdin="hello\n")
    assert code == 0
    assert "the context is full: /save FILE, then /reset" in err


def test_goes_on_with_a_saved_conversation(run, windowed: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "talk.json"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(json.dumps({"messages": turns}))
    code, _, _ = run("chat", windowed, "--load", str(file), "--max-tokens", "4", stdin=f"c\n/save {file}\n")
    assert code == 0
    saved = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert saved[:2] == turns
    assert saved[2] == {"role": "user", "content": "c"}


def test_the_bundled_model_says_what_it_is(run, windowed: str, short: str, monkeypatch) -> None:
    monkeypatch.setattr("mistral_7b.checkpoint.hub.DEMO", pathlib.Path(windowed))
    _, _, err = run("chat", "--max-tokens", "4", stdin="one\ntwo\n")
    assert err.count("base model of Python code") == 1
    assert "base model" in run("chat", f"{windowed}/../windowed", stdin="").err
    assert "base model" not in run("chat", short, stdin="").err


@pytest.mark.wording
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "2"], "one answer per message"),
        (["--load", "/nowhere/x.json"], "/nowhere/x.json: No such file"),
        (["--system-file", "/nowhere/x"], "/nowhere/x: No such file"),
        (["--temperature", "-2"], "temperature must be"),
    ],
)
def test_what_is_refused(run, windowed: str, flags: list[str], message: str) -> None:
    code, out, err = run("chat", windowed, *flags)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("plain", [False, True])
def test_on_a_terminal(windowed: str, tmp_path: pathlib.Path, plain: bool) -> None:
    """Ctrl-C stops the answer and not the program, or clears the line at the prompt; Ctrl-D exits."""
    env = {"PATH": "/usr/bin:/bin", "TERM": "xterm", "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "s")}
    env["XDG_CACHE_HOME"] = str(compiler.cache_folder().parent.parent)
    argv = ["-m", "mistral_7b", "chat", windowed, "--max-tokens", "1000000", "--ignore-eos"]
    argv += ["--plain"] if plain else []
    # A suite in a shell's background ignores SIGINT, and its children would inherit that.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with pexpect.spawn(
        sys.executable, argv, env=env, timeout=120, dimensions=(24, 80), encoding="utf-8", preexec_fn=listening
    ) as child:
        child.expect("/help lists the commands")
        child.expect("> ")
        child.sendline("hello")
        child.expect(r"hello\r\n")
        child.expect(r"(\w+\W+){30}")  # the answer is on its way, and would not end by itself
        child.sendintr()
        child.expect(r"\(stopped\)")
        child.expect("> ")
        child.send("half a li")
        child.expect("half a li")
        child.sendintr()
        child.expect(r"\(Ctrl-D or /exit exits\)")
        child.expect("> ")
        child.sendline(f"/save {tmp_path}/talk.json")
        child.expect(r"\(saved to ")
        child.expect("> ")
        child.sendeof()
        child.expect(pexpect.EOF)
    assert (child.exitstatus, child.signalstatus) == (0, None)
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant"]
    history = (tmp_path / "s" / "mistral-7b" / "chat_history").read_text()
    assert "hello\n" in history
    assert (tmp_path / "s" / "mistral-7b" / "chat_history").stat().st_mode & 0o077 == 0
