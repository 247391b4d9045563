"""Two tabs of one browser show the same data and do not overwrite each other's."""

from __future__ import annotations

from typing import Any

from tests.server.page.browser import answer, ask, more, ready, reload

KEPT = """id => new Promise(done => {
    indexedDB.open("mistral-7b").onsuccess = ({ target }) => {
        const all = target.result.transaction("messages").objectStore("messages").getAll();
        all.onsuccess = () => { target.result.close(); done(all.result.map(m => m.content).sort()); };
    };
})"""


def beside(page: Any) -> Any:
    """Open the same conversation in another tab."""
    other = page.context.new_page()
    other.on("pageerror", lambda error: page.faults.append(str(error)))
    other.goto(page.url)
    ready(other)
    return other


def click(page: Any, selector: str) -> None:
    """Click in a tab after bringing it to the front: clicks in background tabs take seconds."""
    page.bring_to_front()
    page.click(selector)


def test_what_one_tab_writes_the_other_shows_and_can_stop(page: Any) -> None:
    ask(page, "first")
    other = beside(page)
    ask(page, "slow", wait=False)
    other.wait_for_selector(".assistant[aria-busy=true] .tok >> nth=5")
    more(other, 5)
    assert other.get_attribute("#send", "aria-label") == "Stop"
    other.click("#send")
    for tab in (page, other):
        tab.wait_for_selector(".notice.stopped >> text=Continue")
    assert answer(other).locator(".text").inner_text() == answer(page).locator(".text").inner_text()
    ask(other, "of the other tab")
    page.wait_for_selector(".user >> text=of the other tab")
    other.click("#new")
    ask(other, "emoji")
    page.wait_for_selector("#conversations >> text=emoji")
    assert page.locator(".user").count() == 3  # a new conversation in another tab does not replace this one


def test_both_tabs_branch_and_all_versions_are_kept(page: Any) -> None:
    ask(page, "first")
    ask(page, "second")
    other = beside(page)
    ask(page, "mine")
    other.wait_for_selector(".user >> text=mine")
    other.click(".assistant >> nth=0 >> [aria-label='Regenerate']")
    other.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".siblings >> text=1 / 2")
    assert page.locator(".user .text").all_inner_texts() == ["first", "second", "mine"]  # branch unchanged
    ask(other, "of the other tab")
    ask(page, "mine again")
    for tab, last in ((page, "mine again"), (other, "of the other tab")):
        assert tab.locator(".user .text").last.inner_text() == last
    users = [text for text in page.evaluate(KEPT) if len(text) < 40]
    assert users == ["first", "mine", "mine again", "of the other tab", "second"]


def test_a_conversation_deleted_in_one_tab_is_gone_in_both(page: Any) -> None:
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=5")
    other = beside(page)
    other.wait_for_selector(".assistant .tok")
    other.hover("#conversations [data-id]")
    other.click("#conversations [aria-label^=Delete]")
    other.click("#confirm-yes")
    page.wait_for_selector("#banner >> text=deleted in another tab")
    page.wait_for_selector("#empty")
    assert page.locator("#conversations [data-id]").count() == 0
    reload(page)
    assert page.evaluate(KEPT) == []  # the last save of the answer did not restore it


def test_an_answer_whose_tab_is_closed_was_cut(page: Any) -> None:
    page.context.clock.install()
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=5")
    other = beside(page)
    other.wait_for_selector(".assistant[aria-busy=true] .tok >> nth=5")
    page.close()
    other.clock.run_for(2000)  # the QUIET of tabs.js
    other.wait_for_selector(".notice.cut >> text=The page was closed before the answer was complete")
    ask(other, "and now")


def test_settings_and_titles_follow(page: Any) -> None:
    ask(page, "first")
    other = beside(page)
    click(page, "#settings")
    page.fill("#set-temperature", "0.5")
    page.hover("#conversations [data-id]")
    page.click("#conversations [aria-label^=Rename]")
    page.fill(".rename", "A better title")
    page.press(".rename", "Enter")
    other.wait_for_selector("#conversations >> text=A better title")
    click(other, "#settings")
    assert other.input_value("#set-temperature") == "0.5"
