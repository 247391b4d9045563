"""Measure the quantization loss of rounding to nearest and of calibrated rounding, scheme by scheme.

    python experiments/calibration.py --json-file experiments/results/2026-11-29-calibration.json
    python experiments/calibration.py --model starter --text TEXT

Calibrates on the default text, and measures the distance from the float32 original: for the bundled model on the
beginnings of all held-out files, for others on a text, in rows of 512 tokens.
"""

from __future__ import annotations

import copy
import datetime
import json
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from commits import commit_of

import mistral_7b
from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.cli.quantize import documents
from mistral_7b.evaluation import Distance
from mistral_7b.evaluation.perplexity import scored
from mistral_7b.quantization import quantize
from mistral_7b.quantization.calibration import calibrate
from mistral_7b.quantization.distance import Comparison
from mistral_7b.text.default_text import default_text

ROW = 512


def held_out(tokenizer: Tokenizer, tokens: int) -> list[list[int]]:
    """Return the first `tokens` tokens of every file that the bundled model's manifest holds out."""
    manifest = json.loads((Path(mistral_7b.__file__).parent / "demo/manifest.json").read_text())
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [f["file"] for f in manifest["files"] if f["fate"] == "held_out"]
    return [tokenizer.encode((root / name).read_text(encoding="utf-8"), bos=True)[:tokens] for name in names]


class Held:
    """Held-out documents with the original's logits, computed once."""

    def __init__(self, original: Mistral7B, texts: list[list[int]]) -> None:
        self.texts = texts
        self.logits = [[original.logits(h) for h, _ in scored(original, ids)] for ids in texts]

    def distance(self, model: Mistral7B) -> Distance:
        comparison = Comparison()
        for ids, parts in zip(self.texts, self.logits, strict=True):
            for (hidden, targets), logits in zip(scored(model, ids), parts, strict=True):
                comparison.add(logits, model.logits(hidden), targets)
        return Distance.of(comparison)


def main(
    model: str = "demo",
    text: Path | None = None,
    schemes: tuple[str, ...] = ("int8", "q4_k_m", "int4"),
    tokens: int = 129,
    rows: int = 4,
    calibration_tokens: int = 4096,
    json_file: Path | None = None,
) -> None:
    """Measure rounding to nearest and calibrated rounding, and print a Markdown table.

    Args:
        model: The bundled model "demo", or another with --text.
        text: Text to measure the distance on.
        schemes: Quantization schemes.
        tokens: Tokens per held-out file of the bundled model.
        rows: Rows of 512 tokens of the text.
        calibration_tokens: Tokens to calibrate on.
        json_file: Write the records to this file.
    """
    original = Mistral7B.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    tokenizer = Tokenizer.from_pretrained(model)
    if text is None:
        held = Held(original, held_out(tokenizer, tokens))
    else:
        held = Held(original, documents(tokenizer, [text.read_text(encoding="utf-8")], rows * ROW, ROW))
    name, content = default_text()
    guide = documents(tokenizer, [content], calibration_tokens, ROW)
    records: list[dict[str, Any]] = []
    print("| scheme | method | KL | top-1 | perplexity |", "|---|---|---|---|---|", sep="\n")
    for scheme in schemes:
        for method in ("nearest", "calibrated"):
            made, start = copy.deepcopy(original), time.perf_counter()
            made = quantize(made, scheme) if method == "nearest" else calibrate(made, guide, scheme)
            seconds = time.perf_counter() - start
            d = held.distance(made)
            records.append({"scheme": scheme, "method": method, **d.to_dict(), "seconds": round(seconds, 1)})
            print(
                f"| {scheme} | {method} | {d.kl:.5f} | {d.top1_agreement:.1%} | {d.ratio - 1:+.2%} |", flush=True
            )
    if json_file is None:
        return
    cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit_of(),
        "command": "python " + " ".join(sys.argv),
        "cpu": cpu.split(":")[1].strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": model,
        "calibration": {"text": name, "tokens": sum(map(len, guide))},
    }
    json_file.write_text(json.dumps(about | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    tyro.cli(main)
