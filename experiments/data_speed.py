"""Measure how long data for fine-tuning takes to be read and encoded. Prints a table; --json writes records.

    python experiments/data_speed.py --json FILE

Chats of two turns and some 300 tokens, of Python's help texts: seconds of processor time, on one core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from commits import commit_of

from mistral_7b import Tokenizer
from mistral_7b.text.default_text import default_text
from mistral_7b.training.examples import read_data

WORDS, SEQ_LEN = 44, 2048  # of a message; longer than any of the chats


def write_chats(path: Path, count: int) -> None:
    """Write chats of words that follow each other in the text."""
    words, draw = default_text()[1].split(), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            starts = [draw.randrange(len(words) - WORDS) for _ in range(4)]
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": " ".join(words[start : start + WORDS])}
                for i, start in enumerate(starts)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(name: str, tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """Return a record of the seconds for a file with this tokenizer."""
    began = time.process_time()
    (source,) = read_data([str(path)], tokenizer, "lora", SEQ_LEN).report
    seconds = time.process_time() - began
    return {"tokenizer": name, "chats": source.rows, "tokens": source.tokens, "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chats", type=int, default=10_000)
    args = parser.parse_args()
    tokenizers = {"v1": Tokenizer.v1(), "v3": Tokenizer.v3(), "starter": Tokenizer.from_pretrained("starter")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        write_chats(path, args.chats)
        records = [measure(name, tokenizer, path) for name, tokenizer in tokenizers.items()]
    for record in records:
        print("{tokenizer:10} {chats:,} chats, {tokens:,} tokens: {seconds:.1f} s".format(**record))
    if args.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        about = {"date": str(datetime.date.today()), "commit": commit_of(), "machine": machine}
        args.json.write_text(json.dumps({**about, "records": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
