"""Pictures in a browser: drawn without errors and without the network, used by keyboard; axe has no objection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_7b import Mistral7B
from mistral_7b.interpret import explain
from mistral_7b.text.tokenizer import Tokenizer
from tests.server.page.conftest import browser  # noqa: F401
from tests.server.page.test_page_trouble import AXE, serious

TEXT = 'def f(): return "</script><script>document.title = 1</script>"\n' * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of each picture."""
    out = tmp_path_factory.mktemp("pages")
    model, tokenizer = Mistral7B.from_pretrained("demo", dtype=torch.float32), Tokenizer.from_pretrained("demo")
    draw: dict[str, Callable[..., explain.Picture]] = {
        "attention": explain.attention_maps, "probabilities": explain.token_probabilities,
        "lens": explain.logit_lens, "attribution": explain.attributions, "cache": explain.cache_trace,
    }  # fmt: skip
    for name, picture in draw.items():
        picture(model, tokenizer, TEXT).save(out / f"{name}.html")
    times = explain.step_times(model, tokenizer, TEXT, bandwidth=1e10, peak=1e11)
    times.save(out / "time.html")
    return out


def opened(browser: Any, path: Path, **how: Any) -> Any:  # noqa: F811
    """The page of a file; `page.faults` collects errors and requests beyond the file."""
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how}).new_page()
    page.set_default_timeout(30_000)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: page.faults.append(r.url) if not r.url.startswith("file:") else None)
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    return page


@pytest.mark.parametrize(
    ("what", "scheme"),
    [("attention", "light"), ("attention", "dark"), ("probabilities", "dark"), ("lens", "light"),
     ("attribution", "dark"), ("cache", "dark"), ("time", "light")],
)  # fmt: skip
def test_pages_draw_and_axe_finds_nothing_serious(browser: Any, folder: Path, what: str, scheme: str) -> None:  # noqa: F811
    page = opened(browser, folder / f"{what}.html", color_scheme=scheme, bypass_csp=True)
    assert "1" not in page.title()
    for summary in page.locator("summary").all():
        summary.click()
    page.wait_for_function("[...document.querySelectorAll('details')].every(d => d.querySelector('tbody tr'))")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    assert serious(page) == []
    assert page.faults == []
    page.context.close()


def test_the_attention_map_by_keyboard(browser: Any, folder: Path) -> None:  # noqa: F811
    page = opened(browser, folder / "attention.html")
    page.focus("#map")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    said = page.inner_text("#status")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#status") != said
    assert "→ key 2 " in page.inner_text("#status")
    page.select_option("#layer", "3")
    page.locator(".heads button").nth(2).press("Enter")
    page.wait_for_function("document.querySelector('#rows').innerText.includes('layer 3, head 2')")
    page.hover("#map", position={"x": 3, "y": 300})
    assert "→ key 0 " in page.inner_text("#status")
    assert page.faults == []
    page.context.close()


def test_time_moves_by_keyboard(browser: Any, folder: Path) -> None:  # noqa: F811
    page = opened(browser, folder / "cache.html")
    page.focus("#step")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert "Step 3 " in page.inner_text("output[for=step]")
    page.focus("#call")
    page.keyboard.press("End")
    assert "goes to slot" in page.locator(".status").nth(1).inner_text()
    page.context.close()


def test_the_lens_by_keyboard(browser: Any, folder: Path) -> None:  # noqa: F811
    page = opened(browser, folder / "lens.html")
    page.focus(".cell[tabindex='0']")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    assert page.evaluate("[document.activeElement.dataset.r, document.activeElement.dataset.p]") == ["5", "0"]
    page.context.close()


def test_the_lens_shows_the_whole_cell_it_speaks_of(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    model, tokenizer = Mistral7B.from_pretrained("demo"), Tokenizer.from_pretrained("demo")
    explain.logit_lens(model, tokenizer, "a " * 30).save(tmp_path / "lens.html")
    page = opened(browser, tmp_path / "lens.html", viewport={"width": 700, "height": 900})
    right = "s => document.querySelector(s).getBoundingClientRect().right"
    assert page.evaluate(right, ".cell[tabindex='0']") <= page.evaluate(right, ".scroll") + 1
    assert page.locator(".cell[tabindex='0']").get_attribute("data-p") == page.locator(".cell").last.get_attribute(
        "data-p"
    )


@pytest.mark.parametrize("what", ["attention", "probabilities", "lens", "attribution", "cache", "time"])
def test_no_cell_of_a_table_is_cut_off(browser: Any, folder: Path, what: str) -> None:  # noqa: F811
    page = opened(browser, folder / f"{what}.html", viewport={"width": 420, "height": 900}, bypass_csp=True)
    for summary in page.locator("summary").all():
        summary.click()
    page.wait_for_function("[...document.querySelectorAll('details')].every(d => d.querySelector('tbody tr'))")
    cut = ".filter(c => c.scrollWidth > c.clientWidth + 1).map(c => c.innerText)"
    assert page.evaluate(f"[...document.querySelectorAll('td, th')]{cut}") == []
    page.context.close()
