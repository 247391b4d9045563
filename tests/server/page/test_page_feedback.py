"""Answers that are rated, corrected or continued in the page become training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mistral_7b import Tokenizer
from mistral_7b.training.examples import read_data
from tests.server.page.browser import answer, ask, reload
from tests.server.page.scripted import ANSWERS, SENTENCE

Row = dict[str, Any]


def said(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def rate(page: Any, which: str, at: int = -1) -> None:
    page.locator(f".assistant >> nth={at}").locator(f"[aria-label='{which} answer']").click()


def pressed(page: Any) -> list[str]:
    """The labels of the pressed ratings on the screen."""
    return page.eval_on_selector_all(".foot [aria-pressed=true]", "all => all.map(e => e.ariaLabel)")


def correct(page: Any, text: str) -> None:
    answer(page).locator("[aria-label=Edit]").click()
    page.fill(".editor textarea", text)
    page.press(".editor textarea", "Control+Enter")
    page.wait_for_selector(f".assistant >> text={text}")


def export(page: Any, kind: str, current: bool = False) -> str:
    """The text of an exported file: of the current conversation, or of all."""
    if current:
        page.hover("#conversations .current")
    page.click("#conversations .current [aria-label^=Export]" if current else "#export")
    with page.expect_download() as download:
        page.click(f"#formats >> text={kind}")
    page.wait_for_selector("#export-dialog", state="hidden")
    return download.value.path().read_text(encoding="utf-8")


def rows(text: str) -> list[Row]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_ratings_are_kept_carried_away_and_exported(page: Any, tmp_path: Path) -> None:
    ask(page, "first")
    ask(page, "emoji")
    rate(page, "Good", 0)
    rate(page, "Good")
    rate(page, "Bad")
    reload(page)
    assert pressed(page) == ["Good answer", "Bad answer"]
    first = [said("user", "first")]
    assert rows(export(page, "Ratings")) == [
        {"prompt": first, "completion": [said("assistant", SENTENCE)], "label": True},
        {
            "prompt": [*first, said("assistant", SENTENCE), said("user", "emoji")],
            "completion": [said("assistant", ANSWERS["emoji"])],
            "label": False,
        },
    ]
    file = tmp_path / "all.json"
    file.write_text(export(page, "Conversations"), encoding="utf-8")
    page.set_input_files("#file", file)
    page.wait_for_selector("#conversations [data-id] >> nth=1")
    assert pressed(page) == ["Good answer", "Bad answer"]
    page.focus(".assistant [aria-label='Good answer']")
    page.keyboard.press("Space")
    assert pressed(page) == ["Bad answer"]
    assert page.evaluate("document.activeElement.ariaLabel") == "Good answer"  # the focus stays
    ratings = rows(export(page, "Ratings", current=True))
    assert [row["label"] for row in ratings] == [False]
    assert len(rows(export(page, "Ratings"))) == 2  # of both conversations, without repetitions


def test_a_continued_answer_loses_its_rating(page: Any) -> None:
    ask(page, "length")
    rate(page, "Bad")
    page.click(".notice >> text=Continue")
    page.wait_for_selector(".assistant[aria-busy=false]")
    assert pressed(page) == []


def test_an_answer_is_rated_while_another_streams(page: Any) -> None:
    ask(page, "first")
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=25")
    rate(page, "Good", 0)
    assert page.locator(".assistant[aria-busy=true]").count() == 1
    assert pressed(page) == ["Good answer"]
    page.keyboard.press("Escape")
    page.wait_for_selector(".notice.stopped")
    reload(page)
    assert pressed(page) == ["Good answer"]


def test_a_rating_in_one_tab_is_shown_in_the_other(page: Any) -> None:
    ask(page, "first")
    other = page.context.new_page()
    other.goto(page.url)
    rate(other, "Good")
    page.wait_for_selector(".foot [aria-pressed=true]", state="attached")


def test_a_correction_is_preferred_to_what_it_corrects(page: Any) -> None:
    page.click("#settings")
    page.fill("#set-system", "Be brief.")
    page.fill("#set-tools", '[{"name": "weather"}]')
    page.keyboard.press("Escape")
    ask(page, "first")
    correct(page, "It slides.")
    correct(page, "It slides on.")
    tools = [{"type": "function", "function": {"name": "weather"}}]
    prompt = [said("system", "Be brief."), said("user", "first")]
    chosen = [said("assistant", "It slides on.")]
    expected = [
        {"prompt": prompt, "tools": tools, "chosen": chosen, "rejected": [said("assistant", text)]}
        for text in (SENTENCE, "It slides.")
    ]
    assert rows(export(page, "Preferences")) == expected
    page.set_input_files(
        "#file",
        {"name": "x.json", "mimeType": "application/json", "buffer": export(page, "Conversations").encode()},
    )
    page.wait_for_selector("#conversations [data-id] >> nth=1")
    imported = rows(export(page, "Preferences", current=True))
    assert imported == expected


def test_a_corrected_text_keeps_its_tool_calls(page: Any) -> None:
    call = {"id": "abcdefghi", "name": "weather", "arguments": "{}"}
    asked = {"id": "a", "parent": None, "role": "user", "content": "weather?", "created": 1}
    told = {"id": "b", "parent": "a", "role": "assistant", "content": "I look.", "calls": [call], "state": "done"}
    conversation = {"title": "t", "chosen": {}, "created": 1, "settings": {}, "messages": [asked, told]}
    file = {"format": "mistral-7b conversations", "version": 1, "conversations": [conversation]}
    page.set_input_files(
        "#file", {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(file).encode()}
    )
    page.wait_for_selector(".card")
    correct(page, "I ask.")
    [row] = rows(export(page, "Preferences"))
    assert [row[side][0]["content"] for side in ("chosen", "rejected")] == ["I ask.", "I look."]
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    assert row["chosen"][0]["tool_calls"] == row["rejected"][0]["tool_calls"] == calls


# Each case: versions of one answer as [text, fields, continued], and the expected pairs of chosen and rejected.
CASES: dict[str, tuple[list[list[Any]], list[tuple[str, str]]]] = {
    "continued": ([["a", {}, False], ["b", {}, True]], [("b", "a")]),
    "rated good, though another was continued": ([["a", {"good": True}, False], ["b", {}, True]], [("a", "b")]),
    "rated bad, though continued": ([["a", {"good": False}, True], ["b", {}, False]], []),
    "no sign": ([["a", {}, False], ["b", {}, False]], []),
    "two continued": ([["a", {}, True], ["b", {}, True], ["c", {}, False]], [("a", "c"), ("b", "c")]),
    "equal": ([["a", {}, False], ["a", {}, True], ["b", {}, False]], [("a", "b")]),
    "incomplete": ([["a", {}, True], ["b", {"state": "cut"}, False], ["c", {"state": "length"}, False]], []),
    "incomplete and bad": ([["a", {}, True], ["b", {"state": "stopped", "good": False}, False]], [("a", "b")]),
    "incomplete and good": ([["a", {}, False], ["b", {"state": "length", "good": True}, False]], []),
    "blank": ([["a", {}, True], [" ", {}, False]], []),
    "a good answer corrected": ([["a", {"good": True}, True], ["b", {"corrects": 0}, False]], [("b", "a")]),
    "a bad correction": ([["a", {}, True], ["b", {"corrects": 0, "good": False}, False]], [("a", "b")]),
}
PAIRS = """async versions => {
    const { Tree } = await import("/web/tree.js");
    const { preferences } = await import("/web/feedback.js");
    const tree = new Tree({ id: "c", title: "t", created: 1, updated: 1, chosen: {}, settings: {} });
    const user = tree.add(null, { role: "user", content: "q" }).id;
    const ids = [];
    for (const [content, fields, continued] of versions) {
        const corrects = ids[fields.corrects];
        const { id } = tree.add(user, { role: "assistant", content, state: "done", ...fields, corrects });
        if (continued) tree.add(id, { role: "user", content: "next" });
        ids.push(id);
    }
    return preferences(tree).map(row => [row.chosen[0].content, row.rejected[0].content]);
}"""


def test_which_version_is_preferred(page: Any) -> None:
    for name, (versions, pairs) in CASES.items():
        assert [tuple(pair) for pair in page.evaluate(PAIRS, versions)] == pairs, name


def test_nothing_to_export_is_told(page: Any) -> None:
    ask(page, "first")
    page.set_viewport_size({"width": 320, "height": 480})
    page.click("#menu")
    page.click("#export")
    for kind, reason in (("Ratings", "has a thumb up"), ("Preferences", "with several versions")):
        page.click(f"#formats >> text={kind}")
        page.wait_for_selector(f"#export-note >> text={reason}")
        shown = page.locator("#export-note").bounding_box()
        assert shown["y"] + shown["height"] <= 480
    page.keyboard.press("Escape")
    page.wait_for_selector("#export-dialog", state="hidden")
    assert page.evaluate("document.activeElement.id") == "export"


def test_tools_that_cannot_be_read_are_told(page: Any) -> None:
    ask(page, "first")
    rate(page, "Good")
    page.click("#settings")
    page.fill("#set-tools", "[{")
    page.click("#export")
    page.click("#formats >> text=Ratings")
    assert "The tools of “first” are invalid: Invalid JSON" in page.locator("#export-note").inner_text()


def test_training_reads_what_the_page_exports(page: Any, tmp_path: Path) -> None:
    page.click("#settings")
    page.fill("#set-system", "Be brief.")
    page.fill("#set-tools", '[{"name": "weather", "parameters": {"type": "object"}}]')
    page.keyboard.press("Escape")
    ask(page, "weather?", wait=False)
    page.fill(".card textarea", "sunny")
    rate(page, "Good")
    page.click("text=Send result")
    page.wait_for_selector(".assistant >> nth=1 >> text=It is sunny.")
    page.wait_for_selector(".assistant:last-child[aria-busy=false] .stats:not(:empty)")
    rate(page, "Bad")
    correct(page, "The sun shines.")
    tokenizer = Tokenizer.v3()
    for method, kind, count in (("kto", "Ratings", 2), ("dpo", "Preferences", 1)):
        file = tmp_path / f"{method}.jsonl"
        file.write_text(export(page, kind), encoding="utf-8")
        assert len(read_data([str(file)], tokenizer, method, 512).items) == count
