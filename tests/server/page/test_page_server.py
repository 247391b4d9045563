"""The page against the real server: its requests and responses are compatible."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.page.browser import answer, ask, opened


def test_page_and_server_agree(browser: Any, server: Any) -> None:
    page = opened(browser, server.url)
    page.wait_for_selector("#model optgroup option >> text=sql", state="attached")
    page.click("#settings")
    page.select_option("#set-shown", "plain")
    for name, value in {"temperature": "0.9", "top_p": "0.95", "top_k": "40", "min_p": "0.01", "seed": "5",
                        "repetition_penalty": "1.1", "presence_penalty": "0.1", "frequency_penalty": "0.1",
                        "max_tokens": "24", "stop": "\x01"}.items():  # fmt: skip
        page.fill(f"#set-{name}", value)
    page.keyboard.press("Escape")
    ask(page, "def add(")
    text = "\n".join(answer(page).locator(".block").all_text_contents())
    assert len(text) > 10
    assert "".join(page.locator(".tok").all_text_contents()).strip() == text.replace("\n", "").strip()
    assert " of " in page.inner_text("#context")
    page.locator(".tok").nth(4).hover()
    page.click("#alternatives button:not(.taken)")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false]")
    assert page.locator(".notice.failed, #banner:visible").count() == 0
    page.click("#settings")
    page.click("text=Reset to defaults")
    page.select_option("#set-format", "schema")
    schema = '{"type": "object", "properties": {"name": {"enum": ["Ada"]}}, "required": ["name"], '
    page.fill("#set-schema", schema + '"additionalProperties": false}')
    page.keyboard.press("Escape")
    ask(page, "who?")
    assert "".join(answer(page).locator(".text").inner_text().split()) == '{"name":"Ada"}'
    page.context.close()
    assert page.faults == []


@pytest.mark.parametrize("name", ["nothing.js", "vendor/inter.LICENSE", ""])
def test_a_file_that_is_not_there_is_refused_like_all_else(server: Any, name: str) -> None:
    answered = httpx.get(f"{server.url}/web/{name}")
    assert answered.status_code == 404
    why = f"there is no route /web/{name}"
    error = {"message": why, "type": "not_found_error", "param": None, "code": "no_such_route"}
    assert answered.json() == {"error": error}
    assert "default-src 'none'" in answered.headers["content-security-policy"]
