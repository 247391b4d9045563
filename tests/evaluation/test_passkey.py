"""The heat map of retrieval: where the number is, what counts as retrieved, and the files it is written to."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
from refusals import refused

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.cli import main
from mistral_7b.errors import EvaluationError
from mistral_7b.evaluation import passkey, passkey_plot, retrieve
from mistral_7b.sampling.logprobs import Score

DEMO = Tokenizer.from_pretrained("demo")


def test_the_number_is_where_the_depth_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def right_if_near(inputs, pairs, advance):
        seen.extend(pairs)
        return [[Score(-0.5, i % 3 != 2)] for i, _ in enumerate(pairs)]

    monkeypatch.setattr(passkey, "score", right_if_near)
    found = retrieve(Mistral7B.from_pretrained("demo"), DEMO, [200, 300], [0.0, 0.5, 1.0], trials=3)
    for (context, key), (length, depth) in zip(
        seen[::3], [(n, d) for n in (200, 300) for d in (0.0, 0.5, 1.0)], strict=True
    ):
        assert len(context) == length
        number = DEMO.decode(key).strip()
        text = DEMO.decode(context)
        assert number.isdecimal()
        assert text.endswith("The pass key is")
        assert text.index(number) / len(text) == pytest.approx(0.2 + 0.6 * depth, abs=0.25)
    assert [c.retrieved for c in found.cells] == [2 / 3] * 6
    assert (found.window, found.reach) == (256, 256 * 6)
    assert found.cells[0].distance > found.cells[1].distance > found.cells[2].distance


def test_what_does_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    model = Mistral7B.from_pretrained("demo")
    with refused(EvaluationError, field="lengths"):
        retrieve(model, DEMO, [20])
    with refused(EvaluationError, field="depths"):
        retrieve(model, DEMO, [200], [1.5])
    assert main(["eval", "passkey", "demo", "-o", "map.txt"]) == 2
    assert (
        main(["eval", "passkey", "no-such-model", "-o", "no/such/folder/map.json"]) == 1
    )  # before the model is read


def test_files(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--lengths", "120", "300", "--depths", "0", "1", "--trials", "1")
    assert main(["eval", "passkey", "demo", *flags, "-o", str(tmp_path / "map.json"), "--json"]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads((tmp_path / "map.json").read_text())
    assert printed == {"model": "demo", **written}
    found = passkey.PasskeyMap(**{**written, "cells": tuple(passkey.Cell(**cell) for cell in written["cells"])})
    assert dict(passkey_plot.borders(found)) == {
        "W = 256 tokens": [None, 1 - 256 / 300], "W x layers = 1,536 tokens": [None, None]
    }  # fmt: skip
    passkey_plot.write(found, tmp_path / "map.html", "a <title>")
    page = (tmp_path / "map.html").read_text()
    assert "a &lt;title&gt;" in page
    assert page.count("class=far") == 1
    pytest.importorskip("matplotlib")
    for one in (found, dataclasses.replace(found, window=None, reach=None)):
        passkey_plot.write(one, tmp_path / "map.png", "title")
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
