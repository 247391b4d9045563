"""Measure the quantization loss of each rounding method, on the bundled model and a copy with outlier channels.

    python experiments/calibration.py --json experiments/results/2026-11-24-calibration.json

Calibrates on training files, and measures the distance from the float32 original on the beginnings of all held-
out files. Methods: nearest rounding, error feedback only (GPTQ), rescaling only (AWQ), and both, as in
`quantization.calibrate`. The copy computes the same function with four channels of each norm scaled by 10 to 50
and the weights after it scaled down, because large models have such channels.
"""

from __future__ import annotations

import copy
import datetime
import json
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from commits import commit_of
from torch import Tensor

import mistral_7b
from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.cache import Stateless
from mistral_7b.evaluation import Distance
from mistral_7b.evaluation.perplexity import scored
from mistral_7b.model import rope_phases
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.quantization.calibration import calibrate, calibrate_output, rescale_block, round_block
from mistral_7b.quantization.distance import Comparison
from mistral_7b.quantization.linear import Int8Embedding
from mistral_7b.surgery import replace_linears

SCHEMES = (
    Scheme("int8"),
    *(Scheme("int4", group, symmetric) for group in (128, 32) for symmetric in (True, False)),
)
Documents = list[list[int]]


def documents(fate: str, tokens: int, every: int = 1) -> Documents:
    """Return the first `tokens` tokens of every `every`-th file with this fate in the bundled model's manifest."""
    manifest = json.loads((Path(mistral_7b.__file__).parent / "demo/manifest.json").read_text())
    tokenizer, root = Tokenizer.from_pretrained("demo"), Path(sysconfig.get_paths()["stdlib"])
    names = [f["file"] for f in manifest["files"] if f["fate"] == fate][::every]
    return [tokenizer.encode((root / name).read_text(encoding="utf-8"), bos=True)[:tokens] for name in names]


def with_outliers(model: Mistral7B, channels: int = 4) -> Mistral7B:
    """Scale channels of each norm by 10 to 50, and the Linears after it inversely; in place."""
    draw = torch.Generator().manual_seed(0)
    for block in model.layers:
        a, f = block.attention, block.feed_forward
        for norm, linears in ((block.attention_norm, (a.wq, a.wk, a.wv)), (block.ffn_norm, (f.w1, f.w3))):
            factor = torch.ones(model.args.dim)
            where = torch.randperm(model.args.dim, generator=draw)[:channels]
            factor[where] = 10 + 40 * torch.rand(channels, generator=draw)
            norm.weight.mul_(factor)
            for linear in linears:
                linear.weight.div_(factor)
    return model


def staged(model: Mistral7B, texts: Documents, scheme: Scheme, rescaled: bool) -> Mistral7B:
    """Run one stage of calibration: rescaling with nearest rounding, or rounding with error feedback."""
    embedding = Int8Embedding.from_weight(model.tok_embeddings.weight)
    model.set_submodule("tok_embeddings", embedding)
    inputs = [embedding(torch.tensor(ids)) for ids in texts]
    for block in model.layers:
        if rescaled:
            rescale_block(block, inputs, model.args, scheme)
            replace_linears(block, lambda linear, name: scheme.linear(linear.weight, name))
            inputs = through(block, inputs, model)
        else:
            inputs = round_block(block, inputs, model.args, scheme)
    if rescaled:
        model.output = calibrate_output(model.norm, model.output, inputs, scheme)
    else:
        model.output = scheme.linear(model.output.weight, "output")
    return model


def through(block: torch.nn.Module, inputs: list[Tensor], model: Mistral7B) -> list[Tensor]:
    """Return the outputs of a block."""
    out = []
    for x in inputs:
        memory = Stateless(model.args.sliding_window)
        rope = rope_phases(memory.extend(x[:, 0]), model.args, x.dtype)
        out.append(block(x, rope, memory))
    return out


METHODS: dict[str, Callable[[Mistral7B, Documents, Scheme], Mistral7B]] = {
    "nearest": lambda model, texts, scheme: quantize(model, scheme),
    "feedback": lambda model, texts, scheme: staged(model, texts, scheme, rescaled=False),
    "rescaled": lambda model, texts, scheme: staged(model, texts, scheme, rescaled=True),
    "both": calibrate,
}


class Held:
    """Held-out documents with the original's logits, computed once."""

    def __init__(self, original: Mistral7B, texts: Documents) -> None:
        self.texts = texts
        self.logits = [[original.logits(h) for h, _ in scored(original, ids)] for ids in texts]

    def distance(self, model: Mistral7B) -> Distance:
        comparison = Comparison()
        for ids, parts in zip(self.texts, self.logits, strict=True):
            for (hidden, targets), logits in zip(scored(model, ids), parts, strict=True):
                comparison.add(logits, model.logits(hidden), targets)
        return Distance.of(comparison)


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a row per scheme and method, both models side by side."""
    rows = ["| scheme | method | KL | top-1 | perplexity | KL, outliers | top-1 | perplexity |", "|" + "---|" * 8]
    for r in (r for r in records if r["model"] == "bundled"):
        other = next(
            o
            for o in records
            if o["model"] == "outliers" and (o["scheme"], o["method"]) == (r["scheme"], r["method"])
        )
        cells = [f"{d['kl']:.5f} | {d['top1_agreement']:.2%} | {d['ratio'] - 1:+.2%}" for d in (r, other)]
        rows.append(f"| {r['scheme']} | {r['method']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def label(scheme: Scheme) -> str:
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    return scheme.name if scheme.name == "int8" else f"int4, {scheme.group_size}, {kind}"


def main(json_file: Path | None = None, tokens: int = 513, methods: tuple[str, ...] = tuple(METHODS)) -> None:
    """Measure every method on both models and print the table.

    Args:
        json_file: Write the records to this file.
        tokens: Tokens per held-out file.
        methods: Methods to measure.
    """
    original = Mistral7B.from_pretrained("demo", dtype=torch.float32).requires_grad_(False)
    texts, held = documents("train", 1024, every=110), Held(original, documents("held_out", tokens))
    records = []
    for name in ("bundled", "outliers"):
        for scheme in SCHEMES:
            for method in methods:
                model = copy.deepcopy(original)
                if name == "outliers":
                    with_outliers(model)
                start = time.perf_counter()
                model = METHODS[method](model, texts, scheme)
                seconds = time.perf_counter() - start
                distance = held.distance(model).to_dict()
                records.append({"model": name, "scheme": label(scheme), "method": method} | distance)
                records[-1]["seconds"] = round(seconds, 1)
                print(records[-1], file=sys.stderr, flush=True)
    print(table(records))
    if json_file is None:
        return
    cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit_of(),
        "command": "python " + " ".join(sys.argv),
        "cpu": cpu.split(":")[1].strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "calibration_tokens": sum(map(len, texts)),
    }
    json_file.write_text(json.dumps(about | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    tyro.cli(main)
