"""What a new user meets first: mistyped flags and paths, closed streams, full disks, leftovers."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import warnings

import pytest
from command import interrupt, start
from full_disk import below

from mistral_7b import files
from mistral_7b.cli import main
from mistral_7b.cli.flags import UsageError, read_flags, sentence
from mistral_7b.training import TrainArgs

SAMPLED = ("--max-tokens", "8", "--temperature", "0")


@pytest.mark.wording
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate --temprature 1", "there is no flag --temprature; did you mean --temperature?; "),
        ("generate demo a b", "there is one argument too many: b; "),
        ("generate --temperature abc", "--temperature: 'abc' is not a number; "),
        ("generate --max-tokens 1.5", "--max-tokens: '1.5' is not a whole number; "),
        ("generate --dtype fp4", "--dtype must be bfloat16, float16 or float32, not 'fp4'; "),
        (
            "generate --quantization fp4",
            "--quantization must be bf16, fp8, int4, int8, none, q4_k_m or q6_k, not 'fp4'; ",
        ),
        ("generate --max-tokens", "--max-tokens needs a value; "),
        ("convert", "IN, OUT and --to are missing; "),
        ("quantize demo", "OUT is missing; "),
        ("quantize --schem=int4", "an argument is missing; "),
        ("convert a b --too x", "there is no flag --too, and --to is missing; "),
    ],
)
def test_a_flag_error_is_one_sentence(run, monkeypatch, words: str, message: str) -> None:
    for columns in ("40", "120"):  # the parser wraps its own messages to the terminal
        monkeypatch.setenv("COLUMNS", columns)
        code, out, err = run(*words.split())
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"mistral-7b: {message}`mistral-7b {words.split()[0]} --help`")


@pytest.mark.parametrize("word", ["none", "None"])
def test_none_is_no_value(word: str) -> None:
    assert read_flags(TrainArgs, "train", ["--init", word, "--sliding-window", word]).sliding_window is None
    with pytest.raises(UsageError):
        read_flags(TrainArgs, "train", ["--steps", word])


def test_a_second_argument_is_the_prompt(run, windowed: str, tmp_path: pathlib.Path) -> None:
    flagged = run("generate", windowed, "--prompt", "import os", *SAMPLED)
    assert flagged.code == 0
    assert run("generate", windowed, "import os", *SAMPLED).out == flagged.out
    (tmp_path / "empty.txt").touch()
    for more in (("--prompt", "b"), ("--prompt-file", str(tmp_path / "empty.txt"))):
        assert run("generate", windowed, "a", *more).code == 2
    assert run("generate", "demo", "--prompt-file", str(tmp_path / "empty.txt")).code == 2


def test_run_answers_one_message_as_chat_does(run, windowed: str) -> None:
    piped = run("chat", windowed, *SAMPLED, stdin="Hello\n")
    assert piped.code == 0
    assert piped.out.strip()
    answered = run("run", windowed, "Hello", *SAMPLED)
    assert (answered.code, answered.out) == (0, piped.out)
    assert "was cut off after" in answered.err
    assert run("chat", windowed, "Hello", *SAMPLED).out == piped.out
    assert run("run", windowed, *SAMPLED, stdin="Hello\n").out == piped.out
    continued = run("generate", "demo", "import os", *SAMPLED)
    assert run("run", "demo", "import os", *SAMPLED).out == continued.out


def test_help_of_a_command(run) -> None:
    code, out, _ = run("help", "info")
    assert code == 0
    assert out == run("info", "--help").out
    assert run("help").out == run("--help").out
    assert run("help", "inf").code == 2


@pytest.mark.wording
def test_commands_of_other_programs_have_a_hint(run) -> None:
    code, _, err = run("list")
    assert code == 2
    assert "hf cache ls" in err


NOWHERE = ("info nowhere", "generate nowhere a", "chat nowhere", "convert nowhere out --to mistral",
           "quantize nowhere out", "serve nowhere", "generate demo a --tokenizer nowhere",
           "generate demo a --adapter nowhere")  # fmt: skip
TRIES = f"""
import sys
from mistral_7b.cli import main
codes = [main(words.split()) for words in {NOWHERE!r}]
print(codes, [name in sys.modules for name in ("torch", "huggingface_hub", "numpy")])
"""


def test_a_wrong_path_is_refused_before_pytorch_is_imported(tmp_path: pathlib.Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRIES], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"{[2] * len(NOWHERE)} {[False] * 3}\n"
    assert done.stderr.count("\n") == len(NOWHERE)
    assert all("nowhere: no such file or folder" in line for line in done.stderr.splitlines())
    assert below(tmp_path) == {}


def test_the_engine_imports_no_compiler_of_pytorch() -> None:
    code = "import sys, mistral_7b; mistral_7b.LLM; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_warning_is_one_line_without_its_place(run, monkeypatch) -> None:
    monkeypatch.setattr("mistral_7b.cli.info.run", lambda argv: warnings.warn("no compiler", stacklevel=1) or 0)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("info") == (0, "", "mistral-7b: no compiler\n")
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("closed", "words", "code"), [(0, "--version", 0), (1, "--version", 0), (2, "info nowhere", 2)]
)
def test_closed_streams(closed: int, words: str, code: int) -> None:
    command = [sys.executable, "-m", "mistral_7b", *words.split()]
    done = subprocess.run(command, preexec_fn=lambda: os.close(closed), capture_output=True, check=False)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert done.stderr == b"" or closed == 2


def test_a_box_of_the_parser_is_read_in_unicode_and_color_too() -> None:
    box = "╭─ \x1b[1mValue error\x1b[0m ─╮\n│ Error parsing --seed: invalid literal for │\n"
    box += "│ int() with base 10: 'x' │\n"
    assert sentence(box + "│ ───────── │\n│ Argument helptext: │\n╰────╯\n") == "--seed: 'x' is not a whole number"


def test_input_that_is_not_utf8_is_refused_in_any_locale(windowed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mistral_7b", "generate", windowed], input=b"a\xff\n", capture_output=True,
        check=False, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"standard input is not UTF-8 text" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_full_disk_is_said_in_megabytes(run, windowed: str, tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 20_000}))
    for words in (("convert", windowed, "--to", "gguf"), ("quantize", windowed, "--tokens", "9")):
        code, _, err = run(words[0], words[1], str(tmp_path / "out"), *words[2:])
        assert code == 1
        assert "MB are needed and 0.0 MB are free" in err
        assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_runs_are_removed_and_those_of_running_ones_kept(tmp_path: pathlib.Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("out", "other"):
        (tmp_path / f".{name}.partial-{ended.pid}-0123abcd").mkdir()
        (tmp_path / f".{name}.partial-{ended.pid}-0123abcd" / "weights").touch()
    (tmp_path / f".out.partial-{ended.pid}-4567abcd").touch()
    running = files.partial_name(tmp_path / "out")
    running.touch()
    kept = {running.name, f".other.partial-{ended.pid}-0123abcd", "out"}
    with files.atomic_write(tmp_path / "out") as temporary:
        temporary.touch()
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_training_says_where_it_resumes(
    tmp_path: pathlib.Path, monkeypatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    (tmp_path / "a.txt").write_text("some text " * 200)
    flags = {
        "--data": tmp_path / "a.txt", "--out": tmp_path / "run", "--steps": 9, "--warmup": 1, "--rows": 1,
        "--seq-len": 16, "--dim": 16, "--n-layers": 1, "--hidden-dim": 16, "--head-dim": 8, "--n-heads": 2,
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]

    def stop(self: object, record: dict[str, float]) -> None:
        if record["step"] == 3:
            interrupt(number)

    monkeypatch.setattr("mistral_7b.training.trainer.ProgressLine.__call__", stop)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train", *words]) == 128 + number
    said = capsys.readouterr().err
    assert f"update 3 of 9 is saved in {tmp_path / 'run' / 'state.pt'}" in said
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert main(["train", *words]) == 0
    assert "update 9/9" in capsys.readouterr().err


def test_a_reader_that_closes_stderr_is_no_traceback() -> None:
    process = start("generate", "--no-such-flag")
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=60) == 2
