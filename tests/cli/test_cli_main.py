"""The whole command: help, exit codes, error messages, Ctrl-C, a closed stdout."""

from __future__ import annotations

import io
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
from command import start
from waiting import soon

import mistral_7b
from mistral_7b import cli, errors


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_is_fast_and_imports_no_torch(command: str) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "mistral_7b", *command.split(), "--help"]

    def children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    # CPU time: the machine may be busy. On an idle one it is below 0.3 s.
    done = soon(0.6, lambda: subprocess.run(argv, capture_output=True, text=True, check=True), clock=children)
    assert "usage: mistral-7b" in done.stdout
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "mistral_7b.cli" in modules
    assert not modules & {"torch", "numpy", "mistral_common", "huggingface_hub", "rich.console"}


def test_version(run) -> None:
    assert run("--version") == (0, f"mistral-7b {mistral_7b.__version__}\n", "")


def test_help_names_every_command(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


def test_without_a_command_the_help_is_an_error(run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "usage:" in err


def test_unknown_command_suggests_the_near_one(run) -> None:
    code, _, err = run("genrate")
    assert code == 2
    assert "did you mean 'generate'" in err


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_unknown_flag(run, command: str) -> None:
    words = {
        "convert": ["a", "b", "--to", "mistral"],
        "quantize": ["a", "b"],
        "merge": ["a", "b", "c"],
        "compare": ["a", "b"],
        "pull": ["a/b"],
    }.get(command, [])
    code, out, err = run(command, *words, "--no-such-flag")
    assert (code, out) == (2, "")
    assert "--no-such-flag" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.ConfigError("dim must be 1"), 2, "mistral-7b: dim must be 1\n"),
        (errors.HubError("gated"), 1, "mistral-7b: gated\n"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 2, "mistral-7b: x.json: No such file"),
        (OSError(28, "No space left on device", "out"), 1, "mistral-7b: out: No space left"),
        (MemoryError("1 GB"), 1, "out of memory"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_is_one_message(run, monkeypatch, error: Exception, code: int, text: str) -> None:
    def broken(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("mistral_7b.cli.info.run", broken)
    result = run("info")
    assert result.code == code
    assert text in result.err
    assert "Traceback" not in result.err
    monkeypatch.setenv("MISTRAL_7B_DEBUG", "1")
    with pytest.raises(type(error)):
        run("info")


def test_a_character_that_the_output_lacks_is_replaced(monkeypatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr("mistral_7b.cli.info.run", lambda argv: print("a \N{SNOWMAN}") or 0)
    assert cli.main(["info"]) == 0
    assert written.getvalue() == b"a ?\n"


def test_ctrl_c_ends_with_what_was_produced(windowed: str) -> None:
    process = start("generate", windowed, "--prompt", "def f", "--max-tokens", "10000000", "--ignore-eos")
    assert process.stdout is not None
    begun = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert len(begun) == 10
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert err == b""


def test_a_reader_that_leaves_is_no_error(windowed: str) -> None:
    process = start("generate", windowed, "--prompt", "def f", "--max-tokens", "10000000", "--ignore-eos")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""


def test_a_reader_that_leaves_before_a_table_is_no_error() -> None:
    process = start("verify", "demo")  # printed by rich, which has an exit code of its own
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""


def test_installed_command_and_module_are_the_same(tmp_path: pathlib.Path) -> None:
    script = pathlib.Path(sys.executable).with_name("mistral-7b")
    if not script.exists():
        pytest.skip("the package is on the path but not installed")
    both = [
        subprocess.run([*command, "--help"], capture_output=True, check=True, cwd=tmp_path, env=dict(os.environ))
        for command in ([str(script)], [sys.executable, "-m", "mistral_7b"])
    ]
    assert both[0].stdout == both[1].stdout
