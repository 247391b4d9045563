"""The page in a browser: focus, unsaved input, search, touch, redraws, and no execution of text."""

from __future__ import annotations

import json
from typing import Any

from tests.server.page.browser import Scripted, answer, ask, asked, more, opened
from tests.server.page.scripted import ANSWERS, SENTENCE


def test_the_focus_stays_where_keys_are_pressed(page: Any) -> None:
    ask(page, "first")
    page.focus(".assistant [aria-label='Regenerate']")
    page.keyboard.press("Enter")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false]")
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
    assert page.evaluate(focused) == "ask"  # the buttons are hidden while the answer streams
    page.focus("[aria-label='Previous version']")
    page.keyboard.press("Enter")
    page.wait_for_selector(".siblings >> text=1 / 2")
    assert page.evaluate(focused) == "Next version"  # the button that is enabled now
    page.focus("#conversations .open")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className") == "open"


def test_what_was_typed_into_a_message_is_not_lost(page: Any) -> None:
    ask(page, "first")
    page.click("#settings")
    page.fill("#set-temperature", "warm")
    page.hover(".user")
    page.click(".user [aria-label=Edit]")
    page.fill(".editor textarea", "with much thought")
    page.press(".editor textarea", "Control+Enter")
    page.wait_for_selector("#banner.failed")
    assert page.input_value(".editor textarea") == "with much thought"
    page.fill("#set-temperature", "")
    page.press(".editor textarea", "Control+Enter")
    page.wait_for_selector(".user .siblings >> text=2 / 2")


def test_a_word_is_found_on_another_branch_and_shown(page: Any) -> None:
    ask(page, "emoji")
    page.hover(".user")
    page.click(".user [aria-label=Edit]")
    page.fill(".editor textarea", "else")
    page.press(".editor textarea", "Control+Enter")
    page.wait_for_selector(".assistant[aria-busy=false] .stats:not(:empty)")
    assert answer(page).locator(".text").inner_text() == SENTENCE
    page.keyboard.press("Control+k")
    page.keyboard.type("GOOD day")
    page.wait_for_selector("#conversations mark >> text=Good")
    assert page.inner_text("#conversations small") == ANSWERS["emoji"]
    page.click("#conversations .open")
    page.wait_for_selector(f".assistant .text >> text={ANSWERS['emoji']}")
    assert page.locator(".assistant").count() == 1


def test_a_token_of_an_answer_that_is_still_coming_branches(page: Any) -> None:
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=9")
    # Measured in one call, because each update of the answer replaces the token's element.
    at = page.evaluate("document.querySelectorAll('.tok')[2].getBoundingClientRect().toJSON()")
    page.mouse.move(at["x"] + 4, at["y"] + 4)
    page.wait_for_selector("#alternatives:not([hidden])")
    more(page, 5)
    assert page.locator("#alternatives").is_visible()
    assert page.locator(".tok.open").get_attribute("data-i") == "2"
    page.click("#alternatives button:has-text('·never')")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false]")
    assert asked(page)[-1]["messages"][-1]["content"] == "The window never"
    page.click("[aria-label='Previous version']")
    page.wait_for_selector(".notice.stopped")  # branching stopped it


def test_a_finger_opens_the_alternatives_and_closes_them(browser: Any, scripted: Scripted) -> None:
    page = opened(browser, scripted.url, has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844})
    ask(page, "tell me")
    page.locator(".tok").nth(6).tap()
    page.wait_for_selector("#alternatives button")
    page.tap("#composer .under")
    page.wait_for_selector("#alternatives", state="hidden")
    page.locator(".tok").nth(6).tap()
    page.tap("#alternatives button:has-text('·never')")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.context.close()


def test_a_long_answer_is_drawn_a_piece_at_a_time(page: Any) -> None:
    """A paragraph is rendered only while it grows, not for each token after it."""
    page.evaluate("""() => { window.made = window.draws = 0; new MutationObserver(all => {
        window.draws += 1;
        for (const { addedNodes } of all)
            for (const node of addedNodes) if (node.classList?.contains("block")) window.made += 1;
    }).observe(document.getElementById("messages"), { subtree: true, childList: true }); }""")
    ask(page, "long")
    made, draws = page.evaluate("[window.made, window.draws]")
    assert "".join(page.locator(".tok").all_text_contents()) == SENTENCE * 60
    # Sixty paragraphs and the blanks between them are 119 blocks. A draw renders again the paragraph that grew
    # and the blanks around it; rendering everything would make some 60 blocks for each draw.
    assert 119 <= made <= 119 + 3 * draws
    page.evaluate("document.getElementById('scroll').scrollTop = 0")
    page.click("#down")
    assert page.evaluate("(({scrollHeight: all, scrollTop: top, clientHeight: one}) => all - top - one)"
                         "(document.getElementById('scroll'))") < 4  # fmt: skip


def test_a_stopped_answer_counts_in_the_gauge(page: Any) -> None:
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=9")
    page.click("#send")
    page.wait_for_selector(".notice.stopped")
    page.wait_for_selector("#gauge:visible")
    tokens = page.locator(".tok").count()
    assert int(page.inner_text("#context").split()[0]) >= tokens


def test_copying_needs_no_secure_page(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "first")
    page.evaluate("window.read = navigator.clipboard.readText.bind(navigator.clipboard);"
                  "Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # fmt: skip
    page.click(".assistant [aria-label=Copy]")
    assert page.evaluate("window.read()") == SENTENCE


EVIL = ("<img src=x onerror='window.hurt=1'>", "[x](javascript:window.hurt=2)", "<script>window.hurt=3</script>",
        "<svg/onload=window.hurt=4>", "[x](JaVaScRiPt&colon;window.hurt=5)", "![x](x' onerror='window.hurt=6)",
        "```<img/src=x/onerror=window.hurt=7>\nx\n```", "<https://a.b/'onmouseover='window.hurt=8>",
        "[x](data:text/html,<script>window.hurt=9</script>)", "</div></article><iframe srcdoc='<b>'></iframe>",
        "| <math><mtext></table><img src=x onerror=window.hurt=10> |\n|--|\n| a |")  # fmt: skip


def test_nothing_that_is_read_from_a_file_runs(page: Any) -> None:
    content = "\n\n".join(EVIL)
    call = {"id": content, "name": content, "arguments": content}
    token = {"t": content, "p": -1, "a": [{"t": EVIL[0], "p": -2}]}
    said = {"role": "assistant", "content": content, "problem": content, "model": content, "created": 2}
    messages = [
        {"id": "__proto__", "parent": None, "role": "user", "content": content, "created": 1},
        {"id": "b", "parent": "__proto__", **said, "state": "failed", "tokens": [token], "usage": None},
        {"id": "c", "parent": "b", **said, "calls": [call], "tokens": []},
        {
            "id": "d",
            "parent": "c",
            "role": "tool",
            "content": "",
            "results": [{"id": content, "content": content}],
        },
    ]
    conversation = {"title": content, "chosen": {"__proto__": "b"}, "created": 1, "messages": messages,
                    "settings": {"system": content, "stop": 3, "temperature": {}, "shown": "<b>"}}  # fmt: skip
    file = {"format": "mistral-7b conversations", "version": 1, "conversations": [conversation]}
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.set_input_files(
        "#file", {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(file).encode()}
    )
    page.wait_for_selector(".card")
    page.locator(".tok").first.hover()
    page.wait_for_selector("#alternatives:not([hidden])")
    page.fill("#search", "hurt")
    page.wait_for_selector("#conversations mark")
    page.click("#settings")
    assert page.input_value("#set-system") == content
    ask(page, content)
    assert asked(page)[-1]["messages"][0] == {"role": "system", "content": content}
    assert "temperature" not in asked(page)[-1]
    assert page.evaluate("window.hurt") is None
    made = page.locator(
        "#messages :is(img, script, iframe, math, svg:not(button svg, .card svg), [onerror], [onload])"
    )
    assert made.count() == 0
    links = page.eval_on_selector_all("a[href]", "all => all.map(a => a.protocol)")
    assert set(links) <= {"https:", "http:", "mailto:"}
    assert all(url.startswith(page.url.split("/#")[0]) for url in loaded)


def test_an_answer_goes_on_coming_in_a_conversation_left_alone(page: Any) -> None:
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=5")
    page.click("#new")
    ask(page, "emoji")
    page.click("#conversations [data-id] >> text=slow")
    page.wait_for_selector(".assistant[aria-busy=true] .tok >> nth=5")
    more(page, 3)
    page.keyboard.press("Escape")
    page.wait_for_selector(".notice.stopped")
