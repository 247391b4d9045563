"""The page in a browser under errors: missing key, full queue, killed server. Also accessibility: axe reports no
serious findings on wide and narrow screens, light and dark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.server.page.browser import Scripted, answer, ask, asked, more, opened, reload
from tests.server.page.scripted import ANSWERS, SENTENCE

AXE = Path(__file__).parent / "axe" / "axe.min.js"


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, scripted: Scripted) -> None:
    scripted.use_key("sesame")
    try:
        page = opened(browser, scripted.url)
        assert "missing API key" in page.wait_for_selector("#key-why").inner_text()
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-why >> text=The key was rejected")
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-dialog", state="hidden")
        ask(page, "hello")
        reload(page)
        ask(page, "hello again")
        assert page.evaluate("sessionStorage.getItem('key')") == "sesame"
        assert "sesame" not in page.evaluate("JSON.stringify({...localStorage})")
        page.evaluate("sessionStorage.setItem('key', 'old')")
        reload(page)
        page.wait_for_selector("#key-why >> text=The key was rejected")
        page.click("text=Not now")
        page.click("#banner >> text=Enter key")
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        page.wait_for_selector("#model >> text=mistral-7b", state="attached")
        page.context.close()
    finally:
        scripted.use_key("")


def test_a_full_queue_is_counted_down_and_tried_again_by_choice(page: Any) -> None:
    page.clock.install()
    ask(page, "full house", wait=False)
    banner = page.wait_for_selector("#banner.full")
    assert re.search(r"no more may\. The queue may have room in [1-3] s\.", banner.inner_text())
    page.clock.run_for(3000)
    page.wait_for_selector("#banner >> text=The queue may have room now")
    assert len(asked(page)[-1]["messages"]) == 1  # no automatic retry
    page.click("#banner >> text=Try now")
    page.wait_for_selector("#banner >> text=/in [1-3] s\\./")
    page.click("#banner >> text=Retry automatically")
    page.wait_for_selector("#banner >> text=Retrying in")
    page.clock.run_for(3000)
    page.wait_for_selector(".assistant[aria-busy=false] .stats:not(:empty)")
    assert answer(page).locator(".text").inner_text() == SENTENCE
    assert page.locator("#banner").is_hidden()
    page.faults.clear()  # the browser logs every 429 to its console


def test_a_server_killed_in_mid_answer_loses_nothing(browser: Any, scripted: Scripted) -> None:
    page = opened(browser, scripted.url)
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=8")
    scripted.kill()
    page.wait_for_selector(".notice.cut >> text=The connection was lost during this answer")
    kept = answer(page).locator(".text").inner_text().rstrip()
    assert ANSWERS["slow"].startswith(kept)
    assert len(kept) > 20
    assert "Reconnecting" in page.inner_text("#banner")
    scripted.start()
    page.wait_for_selector("#banner.found >> text=The server is back.")
    page.click(".notice >> text=Continue")
    more(page, 4)
    page.click("#send")
    page.wait_for_selector(".notice.stopped")
    sent = asked(page)[-1]["messages"][-1]
    assert (sent["content"].rstrip(), sent["prefix"]) == (kept, True)
    assert ANSWERS["slow"].startswith(answer(page).locator(".text").inner_text().rstrip())
    page.context.close()


def test_a_page_closed_in_mid_answer_keeps_what_had_come(browser: Any, scripted: Scripted) -> None:
    page = opened(browser, scripted.url)
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=40")
    reload(page)
    page.wait_for_selector(".notice.cut >> text=The page was closed before the answer was complete")
    assert ANSWERS["slow"].startswith(answer(page).locator(".text").inner_text().rstrip())
    assert page.locator(".tok").count() > 15
    scripted.kill()
    ask(page, "are you there?", wait=False)
    page.wait_for_selector("#banner.lost")
    page.wait_for_selector(".notice.failed >> text=Try again")
    scripted.start()
    page.wait_for_selector("#banner.found")
    page.click(".notice.failed >> text=Try again")
    page.wait_for_function(
        "text => [...document.querySelectorAll('.assistant .text')].at(-1).innerText === text", arg=SENTENCE
    )
    page.context.close()


def test_an_error_in_mid_answer_is_said(page: Any) -> None:
    ask(page, "error", wait=False)
    page.wait_for_selector(".notice.cut >> text=the step failed")
    assert SENTENCE.startswith(answer(page).locator(".text").inner_text())
    page.click(".notice >> text=Start over")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".notice.cut")


def test_a_stream_that_just_ends_was_cut(page: Any) -> None:
    ask(page, "hang up", wait=False)
    page.wait_for_selector(".notice.cut >> text=The connection was lost during this answer")
    page.wait_for_selector("#banner.found")


def serious(page: Any) -> list[str]:
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:160]}: {v['nodes'][0]['failureSummary']}" for v in found
            if v["impact"] in ("serious", "critical")]  # fmt: skip


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing_serious(browser: Any, scripted: Scripted, scheme: str, width: int) -> None:
    page = opened(
        browser, scripted.url, color_scheme=scheme, viewport={"width": width, "height": 844}, bypass_csp=True
    )
    page.evaluate(AXE.read_text(encoding="utf-8"))
    page.evaluate("document.documentElement.append(Object.assign(document.createElement('style'), "
                  "{ textContent: '* { transition: none !important }' }))")  # fmt: skip
    page.wait_for_selector(".starter")
    page.select_option("#model", "base")
    assert serious(page) == []
    page.select_option("#model", "mistral-7b")
    page.set_input_files("#attach-file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text\n" * 99})
    page.wait_for_selector("#attached li")
    assert serious(page) == []
    ask(page, "formulas")
    page.wait_for_selector(".formula math")
    page.click(".user summary")
    ask(page, "length")
    page.set_input_files("#file", {"name": "bad.json", "mimeType": "application/json", "buffer": b"{"})
    page.wait_for_selector("#banner.failed")
    assert serious(page) == []
    ask(page, "markdown")
    page.wait_for_selector(".hljs-keyword")
    page.click(".assistant:last-child [aria-label='Good answer']")
    page.locator(".tok.t2").first.focus()
    page.locator(".tok.t2").first.hover()
    page.wait_for_selector("#alternatives:not([hidden])")
    assert serious(page) == []
    page.mouse.move(5, 5)
    page.click("#settings")
    page.fill("#set-temperature", "-1")
    page.fill("#set-tools", '[{"name": "weather"}]')
    assert serious(page) == []
    page.fill("#set-temperature", "")
    page.keyboard.press("Escape")
    ask(page, "weather", wait=False)
    page.wait_for_selector(".card textarea")
    ask(page, "error", wait=False)
    page.wait_for_selector(".notice.cut")
    if width < 760:
        page.click("#menu")
        page.wait_for_selector("#sidebar")
    assert serious(page) == []
    page.click("#export")
    page.click("#formats >> text=Preferences")
    page.wait_for_selector("#export-note:visible")
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.context.close()
