"""`mistral-7b compare`: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import pathlib

import pytest

from mistral_7b.checkpoint import convert
from mistral_7b.cli import main

SMALL = ("--tokens", "60", "--row", "30")


def test_a_quantized_file_is_noise_and_max_kl_decides(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert("demo", tmp_path / "q8.gguf", "gguf", type="q8_0")
    words = ["compare", "demo", str(tmp_path / "q8.gguf"), *SMALL]
    assert main([*words, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]) == 0
    out = capsys.readouterr().out
    assert "Mean KLD" in out
    assert "verdict: noise" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["verdict"], found["parts_at"]) == ("noise", None)
    assert (tmp_path / "out.png").read_bytes()[1:4] == b"PNG"
    kld = found["figures"]["Mean KLD"]
    assert main([*words, "--max-kl", str(kld * 2)]) == 0
    assert main([*words, "--max-kl", str(kld / 2)]) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "demo", "--tokens", "1"],
        ["demo", "demo", "--row", "1"],
        ["demo", "demo", "--max-kl", "-1"],
        ["demo", "no-such-model"],
        ["demo", "demo+no-such-adapter"],
        ["demo", "demo+"],
        ["llama.cpp:demo", "demo"],
        ["demo", "llama.cpp:demo", "--peer-python", "false", *SMALL],
        ["demo", "demo", "--text", "no-such-file"],
    ],
)
def test_bad_input_is_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mistral-7b: ")
    assert err.count("\n") == 1


def test_an_empty_text_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    assert main(["compare", "demo", "demo", "--text", str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", [("--json", "none/out.json"), ("--plot", "none/out.png"), ("--json", ".")])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    flags: tuple[str, str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["compare", "demo", "demo", *SMALL], ["compare", "no-such-model", "demo"]):
        assert main([*words, *flags]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert flags[1] in err
    assert not list(tmp_path.iterdir())


def test_a_plot_of_an_unknown_kind_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "demo", "demo", *SMALL, "--plot", "out.xyz"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert ".svg" in err
