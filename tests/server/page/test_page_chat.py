"""The page in a browser with a scripted server: messages, branches, tints, settings, storage, tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.server.page.browser import answer, ask, asked, more, reload
from tests.server.page.scripted import ANSWERS, SENTENCE


def test_an_answer_streams_and_its_numbers_are_shown(page: Any) -> None:
    ask(page, "a slow one, please", wait=False)
    page.wait_for_selector(".tok >> nth=5")
    assert page.locator("#send").get_attribute("aria-label") == "Stop"
    early = answer(page).locator(".text").inner_text()
    page.wait_for_function(
        "text => document.querySelector('.assistant .text').innerText.length > text.length + 40", arg=early
    )
    page.press("#ask", "Escape")
    page.wait_for_selector(".notice.stopped")
    stats = answer(page).locator(".stats").inner_text()
    assert "s to first token" in stats
    assert "tokens/s" in stats
    body = asked(page)[-1]
    assert (body["model"], body["stream"], body["logprobs"], body["top_logprobs"]) == ("mistral-7b", True, True, 5)
    assert body["stream_options"] == {"include_usage": True}
    assert body["messages"] == [{"role": "user", "content": "a slow one, please"}]
    assert not body.keys() & {"temperature", "tools", "response_format", "stop"}  # unset: the server's defaults


def test_what_was_stopped_goes_on_where_it_was(page: Any) -> None:
    ask(page, "slow", wait=False)
    page.wait_for_selector(".tok >> nth=8")
    page.click("#send")
    page.wait_for_selector(".notice.stopped")
    kept = answer(page).locator(".text").inner_text()
    assert ANSWERS["slow"].startswith(kept.rstrip())
    page.click(".notice >> text=Continue")
    page.wait_for_selector(".assistant[aria-busy=true]")
    more(page, 5)
    page.click("#send")
    sent = asked(page)[-1]["messages"][-1]
    assert sent["prefix"] is True
    assert sent["content"].rstrip() == kept.rstrip()
    assert ANSWERS["slow"].startswith(answer(page).locator(".text").inner_text().rstrip())


def test_editing_and_asking_again_are_branches(page: Any) -> None:
    ask(page, "first thing")
    ask(page, "second thing")
    page.click(".assistant >> nth=0 >> [aria-label='Regenerate']")
    page.wait_for_selector(".assistant .siblings >> text=2 / 2")
    assert page.locator(".user").count() == 1  # the later messages belong to the other branch
    page.click("[aria-label='Previous version']")
    assert page.locator(".user").count() == 2
    page.hover(".user >> nth=0")
    page.click(".user >> nth=0 >> [aria-label=Edit]")
    page.fill(".editor textarea", "another thing")
    page.press(".editor textarea", "Control+Enter")
    page.wait_for_selector(".user .siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false] .stats:not(:empty)")
    assert asked(page)[-1]["messages"] == [{"role": "user", "content": "another thing"}]
    reload(page)  # the tree and the visible branch are stored
    page.wait_for_selector(".user .siblings >> text=2 / 2")
    page.click(".user [aria-label='Previous version']")
    assert page.locator(".user .text").all_inner_texts() == ["first thing", "second thing"]


def test_tokens_are_tinted_and_an_alternative_branches(page: Any) -> None:
    ask(page, "tell me")
    tokens = page.locator(".tok")
    assert "".join(tokens.all_text_contents()) == SENTENCE
    assert page.locator(".tok.t0").count() > 3
    assert page.locator(".tok.t3, .tok.t4, .tok.t5").count() > 1
    tokens.nth(6).hover()
    page.wait_for_selector("#alternatives:not([hidden])")
    rows = page.locator("#alternatives button")
    assert rows.count() == 5
    assert page.locator("#alternatives .taken").count() == 1
    page.click("#alternatives button:has-text('·never')")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false]")
    before = "".join(tokens.all_text_contents()[:6])
    assert asked(page)[-1]["messages"][-1] == {"role": "assistant", "content": before + " never", "prefix": True}
    assert answer(page).locator(".text").inner_text() == f"{before} never, and so it went on."
    assert tokens.nth(6).text_content() == " never"  # the chosen alternative is tinted, too
    page.click("#tint")
    assert tokens.count() == 0
    assert answer(page).locator(".text").inner_text() == f"{before} never, and so it went on."


BROKEN = """async () => {
    const { place } = await import('/web/tint.js');
    const tokens = [{ t: 'a' }, { t: '<0x9E>', b: [158] }, { t: 'X' }, { t: '<0xE3>', b: [227] }, 
        { t: 'b' }, { t: ' c' }];
    return place({ content: 'a\ufffdX\ufffdb c', tokens });
}"""


def test_bytes_that_make_no_character_lose_no_place(page: Any) -> None:
    assert page.evaluate(BROKEN) == [0, 1, 2, 3, 3, 5, 7]


def test_several_tokens_in_one_event_are_several_places(page: Any) -> None:
    ask(page, "several, with emoji")
    tokens = page.locator(".tok")
    assert tokens.all_text_contents() == ["Good", " ", "🙂", " day"]  # the emoji's bytes are split over two events
    page.click("#new")
    ask(page, "several")
    assert "".join(tokens.all_text_contents()) == SENTENCE
    assert f"{tokens.count()} tokens" in answer(page).locator(".stats").inner_text()
    before = "".join(tokens.all_text_contents()[:7])  # token 7 is the second of its event
    tokens.nth(7).hover()
    page.click("#alternatives button:has-text('·never')")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false]")
    assert asked(page)[-1]["messages"][-1]["content"] == before + " never"
    assert tokens.nth(7).text_content() == " never"


def test_an_alternative_is_reached_by_keys_alone(page: Any) -> None:
    page.keyboard.type("tell me")  # the message box has the focus at the start
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant[aria-busy=false] .stats:not(:empty)")
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('tok')"):
            break
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.i") == "2"
    page.keyboard.press("Enter")
    chosen = page.evaluate("document.activeElement.querySelector('.what').textContent")
    page.keyboard.press("Enter")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false]")
    assert asked(page)[-1]["messages"][-1]["content"].replace(" ", "·").endswith(chosen)


def test_parts_of_a_character_are_one_place(page: Any) -> None:
    ask(page, "emoji")
    assert page.locator(".tok").all_text_contents() == ["Good", " ", "🙂", " day"]
    page.locator(".tok").nth(3).hover()
    page.click("#alternatives button:has-text('·maybe')")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false]")
    assert asked(page)[-1]["messages"][-1]["content"] == "Good 🙂 maybe"


def test_markdown_is_drawn_with_its_tints(page: Any) -> None:
    ask(page, "markdown")
    text = answer(page).locator(".text")
    page.wait_for_selector(".assistant[aria-busy=false]")  # the answer is drawn anew until it is complete
    assert text.locator("td").nth(1).evaluate("cell => getComputedStyle(cell).textAlign") == "right"
    assert text.locator("ol").get_attribute("start") == "3"
    assert text.locator("h4").inner_text() == "Sliding windows"  # two below its rank in the answer
    assert text.locator("td").all_inner_texts() == ["1", "4,096", "32", "131,072"]
    page.wait_for_selector(".code .hljs-keyword")
    assert (
        text.locator("pre").inner_text().startswith('def visible(i: int, j: int, window: int) -> bool:\n    """')
    )
    assert text.locator("a").get_attribute("rel") == "noopener noreferrer nofollow"
    # Text without a tint is whitespace, or differs from its source ("&amp;").
    bare = page.evaluate("""() => { const copy = document.querySelector('.assistant .text').cloneNode(true);
        copy.querySelectorAll('.tok, .code-head').forEach(e => e.remove()); return copy.textContent.trim(); }""")
    assert bare.replace(" ", "").replace("\n", "") in ("", "says&shows:")
    bold = text.locator("strong .tok")
    assert bold.text_content() == "W"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".copy")
    page.wait_for_selector(".copy >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()").endswith("< j <= i  # causal")


def test_an_answer_is_shown_as_it_came_if_one_wants(page: Any) -> None:
    ask(page, "markdown")
    page.click("#settings")
    page.select_option("#set-shown", "plain")
    lines = answer(page).locator(".block").all_text_contents()
    assert "\n".join(lines) == ANSWERS["markdown"]
    assert "".join(page.locator(".tok").all_text_contents()) == ANSWERS["markdown"].replace("\n", "")
    page.select_option("#set-shown", "")
    assert answer(page).locator("h4").inner_text() == "Sliding windows"


def test_nothing_that_a_model_writes_runs_or_loads(page: Any) -> None:
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    ask(page, "evil")
    text = answer(page).locator(".text")
    assert (
        text.locator(
            "img, script, [style], [onclick], [onload], [href^=javascript], .text > div:not(.block)"
        ).count()
        == 0
    )
    assert "<script>window.hurt = 1</script>" in text.inner_text()
    assert page.evaluate("window.hurt") is None
    assert all(url.startswith(page.url.split("/#")[0]) for url in loaded)


def test_conversations_are_kept_found_carried_away_and_back(page: Any, tmp_path: Path) -> None:
    ask(page, "emoji of the <b>first</b>")
    page.click("#new")
    ask(page, "something of windows")
    reload(page)
    assert answer(page).locator(".text").inner_text() == SENTENCE  # the same conversation is open again
    titles = page.locator("#conversations .open span")
    assert titles.all_inner_texts() == ["something of windows", "emoji of the <b>first</b>"]
    page.fill("#search", "good day 🙂")  # words in an answer
    page.wait_for_function("() => document.querySelectorAll('#conversations [data-id]').length === 1")
    assert titles.all_inner_texts() == ["emoji of the <b>first</b>"]
    page.fill("#search", "good windows")  # no conversation has both words
    page.wait_for_selector("#none >> text=No results.")
    page.fill("#search", "")
    page.wait_for_function("() => document.querySelectorAll('#conversations [data-id]').length === 2")
    with page.expect_download() as download:
        page.click("#export")
        page.click("#formats >> text=Conversations")
    file = tmp_path / "all.json"
    download.value.save_as(file)
    for left in (1, 0):
        page.hover("#conversations [data-id] >> nth=0")
        page.click("#conversations [data-id] >> nth=0 >> [aria-label^=Delete]")
        page.click("#confirm-yes")
        page.wait_for_function("n => document.querySelectorAll('#conversations [data-id]').length === n", arg=left)
    page.set_input_files("#file", file)
    page.wait_for_selector("#conversations [data-id] >> nth=1")
    assert titles.all_inner_texts() == ["something of windows", "emoji of the <b>first</b>"]
    assert "".join(page.locator(".tok").all_text_contents()) == SENTENCE
    content = json.loads(file.read_text(encoding="utf-8"))
    content["conversations"][0]["messages"][0]["role"] = "admin"
    page.set_input_files(
        "#file", {"name": "bad.json", "mimeType": "application/json", "buffer": json.dumps(content).encode()}
    )
    assert "the role admin" in page.wait_for_selector("#banner.failed").inner_text()
    assert titles.count() == 2


def test_settings_reach_the_request_and_faults_do_not(page: Any) -> None:
    page.select_option("#model", "poems")
    page.click("#settings")
    assert page.get_attribute("#set-temperature", "placeholder") == "1"
    page.fill("#set-system", "Be brief.")
    page.fill("#set-temperature", "warm")
    assert page.inner_text("#about-temperature") == "Temperature must be a number"
    page.select_option("#set-format", "schema")
    page.fill("#set-schema", '{"type": "object"')
    ask(page, "json", wait=False)
    assert "Temperature must be a number" in page.wait_for_selector("#banner.failed").inner_text()
    assert page.input_value("#ask") == "json"  # the message is not lost
    page.fill("#set-temperature", "0.25")
    page.fill("#set-seed", "7")
    page.fill("#set-stop", "one\ntwo")
    assert "Invalid JSON" in page.inner_text("#about-schema")
    page.fill("#set-schema", '{"type": "object"}')
    ask(page, "json")
    body = asked(page)[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["model"], body["temperature"], body["seed"], body["stop"]) == ("poems", 0.25, 7, ["one", "two"])
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}},
    }
    assert page.inner_text("#context") == "1,024 of 4,096 tokens"  # an adapter has its model's context
    reload(page)
    page.click("#settings")
    assert page.input_value("#set-temperature") == "0.25"
    page.click("text=Reset to defaults")
    ask(page, "again")
    assert "temperature" not in asked(page)[-1]


def test_a_tool_is_called_answered_and_answered_otherwise(page: Any) -> None:
    page.click("#settings")
    page.fill("#set-tools", '[{"name": "weather", "parameters": {"type": "object"}}]')
    page.keyboard.press("Escape")
    ask(page, "weather?", wait=False)
    card = page.wait_for_selector(".card textarea")
    assert page.inner_text(".card pre") == '{\n  "city": "Paris"\n}'
    card.fill("sunny")
    page.click("text=Send result")
    page.wait_for_selector(".assistant >> nth=1 >> text=It is sunny.")
    body = asked(page)[-1]
    assert body["tools"] == [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    ]
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
    }
    assert body["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
    ]
    page.wait_for_selector(".assistant >> nth=1 >> [aria-label='Regenerate']")
    page.fill(".card textarea", "wet")
    page.click("text=Send new results")
    page.wait_for_selector(".assistant >> nth=1 >> text=It is wet.")
    page.click(".calls [aria-label='Previous version']")
    page.wait_for_selector(".assistant >> nth=1 >> text=It is sunny.")


CUTS = """async () => {
    const { events } = await import('/web/stream.js');
    const text = ': hi\\r\\n\\r\\ndata: a\\ndata: ü\\n\\nevent: x\\ndata:b\\r\\n\\r\\ndata: [DONE]\\n\\n';
    const bytes = new TextEncoder().encode(text);
    const read = [];
    for (let size = 1; size < bytes.length; size++) {
        const body = new ReadableStream({ start(to) {
            for (let i = 0; i < bytes.length; i += size) to.enqueue(bytes.slice(i, i + size));
            to.close();
        }});
        const all = [];
        for await (const data of events(body)) all.push(data);
        read.push(JSON.stringify(all));
    }
    return [...new Set(read)];
}"""


def test_events_are_the_same_however_they_come_cut(page: Any) -> None:
    assert page.evaluate(CUTS) == ['["a\\nü","b","[DONE]"]']


DAMAGES = {
    "file.format = 'x'": "not an export", "file.version = 2": "version 2", "c.messages = 3": "no messages",
    "c.messages[1].parent = 'zz'": "parent is missing", "c.messages[0].content = {}": "content",
    "c.messages[0].parent = 'b'": "cycle", "c.title = null": "title", "": "taken",
}  # fmt: skip
DAMAGED = """async () => {
    const { readExport } = await import('/web/transfer.js');
    const message = (id, parent) => ({ id, parent, role: 'user', content: 'x', created: 1 });
    const messages = [message('a', null), message('b', 'a')];
    const c = { id: 'c', title: 't', created: 1, chosen: {}, settings: {}, messages };
    const file = { format: 'mistral-7b conversations', version: 1, conversations: [c] };
    CHANGE;
    try { readExport(JSON.stringify(file)); } catch (error) { return error.message; }
    return 'taken';
}"""


def test_a_damaged_file_is_refused(page: Any) -> None:
    for change, said in DAMAGES.items():
        assert said in page.evaluate(DAMAGED.replace("CHANGE", change)), change
