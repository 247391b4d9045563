"""Time until the attention page of a long prompt can be used, in headless chromium, and the size of its file.

    python experiments/explain_opening.py [MODEL] [TOKENS]

From navigation to the first map drawn and the controls ready, best and median of five, each in a new profile.
"""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from commits import commit_of
from playwright.sync_api import sync_playwright

from mistral_7b import Mistral7B
from mistral_7b.interpret import explain
from mistral_7b.machine import cpu_name
from mistral_7b.text.default_text import default_text
from mistral_7b.text.tokenizer import Tokenizer

ROUNDS = 5


def main(model: str = "starter", tokens: str = "4096") -> None:
    tokenizer = Tokenizer.from_pretrained(model)
    ids = tokenizer.encode(default_text()[1])[: int(tokens)]
    began = time.perf_counter()
    picture = explain.attention_maps(Mistral7B.from_pretrained(model), tokenizer, ids)
    drawn = time.perf_counter() - began
    seconds = []
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "attention.html"
        picture.save(file)
        size = file.stat().st_size
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(ROUNDS):
            page = browser.new_context().new_page()
            began = time.perf_counter()
            page.goto(file.as_uri())
            page.wait_for_selector("body[data-ready]")
            seconds.append(time.perf_counter() - began)
            page.context.close()
        version = browser.version
        browser.close()
    record = {
        "what": "opening the attention page", "model": model, "tokens": len(ids), "layers": len(picture.layers),
        "heads": picture.n_heads, "tile": picture.tile, "file_bytes": size, "seconds_best": round(min(seconds), 3),
        "seconds_median": round(statistics.median(seconds), 3), "seconds_to_draw": round(drawn, 1),
        "chromium": version, "cpu": cpu_name(), "date": str(datetime.date.today()),
        "commit": commit_of(), "command": f"python experiments/explain_opening.py {model} {tokens}",
    }  # fmt: skip
    print(json.dumps(record, indent=2))
    name = f"{record['date']}-explain-opening.json"
    (Path(__file__).parent / "results" / name).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
