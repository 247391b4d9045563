"""Draw the screenshots of docs/explain.md from the starter model: `python docs/draw_explain.py`, with chromium.

Takes a minute. The trace of the caches is of the bundled model, which has a window.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from mistral_7b import Mistral7B
from mistral_7b.interpret import explain
from mistral_7b.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parent
PROMPT = (
    "The Eiffel Tower is a wrought-iron lattice tower, named after the engineer whose company built it. "
    "It stands in the city of"
)
CODE = Path(__file__).read_text(encoding="utf-8")[:900]


def main() -> None:
    model, tokenizer = Mistral7B.from_pretrained("starter"), Tokenizer.from_pretrained("starter")
    demo, words = Mistral7B.from_pretrained("demo"), Tokenizer.from_pretrained("demo")
    pictures = {
        "explain_attention": (explain.attention_maps(model, tokenizer, PROMPT), "light", "layer", 4, 860),
        "explain_lens": (explain.logit_lens(model, tokenizer, PROMPT), "dark", "", 0, 930),
        "explain_cache": (explain.cache_trace(demo, words, words.encode(CODE)[:300]), "light", "step", 30, 800),
    }
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (picture, scheme, control, value, height) in pictures.items():
            file = Path(folder) / f"{name}.html"
            picture.save(file)
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1180, "height": height})  # type: ignore
            page.goto(file.as_uri())
            page.wait_for_selector("body[data-ready]")
            if control:
                event = "change" if control == "layer" else "input"
                page.evaluate(
                    "([id, value, event]) => { const node = document.getElementById(id); node.value = value; "
                    "node.dispatchEvent(new Event(event)); }",
                    [control, str(value), event],
                )
                page.wait_for_timeout(500)  # the layer is inflated
            page.screenshot(path=FOLDER / f"{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
