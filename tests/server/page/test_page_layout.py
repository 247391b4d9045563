"""The page's layout on narrow screens, on paper, and with forced colors."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.server.page.browser import Scripted, answer, ask, opened

WIDE = """() => [...document.querySelectorAll("body *")].filter(e =>
    e.getClientRects().length && !e.closest("[hidden], .unseen, .skip") &&
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".code pre, .wide-table, .formula, .file pre")
).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_is_wider_than_a_narrow_screen(browser: Any, scripted: Scripted, width: int) -> None:
    page = opened(browser, scripted.url, viewport={"width": width, "height": 640})
    page.wait_for_selector(".starter")
    assert page.evaluate(WIDE) == []
    assert page.evaluate("document.getElementById('scroll').scrollTop") == 0  # the empty page shows its beginning
    page.set_input_files(
        "#attach-file", {"name": f"{'long-name' * 12}.txt", "mimeType": "text/plain", "buffer": b"x" * 999}
    )
    page.wait_for_selector("#attached li")
    assert page.evaluate(WIDE) == []
    ask(page, "markdown " + "unbroken" * 20)
    ask(page, "formulas")
    page.wait_for_selector(".formula math")
    assert page.evaluate(WIDE) == []
    ask(page, "length")
    assert page.evaluate(WIDE) == []
    page.click("#menu")
    page.click("#export")
    page.click("#formats >> text=Ratings")
    page.wait_for_selector("#export-note:visible")
    assert page.evaluate(WIDE) == []
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.click("#settings")
    assert page.evaluate(WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    scrolled = page.evaluate("(s => s.scrollWidth - s.clientWidth)(document.getElementById('scroll'))")
    assert scrolled <= 0
    page.context.close()


def test_headings_of_answers_rank_below_those_of_the_page(page: Any) -> None:
    ask(page, "formulas")
    page.wait_for_selector(".assistant h3")
    levels = page.eval_on_selector_all("h1, h2, h3, h4, h5, h6", """all => all
        .filter(e => e.checkVisibility()).map(e => [e.tagName, Boolean(e.closest(".assistant"))])""")  # fmt: skip
    assert levels == [["H1", False], ["H3", True]]
    assert page.inner_text("h1") == "formulas"


def test_a_conversation_is_printed_whole_and_alone(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    ask(page, "long")
    ask(page, "length")
    page.emulate_media(media="print", color_scheme="dark")
    hidden = "#sidebar, header, #composer, .foot, .notice button"
    assert page.eval_on_selector_all(hidden, "all => all.some(e => e.checkVisibility())") is False
    assert page.locator("h1").bounding_box()["height"] > 10
    assert answer(page).locator(".notice").inner_text().strip() == "Stopped at the token limit"
    clipped = page.evaluate("""() => [document.body, document.getElementById("scroll")]
        .some(e => getComputedStyle(e).overflowY !== "visible")""")
    assert not clipped
    assert page.evaluate("getComputedStyle(document.querySelector('.assistant .text')).color") == "rgb(36, 33, 29)"
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf())) > 2


def test_forced_colors_keep_what_colors_say(page: Any) -> None:
    ask(page, "tell me")
    page.emulate_media(forced_colors="active")
    assert page.evaluate("matchMedia('(forced-colors: active)').matches")
    style = "e => getComputedStyle(e).textDecorationLine"
    assert page.locator(".tok.t3, .tok.t4, .tok.t5").first.evaluate(style) == "underline"
    assert page.locator(".tok.t0").first.evaluate(style) == "none"
    pressed = page.locator("#tint").evaluate("e => getComputedStyle(e).borderTopWidth")
    page.click("#tint")
    assert page.locator("#tint").evaluate("e => getComputedStyle(e).borderTopWidth") != pressed
    page.click("[aria-label='Good answer']")
    page.focus("#ask")
    outline = "e => getComputedStyle(e).outlineStyle"
    assert page.locator("[aria-label='Good answer']").evaluate(outline) == "solid"
    assert page.locator("[aria-label='Bad answer']").evaluate(outline) == "none"
