"""Make the bundled model: corpus, vocabulary, training, card. `make demo` runs this.

The corpus is the source of the Python standard library on this machine. One file in 25 is held out, by
the hash of its name; training never sees it, nor any near copy of it. Interrupt and run again: it goes
on where it stopped. Everything lies in --out until the model is whole; then --install puts it in place.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import mistral_7b
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.training import TrainArgs, train
from mistral_7b.training.data import PackedDocuments, held_out_documents
from mistral_7b.training.loss import bits_per_byte
from mistral_7b.training.vocabulary import train_vocabulary

HELD_OUT = 25  # one file in so many
FEWEST_LINES = 10  # distinct ones
NEAR_COPY = 0.5  # share of a file's distinct lines found in one held-out file
TABLE_LINE = re.compile(r"0x[0-9a-fA-F]{2}|\\[ux][0-9a-fA-F]{2}")
VOCABULARY = 4096
IS_TEST = re.compile(r"(^|/)(idle_)?tests?/")


@dataclass
class File:
    """One file of the corpus and what became of it: train, held_out, or why it was left out."""

    name: str
    path: Path
    text: str
    fate: str = "train"

    def lines(self) -> set[str]:
        """Its distinct lines, short ones left out: those that say which file it is."""
        return {s for line in self.text.splitlines() if len(s := line.strip()) >= 20}


def corpus() -> list[File]:
    """Every Python file of the standard library, sorted by name, with its fate."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or path.stat().st_size < 64:
            continue
        try:
            file = File(name, path, path.read_bytes().decode())
        except UnicodeDecodeError:
            continue  # tests of other encodings
        lines = file.text.splitlines()
        if sum(bool(TABLE_LINE.search(line)) for line in lines) > 0.4 * len(lines):
            file.fate = "left out: a table, not a program"
        elif len(file.lines()) < FEWEST_LINES:
            file.fate = "left out: too short to tell a copy from"
        elif int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0:
            file.fate = "held_out"
        files.append(file)
    drop_near_copies(files)
    return files


def drop_near_copies(files: list[File]) -> None:
    """Leave out of training what repeats most of a held-out file, or is mostly repeated in one."""
    held = {f.name: f.lines() for f in files if f.fate == "held_out"}
    for file in files:
        if file.fate != "train":
            continue
        mine = file.lines()
        for name, theirs in held.items():
            shared = len(mine & theirs)
            if shared / min(len(mine), len(theirs)) > NEAR_COPY:
                file.fate = f"left out: near copy of {name}"
                break


def write_manifest(files: list[File], path: Path) -> None:
    """What was seen, what was held out, what was left out, each with its size and SHA-256."""
    rows = [
        {
            "file": f.name,
            "bytes": len(f.text.encode()),
            "sha256": hashlib.sha256(f.text.encode()).hexdigest(),
            "fate": f.fate,
        }
        for f in files
    ]
    source = f"standard library of CPython {platform.python_version()} (PSF-2.0)"
    lines = ",\n".join(json.dumps(r) for r in rows)
    path.write_text(f'{{"source": {json.dumps(source)}, "files": [\n{lines}\n]}}\n')


def training(files: list[File], out: Path, steps: int) -> TrainArgs:
    """The run that makes the bundled model."""
    return TrainArgs(
        out=str(out),
        data=tuple(str(f.path) for f in files if f.fate == "train"),
        held_out=tuple(str(f.path) for f in files if f.fate == "held_out"),
        tokenizer=str(out / "tokenizer.model.v3"),
        dim=320, n_layers=6, head_dim=64, hidden_dim=896, n_heads=4, n_kv_heads=2,
        sliding_window=256, tie_embeddings=True,
        steps=steps, seq_len=2048, rows=4, optimizer="muon", warmup=50,
        eval_every=500, save_every=50, compile=True,
    )  # fmt: skip


def xz_bits_per_byte(files: list[File]) -> tuple[float, float]:
    """What `xz -9e` needs for the held-out files: alone, and with all that was trained on in view."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27}]
    seen, held = (b"".join(f.text.encode() for f in files if f.fate == fate) for fate in ("train", "held_out"))
    size = [len(lzma.compress(data, filters=filters)) for data in (held, seen + held, seen)]
    return 8 * size[0] / len(held), 8 * (size[1] - size[2]) / len(held)


CARD = """\
# The bundled model

A small Mistral: {parameters:.2f} million parameters (bfloat16, input and output embeddings shared), {n_layers}
layers of width {dim}, {n_heads} query heads on {n_kv_heads} key heads, a sliding window of {window} tokens, a
vocabulary of {vocabulary} tokens in the format of Mistral's v3 tokenizer. It is a base model trained
on the Python standard library: it continues code and does not answer questions.

Trained from scratch by `make demo` on {date}, on {cpus} cores ({machine}), in {hours:.1f} hours.

| | |
|---|---|
| data | source of the standard library of CPython {python} (PSF-2.0), {train_files} files, {train_mb:.1f} MB |
| held out | {held_files} files, {held_mb:.2f} MB, by file name hash; near duplicates excluded from training |
| tokens seen | {tokens:.1f} million, {epochs:.1f} epochs |
| **held-out bits per byte** | **{bits:.3f}** ({library:.3f} on library modules, {tests:.3f} on their tests) |
| `xz -9e` on the same files | {xz_alone:.3f} alone, {xz_seen:.3f} with the training files as context |

By default a repetition penalty of 1.1 applies (`generation_config.json`), because the model tends to repeat lines.
The samples below were drawn without it.

[manifest.json](manifest.json) lists every file with its SHA-256 and its split.

![Loss curve](curve.png)

Samples (temperature 0.8, top_p 0.9, seed 0; not selected):

{samples}
"""
PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def __init__(self):\n", "import os\n\ndef main(argv):\n")


def write_card(files: list[File], out: Path, log: list[dict[str, Any]], args: TrainArgs) -> None:
    """The model card, each figure of it measured or counted here."""
    from mistral_7b import Mistral7B, SamplingParams, generate

    model = Mistral7B.from_pretrained(out / "model")
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=120, seed=0)
    samples = "\n\n".join(
        f"```python\n{r.prompt}{r.outputs[0].text}\n```" for r in generate(model, PROMPTS, params)
    )
    alone, seen = xz_bits_per_byte(files)
    tokenizer = Tokenizer.from_pretrained(out / "model")

    def documents(wanted: Callable[[File], bool]) -> list[tuple[list[int], int]]:
        paths = [f.path for f in files if f.fate == "held_out" and wanted(f)]
        return [(tokens, size) for _, tokens, size in held_out_documents(paths, tokenizer)]

    size = {
        fate: sum(len(f.text.encode()) for f in files if f.fate == fate) / 1e6 for fate in ("train", "held_out")
    }
    tokens = args.steps * args.rows * args.seq_len
    per_epoch = PackedDocuments.from_files(
        [f.path for f in files if f.fate == "train"], tokenizer, args.seq_len, 0
    ).total
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        n_layers=args.n_layers, dim=args.dim, n_heads=args.n_heads, n_kv_heads=args.n_kv_heads,
        window=args.sliding_window, vocabulary=model.args.vocab_size,
        date=datetime.date.today().isoformat(), cpus=os.cpu_count(), machine=cpu_name(),
        hours=sum(args.rows * args.seq_len / r["tokens_per_s"] for r in log) / 3600,
        python=platform.python_version(),
        train_files=sum(f.fate == "train" for f in files), train_mb=size["train"],
        held_files=sum(f.fate == "held_out" for f in files), held_mb=size["held_out"],
        tokens=tokens / 1e6, epochs=tokens / per_epoch,
        bits=log[-1]["held_out_bits_per_byte"],
        library=bits_per_byte(model, documents(lambda f: not IS_TEST.search(f.name))),
        tests=bits_per_byte(model, documents(lambda f: bool(IS_TEST.search(f.name)))),
        xz_alone=alone, xz_seen=seen, samples=samples,
    )  # fmt: skip
    (out / "model" / "README.md").write_text(card)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def main(out: Path = Path("runs/demo"), steps: int = 1800, install: bool = False) -> None:
    """Make the bundled model in `out`.

    Args:
        out: Folder of the run.
        steps: Updates of 8192 tokens each.
        install: Then put it in place of the one in the package.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = corpus()
    write_manifest(files, out / "manifest.json")
    if not (out / "tokenizer.model.v3").exists():
        train_vocabulary((f.text for f in files if f.fate == "train"), VOCABULARY, out / "tokenizer.model.v3")
    args = training(files, out, steps)
    train(args)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for name in ("manifest.json", "curve.png"):
        shutil.copy(out / name, out / "model" / name)
    settings = out / "model" / "generation_config.json"
    own = json.loads(settings.read_text()) | {"repetition_penalty": 1.1}
    settings.write_text(json.dumps(own, indent=2) + "\n")
    write_card(files, out, log, args)
    if install:
        place = Path(mistral_7b.__file__).parent / "demo"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(out / "model", place)


if __name__ == "__main__":
    tyro.cli(main)
