"""`mistral-7b bench --quality`: end to end with a calibrated folder, and errors."""

from __future__ import annotations

import hashlib
import json
import pathlib

import pytest

from mistral_7b.bench.quality.run import integer_schemes
from mistral_7b.cli.bench import Bench
from mistral_7b.cli.bench_quality import QualityOptions, plan_of
from mistral_7b.text.default_text import default_text

TEXT = "The quick brown fox jumps over the lazy dog. " * 30


def test_schemes_and_a_calibrated_folder_end_to_end(run, windowed: str, tmp_path: pathlib.Path) -> None:
    text, folder, path = tmp_path / "text.txt", tmp_path / "calibrated", tmp_path / "r.json"
    text.write_text(TEXT)
    calibration = ("--calibrate", "--calibration-text", str(text), "--calibration-tokens", "40")
    assert run("quantize", windowed, str(folder), "--scheme", "int8", *calibration, "--tokens", "20").code == 0
    flags = ("--scheme", "int8", str(folder), "--text", str(text), "--rows", "5", "--threads", "1")
    code, out, err = run("bench", windowed, "--quality", *flags, "--json", str(path))
    assert code == 0, err
    records = json.loads(path.read_text())
    assert [(r["scheme"], r["file"]) for r in records] == [("int8", None), ("int8", "calibrated")]
    calibrated = {"method": "feedback", "tokens": 40, "text": "text.txt"}
    assert [r["calibration"] for r in records] == [None, calibrated]
    for r in records:
        assert (r["model"], r["what"], r["text"]) == ("windowed", "quality", "text.txt")
        assert r["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
        assert (r["rows"], r["row_tokens"], r["tokens"], r["threads"]) == (5, 8, 35, 1)
        assert r["command"].startswith(
            "mistral-7b bench windowed --quality --scheme int8 calibrated --text text.txt"
        )
        assert str(tmp_path) not in json.dumps(r)
        assert {"cpu", "date", "commit", "versions"} <= set(r)
        assert f"{r['kl']:.5f}" in out
    assert records[0]["kl"] != records[1]["kl"]
    assert "| mistral_7b | int8, calibrated (calibrated) |" in out
    assert "feedback on 40 tokens of text.txt" in out


def test_flags_become_a_plan(windowed: str) -> None:
    options = QualityOptions(quality=True, rows=7)
    plan = plan_of(Bench(windowed, scheme=("int8", "int8", windowed), peers=True, fidelity=options), ["--quality"])
    assert plan.schemes == ("int8", pathlib.Path(windowed))
    assert (plan.text_name, plan.text) == default_text()
    assert (plan.model, plan.source, plan.rows, plan.peers) == ("windowed", windowed, 7, True)
    assert plan_of(Bench("demo", fidelity=options), []).schemes == integer_schemes()


@pytest.mark.usefixtures("starter")
def test_the_starter_model_is_measured_where_none_is_named() -> None:
    assert plan_of(Bench(fidelity=QualityOptions(quality=True)), []).model == "starter"


@pytest.mark.wording
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "2"], "--rows: only with --quality"),
        (["--quality", "--serving"], "--quality and --serving exclude each other"),
        (["--quality", "--what", "load", "--plot", "a.png"], "--what, --plot: not with --quality"),
        (["--quality", "--shape", "tiny"], "--shape: not with --quality"),
        (["--quality", "--rows", "0"], "--rows must be at least 1, not 0"),
        (["demo", "--quality", "--scheme", "int3"], "--scheme int3: with --quality it is an integer scheme (int8"),
        (["demo", "--quality", "--scheme", "fp8"], "--scheme fp8: with --quality it is an integer scheme"),
        (["demo", "--quality", "--rows", "9999"], "fewer than 9999 rows of 256; use a longer text"),
        (["demo", "--quality", "--scheme", "{short}"], "it is not the same model"),
        (["demo", "--quality", "--text", "/nowhere/a.txt"], "/nowhere/a.txt: No such file"),
        (["demo", "--quality", "--json", "/nowhere/r.json"], "there is no folder /nowhere"),
        (["demo", "--quality", "--peers", "--peer-python", "false"], "has no llama_cpp; pip install"),
        (["demo", "--quality", "--peers", "--peer-python", "/no/python"], "/no/python cannot be run"),
        (["/nowhere", "--quality"], "/nowhere"),
    ],
)
def test_what_is_refused(run, short: str, words: list[str], message: str) -> None:
    code, out, err = run("bench", *(w.format(short=short) for w in words))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
