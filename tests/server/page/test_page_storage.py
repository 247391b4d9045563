"""A full storage and bad imports: told in words, with a way out."""

from __future__ import annotations

import json
from typing import Any

from tests.server.page.browser import answer, ask, asked, reload
from tests.server.page.scripted import SENTENCE

FULL = """() => { window.put = IDBObjectStore.prototype.put;
    IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); }; }"""
ROOM = "() => { IDBObjectStore.prototype.put = window.put; }"


def test_a_full_storage_is_told_and_the_answer_comes_nevertheless(page: Any) -> None:
    ask(page, "first")
    page.evaluate(FULL)
    ask(page, "second")
    assert answer(page).locator(".text").inner_text() == SENTENCE
    banner = page.wait_for_selector("#banner.storage")
    assert "storage for this page is full" in banner.inner_text()
    with page.expect_download() as download:
        page.click("#banner >> text=Export all")
    saved = json.loads(download.value.path().read_text(encoding="utf-8"))["conversations"]
    assert [m["content"] for m in saved[0]["messages"]] == ["first", SENTENCE, "second", SENTENCE]  # unsaved, too
    page.set_viewport_size({"width": 390, "height": 800})
    page.click("#banner >> text=Choose what to delete")
    page.wait_for_selector("#conversations [aria-label^=Delete]:visible")
    page.keyboard.press("Escape")
    page.evaluate(ROOM)
    ask(page, "third")
    page.wait_for_selector("#banner", state="hidden")
    reload(page)
    assert page.locator(".user").count() == 3  # the later save stored the messages in between


def test_renaming_and_importing_into_a_full_storage_are_told(page: Any) -> None:
    ask(page, "first")
    page.evaluate(FULL)
    page.hover("#conversations [data-id]")
    page.click("#conversations [aria-label^=Rename]")
    page.fill(".rename", "Another title")
    page.press(".rename", "Enter")
    page.wait_for_selector("#banner.storage")
    page.click("#banner >> text=Dismiss")
    one = {"title": "x", "chosen": {}, "created": 1, "messages": [], "settings": {}}
    content = {"format": "mistral-7b conversations", "version": 1, "conversations": [one]}
    page.set_input_files(
        "#file", {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(content).encode()}
    )
    page.wait_for_selector("#banner.storage")
    page.hover("#conversations [data-id]")
    page.click("#conversations [aria-label^=Delete]")
    page.click("#confirm-yes")
    page.wait_for_selector("#banner", state="hidden")  # deleting makes room


def test_settings_that_cannot_be_stored_are_told(page: Any) -> None:
    page.evaluate("""() => { window.setItem = Storage.prototype.setItem;
        Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); }; }""")
    page.click("#settings")
    page.fill("#set-temperature", "0.5")
    assert "storage for settings is full" in page.wait_for_selector("#banner.settings").inner_text()
    page.keyboard.press("Escape")
    ask(page, "still")
    assert asked(page)[-1]["temperature"] == 0.5
    page.click("#settings")
    page.fill("#set-temperature", "0.6")
    page.evaluate("() => { Storage.prototype.setItem = window.setItem; }")
    page.click("#banner >> text=Delete stored settings")
    page.wait_for_selector("#banner", state="hidden")
    assert page.evaluate("localStorage.length") == 0


def test_a_bad_import_offers_another_file_and_success_clears_it(page: Any) -> None:
    page.set_input_files("#file", {"name": "bad.json", "mimeType": "application/json", "buffer": b"{"})
    banner = page.wait_for_selector("#banner.failed")
    assert "bad.json was not imported: the file is not valid JSON." in banner.inner_text()
    with page.expect_file_chooser() as chooser:
        page.click("#banner >> text=Choose another file")
    one = {"title": "x", "chosen": {}, "created": 1, "messages": [], "settings": {}}
    content = {"format": "mistral-7b conversations", "version": 1, "conversations": [one]}
    chooser.value.set_files(
        {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(content).encode()}
    )
    page.wait_for_selector("#conversations [data-id]")
    page.wait_for_selector("#banner", state="hidden")


def test_an_error_is_cleared_by_the_next_success(page: Any) -> None:
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=3")
    page.click("#new")
    ask(page, "full house", wait=False)
    page.wait_for_selector("#banner.full")
    page.click("#conversations [data-id] >> text=slow")
    page.wait_for_selector(".assistant[aria-busy=false] .stats:not(:empty)")  # the queue had room for this answer
    page.wait_for_selector("#banner", state="hidden")
    page.set_input_files("#attach-file", {"name": "a.bin", "mimeType": "text/plain", "buffer": b"\0"})
    page.wait_for_selector("#banner.failed")
    page.set_input_files("#attach-file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"})
    page.wait_for_selector("#banner", state="hidden")
    page.faults.clear()  # the browser logs the 429 to its console
