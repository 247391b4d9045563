"""Text files attached to messages, and export as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.server.page.browser import answer, ask, asked, reload


def file(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


NOTES = "# Notes\n\n```py\nprint(1)\n```\n"


def test_a_text_file_is_sent_as_fenced_text_and_shown_folded(page: Any) -> None:
    page.set_input_files("#attach-file", [file("notes.md", NOTES.encode()), file("a b.txt", "ü".encode())])
    page.wait_for_selector("#attached li >> nth=1")
    page.click("[aria-label='Remove a b.txt']")
    ask(page, "What is this?")
    sent = asked(page)[-1]["messages"]
    wanted = f"What is this?\n\nFile `notes.md`:\n````\n{NOTES}````"
    assert sent == [{"role": "user", "content": wanted}]
    assert page.locator("#attached").is_hidden()
    assert page.locator(".user summary").inner_text().split("\n")[0] == "notes.md"
    assert page.locator(".user pre").is_hidden()
    page.click(".user summary")
    assert page.locator(".user pre").inner_text() == NOTES.rstrip()
    reload(page)
    page.wait_for_selector(".user summary")


def test_a_file_alone_is_a_message(page: Any) -> None:
    assert page.is_disabled("#send")
    page.set_input_files("#attach-file", [file("data.csv", b"a,b\n1,2\n")])
    page.wait_for_selector("#attached li")
    page.click("#send")
    page.wait_for_selector(".assistant[aria-busy=false] .stats:not(:empty)")
    assert asked(page)[-1]["messages"][0]["content"] == "File `data.csv`:\n```\na,b\n1,2\n```"
    assert page.inner_text("#conversations .open span") == "data.csv"


REFUSED = {
    "image.png": (b"\x89PNG\r\n\x1a\n\x00\x00", "image.png is not a text file in UTF-8"),
    "latin.txt": ("café".encode("latin-1"), "latin.txt is not a text file in UTF-8"),
    "null.txt": (b"a\x00b", "null.txt is not a text file"),
    "long.txt": (b"x" * 100_001, "long.txt has 100 kB, and a message can hold files of 100 kB"),
    "empty.txt": (b"", "empty.txt is empty"),
}


def test_other_files_are_refused_in_words(page: Any) -> None:
    for name, (content, why) in REFUSED.items():
        page.set_input_files("#attach-file", [file(name, content)])
        assert why in page.wait_for_selector(f"#banner.failed >> text={name}").inner_text()
    page.set_input_files("#attach-file", [file("a.txt", b"x" * 60_000), file("b.txt", b"x" * 60_000)])
    assert "b.txt was not attached" in page.wait_for_selector("#banner >> text=together").inner_text()
    assert page.locator("#attached li").count() == 1
    ask(page, "but this goes")
    assert page.locator("#banner").is_hidden()


DROP = """([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name));
    const fire = type => document.getElementById("messages").dispatchEvent(
        new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
    fire("dragover");
    const shown = !document.getElementById("drop").hidden;
    fire("drop");
    return shown && document.getElementById("drop").hidden;
}"""


def test_a_file_is_dropped(page: Any) -> None:
    assert page.evaluate(DROP, ["notes.txt", "dropped"])
    page.wait_for_selector("#attached >> text=notes.txt")
    ask(page, "look")
    assert "dropped" in asked(page)[-1]["messages"][0]["content"]


def test_a_file_in_a_message_is_only_text(page: Any) -> None:
    evil = "<img src=x onerror='window.hurt=1'>\n```\n\nFile `x`:\n```\n</pre><script>window.hurt=2</script>\n```"
    page.set_input_files("#attach-file", [file("<b>.txt", evil.encode())])
    page.wait_for_selector("#attached li")
    ask(page, "look")
    assert page.locator(".user :is(img, script, b)").count() == 0
    assert page.locator(".user .file").count() == 1  # the fence is longer than those inside
    assert page.locator(".user pre").text_content() == evil
    assert page.evaluate("window.hurt") is None


def test_a_conversation_is_exported_as_markdown(page: Any, tmp_path: Path) -> None:
    ask(page, "markdown, please")
    ask(page, "emoji")
    page.click("#new")
    page.hover("#conversations [data-id]")
    with page.expect_download() as download:
        page.click("[aria-label='Export markdown, please']")
        page.click("#formats >> text=Markdown")
    assert download.value.suggested_filename == "markdown-please.md"
    download.value.save_as(tmp_path / "x.md")
    text = (tmp_path / "x.md").read_text(encoding="utf-8")
    assert text.startswith(
        "# markdown, please\n\n## You\n\nmarkdown, please\n\n## Answer of mistral-7b\n\n## Slid"
    )
    assert text.endswith("## You\n\nemoji\n\n## Answer of mistral-7b\n\nGood 🙂 day\n")
    assert answer(page).count() == 0  # the open conversation stays open
