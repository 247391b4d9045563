"""GRPO teaches the starter to answer in JSON: name and age of a sentence, checked by a Python function.

    python experiments/grpo_toy.py [--steps 24] [--out FOLDER] [--json FILE]

The rows of data are written first; names and ages of the held-out rows do not occur in training. The record has
the mean reward of each update, that of held-out prompts before and after, and what sampling, rewards and updates
took. Every sampled token's log-probability is checked to be the trainer's in every bit; the run ends where one
differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from commits import commit_of

from mistral_7b import machine
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.training.finetune_args import FinetuneArgs
from mistral_7b.training.finetuning import Run, open_base, read_examples

ROOT = Path(__file__).parent.parent
PROMPT = 'Answer as JSON, such as {{"name": "Zoe", "age": 7}}: {}'
SENTENCES = (
    "{name} is {age} years old.",
    "At {age}, {name} moved to Rome.",
    "My friend {name} turns {age} today.",
)
NAMES = ("Ann", "Bob", "Maria", "Tom", "Lucy", "Peter", "Anna", "David", "Julia", "Mark", "Emma", "Paul")
HELD_OUT = ("Sarah", "John", "Alice", "Henry")


def rows(names: tuple[str, ...], ages: range) -> list[dict[str, Any]]:
    """A row for each name, age and sentence, with what the reward function compares."""
    return [
        {
            "prompt": [{"role": "user", "content": PROMPT.format(sentence.format(name=name, age=age))}],
            "name": name,
            "age": age,
        }
        for age in ages
        for name in names
        for sentence in SENTENCES
    ]


def write(path: Path, written: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return str(path)


def run(args: FinetuneArgs) -> dict[str, Any]:
    """Train, and return the record."""
    tokenizer = Tokenizer.from_pretrained(args.model)
    examples = read_examples(args, tokenizer)
    began, cpu = time.perf_counter(), time.process_time()
    training = Run(args, open_base(args, tokenizer), tokenizer, examples)
    before = training.method.evaluate(examples.held_out)
    training.train()
    log = training.loop.log
    return {
        "held_out_reward": [before["eval_reward"], log[-1]["eval_reward"]],
        "kl_from_base": log[-1]["kl_from_base"],
        "rewards": [round(entry["reward"], 4) for entry in log],
        "lengths": [round(entry["length"], 1) for entry in log],
        "sampling_s": round(sum(entry["sampling_s"] for entry in log), 1),
        "reward_s": round(sum(entry["reward_s"] for entry in log), 3),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = given.out or Path(scratch) / "run"
        out.parent.mkdir(parents=True, exist_ok=True)
        args = FinetuneArgs(
            model=given.model, quantization=given.quantization, method="grpo", out=str(out), steps=given.steps,
            data=(write(Path(scratch) / "train.jsonl", rows(NAMES, range(3, 80, 7))),),
            held_out=write(Path(scratch) / "held_out.jsonl", rows(HELD_OUT, range(5, 6))),
            reward=f"{ROOT / 'examples' / 'rewards.py'}:name_and_age",
            lr=given.lr, warmup=2, rows=4, accumulate=1, group=8, max_tokens=24, seq_len=1024,
        )  # fmt: skip
        found = run(args)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": commit_of(ROOT),
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "torch": torch.__version__,
        "arguments": args.as_json(),
        **found,
    }
    print(json.dumps({name: value for name, value in record.items() if name != "arguments"}, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
