"""Shared models, and the command as a function that returns its output."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from command import write_model

from mistral_7b.cli import main


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a window of 8, which can generate text without limit."""
    return str(write_model(tmp_path_factory.mktemp("models") / "windowed", sliding_window=8))


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a window and with a context of 64 tokens."""
    folder = tmp_path_factory.mktemp("models") / "short"
    return str(write_model(folder, sliding_window=None, rope_theta=1e6, max_seq_len=64))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a suite in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`run("generate", ..., stdin="...")`: the command in this process."""

    def call(*argv: str, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main(list(argv))
        return Result(code, *capsys.readouterr())

    return call
