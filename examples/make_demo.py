"""Make the bundled model: corpus, vocabulary, training, card. `make demo` runs this.

The corpus is the source of the Python standard library on this machine. One file in 25 is held out, by
the hash of its name; training never sees it, nor any near copy of it. Interrupt and run again: it goes
on where it stopped. Everything lies in --out until the model is whole; then --install puts it in place.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import tyro

from mistral_7b.training import TrainArgs

HELD_OUT = 25  # one file in so many
FEWEST_LINES = 10  # distinct ones
NEAR_COPY = 0.5  # share of a file's distinct lines found in one held-out file
TABLE_LINE = re.compile(r"0x[0-9a-fA-F]{2}|\\[ux][0-9a-fA-F]{2}")
VOCABULARY = 4096


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


def main(out: Path = Path("runs/demo"), steps: int = 2000) -> None:
    """Make the bundled model in `out`.

    Args:
        out: Folder of the run.
        steps: Updates of 8192 tokens each.
    """
    from mistral_7b.training import train
    from mistral_7b.training.vocabulary import train_vocabulary

    out.mkdir(parents=True, exist_ok=True)
    files = corpus()
    write_manifest(files, out / "manifest.json")
    if not (out / "tokenizer.model.v3").exists():
        train_vocabulary((f.text for f in files if f.fate == "train"), VOCABULARY, out / "tokenizer.model.v3")
    train(training(files, out, steps), show=lambda r: print(json.dumps(r), flush=True))


if __name__ == "__main__":
    tyro.cli(main)
