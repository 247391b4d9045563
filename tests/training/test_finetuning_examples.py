"""examples/finetuning: no leaks in data, validators tell right from wrong, both scripts run on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from finetune_data import write_base

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "finetuning"))
import orders
import questions
import shorten
import teach_format


class Answer(NamedTuple):
    text: str
    token_ids: tuple[int, ...] = (1, 2, 3)
    finish_reason: str = "stop"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


def lines_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(row["messages"][-1]["content"]) for row in rows]


def test_held_out_orders_share_no_value_with_those_trained_on() -> None:
    train, held = orders.orders(orders.TRAIN, 300, 1), orders.orders(orders.HELD_OUT, 60, 2)
    assert train == orders.orders(orders.TRAIN, 300, 1)
    assert train != orders.orders(orders.TRAIN, 300, 2)
    for key in ("item", "count", "city", "buyer"):
        assert not {line[key] for line in lines_of(train)} & {line[key] for line in lines_of(held)}
    assert not set(orders.TRAIN.firsts + orders.TRAIN.lasts) & set(orders.HELD_OUT.firsts + orders.HELD_OUT.lasts)
    assert not set(orders.UNSEEN.sentences) & set(orders.TRAIN.sentences)


@pytest.mark.parametrize("words", [orders.TRAIN, orders.HELD_OUT, orders.UNSEEN])
def test_each_order_holds_what_its_line_says(words: orders.Words) -> None:
    rows = orders.orders(words, 50, 3)
    assert len({row["messages"][0]["content"] for row in rows}) == 50
    for row, line in zip(rows, lines_of(rows), strict=True):
        sentence = row["messages"][0]["content"].removeprefix(orders.PROMPT)
        assert list(line) == list(orders.KEYS)
        assert all(str(line[key]) in sentence for key in ("item", "count", "city", "buyer"))
        assert any(day in sentence and day[:3].lower() == line["day"] for day in orders.DAYS)


def test_scores_tell_the_line_from_the_fields_and_the_fields_from_json() -> None:
    rows = orders.orders(orders.TRAIN, 6, 1)
    right = [row["messages"][-1]["content"] for row in rows]
    wrong = {**json.loads(right[3]), "count": -1}
    texts = [right[0], right[1] + "\n", json.dumps(json.loads(right[2]), indent=1), json.dumps(wrong), "[1]", "{"]
    assert orders.scores(texts, rows) == {"exact": 1 / 6, "fields": 3 / 6, "json": 4 / 6}
    assert orders.scores(right, rows) == {"exact": 1, "fields": 1, "json": 1}


def test_a_pair_is_the_beginning_of_an_answer_and_all_its_whole_sentences() -> None:
    row = questions.pair("Why?", "It keeps the water out of the house. It is cheap. It lasts and")
    assert row is not None
    assert row["chosen"] == "It keeps the water out of the house."
    assert row["rejected"] == "It keeps the water out of the house. It is cheap."
    row = questions.pair("Why?", "Good question! It keeps the water out. It is cheap.")
    assert row is not None
    assert row["chosen"] == "Good question! It keeps the water out."
    assert questions.pair("Why?", "It keeps the water out of the house.") is None
    assert questions.pair("Why?", "It keeps") is None


def test_no_held_out_question_is_trained_on() -> None:
    assert not set(questions.FORMS) & set(questions.HELD_OUT_FORMS)
    assert not set(questions.THINGS) & set(questions.HELD_OUT_THINGS)


def test_figures_of_answers() -> None:
    asked = ["Explain a camera to me.", "Explain a kettle to me."]
    made = [Answer("A camera takes pictures of what it sees."), Answer("It boils", (1,) * 9, "length")]
    assert questions.figures(made, asked) == {"tokens": 6, "cut": 0.5, "whole": 0.5, "on_topic": 0.5}


def test_the_format_is_taught_and_measured(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach_format, "LONGEST", 4)
    record, curve = tmp_path / "record.json", tmp_path / "curve.png"
    teach_format.main(tmp_path, str(base), 2, 1e-2, 8, 3, record, curve)
    made = json.loads(record.read_text())
    assert made["held_out"]["after"]["exact"] == 0
    assert len(made["log"]) == 2
    assert curve.stat().st_size < 60_000


def test_answers_are_shortened_and_measured(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def answers(llm: Any, prompts: list[Any], max_tokens: int, adapter: str | None = None) -> list[Any]:
        asked.append(adapter)
        return [Answer("It is a thing that people use. It is good. It is old.") for _ in prompts]

    monkeypatch.setattr(shorten, "answers", answers)
    monkeypatch.setattr(shorten, "LONGEST", 4)
    record, curve = tmp_path / "record.json", tmp_path / "curve.png"
    shorten.main(tmp_path, str(base), 2, 1e-6, 2, 2, record, curve)
    made = json.loads(record.read_text())
    assert asked == [None, None, "short"]
    assert made["pairs"] == 8
    assert 0 <= made["kl_from_base"] < made["kl_bound"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Rewards of the answers of a pair" in report
    assert ">rejected<" in report
    monkeypatch.setattr(shorten, "KL_BOUND", -1.0)
    with pytest.raises(SystemExit):
        shorten.main(tmp_path, str(base), 2, 1e-6, 2, 2)
