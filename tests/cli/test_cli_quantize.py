"""`mistral-7b quantize`, and its folders in other commands."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from refusals import refused

from mistral_7b.checkpoint import load, read_record
from mistral_7b.cli.inputs import UsageError
from mistral_7b.cli.quantize import documents, own_source, rows, texts
from mistral_7b.text.tokenizer import Tokenizer

FAST = ("--tokens", "40")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 20)
    return str(path)


@pytest.mark.wording
def test_quantize_inform_and_generate(run, windowed: str, text: str, tmp_path: pathlib.Path) -> None:
    out = str(tmp_path / "int4")
    code, stdout, err = run("quantize", windowed, out, "--scheme", "q4_k_m", "--text", text, *FAST)
    assert (code, stdout) == (0, "")
    for words in (f"written to {out}", "q4_k_m", "40 tokens of", "KL", "perplexity"):
        assert words in " ".join(err.split()), words
    record = read_record(out)
    assert record is not None
    assert record.distance["text"] == text

    shown = run("info", out).out
    for words in ("quantized", "q4_k_m", "none: rounded to nearest", "40 tokens", "KL"):
        assert words in shown, words
    facts = json.loads(run("info", out, "--json").out)
    assert (facts["format"], facts["weights_bytes"]) == ("quantized", record.nbytes)
    assert facts["quantization"] == record.config()

    words = ("--prompt", "def f(", "--max-tokens", "5", "--temperature", "0", "--json", "--device", "cpu")
    made = json.loads(run("generate", out, *words).out)
    assert len(made["outputs"][0]["token_ids"]) == 5
    code, _, err = run("generate", out, *words, "--quantization", "int8")
    assert code == 2
    assert "already quantized as q4_k_m" in err


def test_quantize_while_loading_is_the_same_model(run, windowed: str, text: str, tmp_path: pathlib.Path) -> None:
    out = str(tmp_path / "int8")
    assert run("quantize", windowed, out, "--scheme", "int8", "--text", text, *FAST).code == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            load(out).state_dict().values(), load(windowed, quantization="int8").state_dict().values(), strict=True
        )
    )
    words = ("--prompt", "x", "--max-tokens", "6", "--temperature", "0", "--json", "--device", "cpu")
    first = json.loads(run("generate", out, *words).out)["outputs"]
    assert first == json.loads(run("generate", windowed, *words, "--quantization", "int8").out)["outputs"]


def test_calibrated_it_says_so(run, windowed: str, text: str, tmp_path: pathlib.Path) -> None:
    out, guide = str(tmp_path / "int4"), tmp_path / "guide.jsonl"
    guide.write_text("".join(json.dumps({"text": f"line {i} of those to read", "id": i}) + "\n" for i in range(9)))
    words = ("--text", text, *FAST, "--calibrate", "--calibration-text", str(guide), "--calibration-tokens", "40")
    code, _, err = run("quantize", windowed, out, *words)
    assert code == 0
    assert f"calibrated on 40 tokens of {guide}" in " ".join(err.split())
    record = read_record(out)
    assert record is not None
    assert record.calibration == {"method": "feedback", "tokens": 40, "text": str(guide)}
    monospaced = "".join(run("info", out).out.split())
    assert "method:feedback,tokens:40" in monospaced
    assert json.loads(run("info", out, "--json").out)["quantization"]["calibration"] == record.calibration


def test_without_a_text_it_is_calibrated_on_the_topics_of_help(
    run, windowed: str, text: str, tmp_path: pathlib.Path
) -> None:
    out = str(tmp_path / "int4")
    assert (
        run("quantize", windowed, out, "--text", text, *FAST, "--calibrate", "--calibration-tokens", "40").code
        == 0
    )
    record = read_record(out)
    assert record is not None
    assert record.calibration is not None
    assert record.calibration["text"].startswith("pydoc_data.topics of Python")


@pytest.mark.wording
def test_an_interrupted_run_says_so_and_the_same_command_continues(
    run, windowed: str, text: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, *more: object) -> None:
        raise KeyboardInterrupt

    words = ("quantize", windowed, str(tmp_path / "int4"), "--text", text, *FAST)
    with monkeypatch.context() as patch:
        patch.setattr("mistral_7b.checkpoint.quantizing._Stream._head", interrupted)
        code, _, err = run(*words)
    assert code == 130
    assert err.strip() == "interrupted: the same command continues after the last complete layer"
    code, _, err = run(*words)
    assert code == 0
    assert "of an interrupted run" in err


@pytest.mark.wording
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "{tmp}/out", "--scheme", "int3"], "int3"),
        (["{model}", "{tmp}/out", "--tokens", "1"], "at least 2"),
        (["{model}", "{tmp}/out", "--threads", "0"], "at least 1"),
        (["{model}", "{tmp}/out", "--text", "{tmp}/none"], "none"),
        (["{model}", "{tmp}/out", "--text", "/dev/null"], "is empty"),
        (["{model}", "{tmp}/out", "--calibrate", "--calibration-text", "{tmp}/none"], "none"),
        (
            ["{model}", "{tmp}/out", "--calibrate", "--calibration-text", "/dev/null"],
            "/dev/null: the text to calibrate on is empty",
        ),
        (["{model}", "{tmp}/out", "--calibration-text", "x"], "--calibration-text: only with --calibrate"),
        (["{model}", "{tmp}/out", "--calibration-tokens", "1"], "--calibration-tokens must be at least 2"),
        (["{model}", "{tmp}"], "exists already"),
        (["/nowhere", "{tmp}/out"], "/nowhere"),
    ],
)
def test_quantize_refuses(run, windowed: str, tmp_path: pathlib.Path, words: list[str], message: str) -> None:
    (tmp_path / "kept").write_text("x")
    code, out, err = run("quantize", *(w.format(model=windowed, tmp=tmp_path) for w in words))
    assert (code, out) == (2, "")
    assert message in err
    assert [f.name for f in tmp_path.iterdir()] == ["kept"]


def test_a_text_becomes_rows_that_each_begin_anew() -> None:
    tokenizer = Tokenizer.v3()
    name, text = own_source()
    ids = tokenizer.encode(text, bos=False)
    assert "mistral_7b" in name
    assert len(ids) > 4096  # enough for the default
    made = rows(tokenizer, text, 4096, 512)
    assert made.shape == (8, 512)
    assert (made[:, 0] == tokenizer.bos_id).all()
    assert made[:, 1:].flatten().tolist() == ids[: 8 * 511]
    assert rows(tokenizer, "a few words", 4096, 512).tolist() == [tokenizer.encode("a few words")]


def test_a_file_to_calibrate_on_is_a_text_or_lines_of_json() -> None:
    lines = [json.dumps({"text": "one\u2028two"}, ensure_ascii=False), "", json.dumps({"text": "three"})]
    assert texts("f", "\n".join(lines)) == ["one\u2028two", "three"]
    for plain in ("{\n}", '["text"]', '{"text": 3}\nx', "x\n" + lines[0]):
        assert texts("f", plain) == [plain]
    with refused(UsageError, place="f, line 3"):
        texts("f", f"{lines[0]}\n\n{lines[2]}x")
    for empty in ("", " \n", '{"text": ""}\n{"text": " "}'):
        with refused(UsageError, place="f"):
            texts("f", empty)


def test_texts_become_rows_that_each_begin_anew_and_do_not_mix() -> None:
    tokenizer = Tokenizer.v3()
    ids = [tokenizer.encode(t, bos=False) for t in ("one two three four five six", "and another")]
    assert len(ids[0]) == 6
    made = documents(tokenizer, ["one two three four five six", "and another"], 100, 5)
    assert made == [[1, *ids[0][:4]], [1, *ids[0][4:]], [1, *ids[1]]]
    assert documents(tokenizer, ["one two three four five six"], 6, 5) == made[:1]  # a row of <s> alone is dropped
    text = " ".join(str(n) for n in range(1000))
    whole, sample = (documents(tokenizer, [text], most, 50) for most in (10**6, 200))
    assert [whole.index(row) for row in sample] == [0, 20, 40, 60]
