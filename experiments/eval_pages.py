"""Time of scoring with KV pages of 1 token, which share whole prefixes, and of the engine's usual 16.

    python experiments/eval_pages.py --json-file FILE

The starter model, converted to a folder of Hugging Face, in float32, bfloat16 and int8; the best of three rounds,
in which the sizes take turns, after one that does not count.
endings: 12 contexts of 113 tokens, with four ends of 30 each. letters: 12 questions of 100 tokens after the same
440, with four ends of one token. The scores must have equal bits, else the script fails.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from commits import finish

from mistral_7b import Mistral7B
from mistral_7b.checkpoint import convert
from mistral_7b.checkpoint.hub import resolve
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.llm import open_engine
from mistral_7b.evaluation.scoring import STEP, USUAL, score
from mistral_7b.machine import version

BATCH = 8
SIZES = (1, EngineConfig.page_size)
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}  # fmt: skip


def tasks() -> dict[str, list[tuple[list[int], list[int]]]]:
    """The pairs of both tasks: random tokens, whose order alone takes time."""
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(3, 40_000) for _ in range(n)]

    contexts, examples = [[1, *ids(112)] for _ in range(12)], [1, *ids(439)]
    questions = [[*examples, *ids(100)] for _ in range(12)]
    return {
        "endings": [(context, ids(30)) for context in contexts for _ in range(4)],
        "letters": [(question, [letter]) for question in questions for letter in (5, 6, 7, 8)],
    }


def main(json_file: Path | None = None, rounds: int = 3) -> None:
    """Measure and print the record.

    Args:
        json_file: Write the record to this file.
        rounds: Times that each task is scored.
    """
    seconds: dict[str, dict[str, dict[int, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "starter"
        convert(resolve("starter"), place, to="huggingface")
        models = {kind: Mistral7B.from_pretrained(place, **options) for kind, options in KINDS.items()}
    for kind, model in models.items():
        lengths = [model.args.max_seq_len, *[USUAL] * (BATCH - 1)]
        seconds[kind] = {task: {size: [] for size in SIZES} for task in tasks()}
        for i in range(rounds + 1):
            for task, pairs in tasks().items():
                found = []
                for size in SIZES:
                    config = EngineConfig(max_batch_tokens=STEP, page_size=size, deterministic=True)
                    inputs = open_engine(model, config, None, None, lengths)
                    began = time.perf_counter()
                    found.append(score(inputs, pairs))
                    if i > 0:  # not the first, which is warm-up
                        seconds[kind][task][size].append(time.perf_counter() - began)
                assert found[0] == found[1], f"{kind} {task}"
    record = {
        "what": "seconds to score, by tokens of a KV page", "model": "starter", "rounds": rounds,
        "seconds_best": {kind: {task: {str(size): round(min(each), 3) for size, each in own.items()}
                                for task, own in by_task.items()} for kind, by_task in seconds.items()},
        "threads": torch.get_num_threads(), "torch": version("torch"),
    }  # fmt: skip
    finish(record, json_file)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    tyro.cli(main)
