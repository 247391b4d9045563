"""What the page says of the model, its treatment of base models, prompts to start with, and the token limit."""

from __future__ import annotations

from typing import Any

from tests.server.page.browser import answer, ask, asked, reload
from tests.server.page.scripted import ANSWERS


def test_the_model_is_described(page: Any) -> None:
    page.wait_for_selector("#facts >> text=mistral-7b · chat model · context of 4,096 tokens · int8 weights")
    page.select_option("#model", "poems")
    page.wait_for_selector("#facts >> text=poems · adapter of mistral-7b · context of 4,096 tokens · int8 weights")
    page.click("#settings")
    rows = page.locator("#about div").all_inner_texts()
    assert [row.split("\n") for row in rows] == [
        ["Name", "poems"], ["Adapter of", "mistral-7b"], ["Context", "4,096 tokens"], ["Weights", "int8"],
        ["Tokenizer", "SentencePiece (tokenizer.model), 32,002 tokens"],
        ["Chat template", "chat_template.jinja; no tools, system messages"], ["Ends", "<|im_end|> (32000)"],
    ]  # fmt: skip


def test_fields_show_the_models_own_defaults(page: Any) -> None:
    page.wait_for_selector("#facts >> text=chat model")
    page.click("#settings")
    shown = [page.get_attribute(f"#set-{name}", "placeholder") for name in ("temperature", "top_p", "max_tokens")]
    assert shown == ["0.6", "1", "1024"]
    page.select_option("#model", "base")
    assert page.get_attribute("#set-temperature", "placeholder") == "1"


def test_a_model_without_a_chat_template_completes_texts(page: Any) -> None:
    page.wait_for_selector(".starter")
    page.select_option("#model", "base")
    assert "--chat-template" not in page.wait_for_selector("#base").inner_text()
    page.select_option("#model", "silent")
    page.wait_for_selector("#base >> text=--chat-template")
    ask(page, "It goes")
    assert "".join(answer(page).locator(".block.plain").all_text_contents()) == " and so on"
    body = asked(page)[-1]
    assert (body["prompt"], body["max_tokens"], "messages" in body) == ("It goes", 1024, False)
    ask(page, ", then")
    assert asked(page)[-1]["prompt"] == "It goes and so on, then"


def test_a_base_model_has_a_notice_and_plain_answers(page: Any) -> None:
    page.wait_for_selector(".starter")
    assert page.locator("#base").is_hidden()
    page.select_option("#model", "base")
    assert "base model" in page.wait_for_selector("#base").inner_text()
    page.click(".starter >> nth=0")
    assert page.input_value("#ask").startswith("def ")
    ask(page, "markdown")
    lines = answer(page).locator(".block.plain").all_text_contents()
    assert "\n".join(lines) == ANSWERS["markdown"]
    page.click("#settings")
    page.select_option("#set-shown", "markdown")
    assert answer(page).locator("h4").inner_text() == "Sliding windows"
    page.select_option("#set-shown", "")
    page.select_option("#model", "mistral-7b")
    assert answer(page).locator("h4").count() == 0  # it is still the base model's answer
    ask(page, "markdown")
    assert answer(page).locator("h4").inner_text() == "Sliding windows"


def test_a_prompt_starts_a_conversation(page: Any) -> None:
    starter = page.wait_for_selector(".starter >> nth=2")
    starter.click()
    assert page.evaluate("document.activeElement.id") == "ask"
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant[aria-busy=false] .stats:not(:empty)")
    assert "LaTeX" in asked(page)[-1]["messages"][0]["content"]
    assert page.locator("#starters").is_hidden()


def test_an_answer_ends_at_a_limit_that_is_shown_and_changed(page: Any) -> None:
    ask(page, "length")
    assert asked(page)[-1]["max_tokens"] == 1024
    notice = answer(page).locator(".notice")
    assert notice.evaluate("e => [...e.children].map(c => c.textContent).join(' ')") == (
        "Stopped at the token limit · Continue"
    )
    notice.locator("text=Continue").click()
    page.wait_for_selector(".assistant[aria-busy=false] .notice", state="hidden")
    page.click("#settings")
    assert page.get_attribute("#set-max_tokens", "placeholder") == "1024"
    page.fill("#set-max_tokens", "77")
    ask(page, "length again")
    assert asked(page)[-1]["max_tokens"] == 77


def test_the_default_limit_gives_way_to_the_context(page: Any) -> None:
    """The server refuses a limit that does not fit into the context; without a limit it uses what is left."""
    ask(page, "tight")
    assert [body.get("max_tokens") for body in asked(page)[-2:]] == [1024, None]
    page.click("#settings")
    page.fill("#set-max_tokens", "2000")
    ask(page, "tight again", wait=False)
    page.wait_for_selector(".notice.failed >> text=does not fit")
    reload(page)
    page.faults.clear()  # the browser logs every 400 to its console
