"""lm-eval's tasks in float32 by our engine and by lm-eval's adapter of transformers: equal scores, and the times.

    python experiments/eval_harness.py --json-file FILE

The starter model, converted to a folder of Hugging Face that both read, the small tasks of the package, and two of
usual size in eval_tasks; none needs the network.
Each score (in nats) must agree to 1e-3 and each generated text be equal, else the script fails. A time is that of
simple_evaluate with the model in memory, best of the rounds, which take turns, after one that does not count; the
engine's prefix cache is new in each. lm-eval's report of the environment (0.6 s) is part of neither. "ratio" is
their time divided by ours.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from commits import finish
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.checkpoint import convert
from mistral_7b.checkpoint.hub import resolve
from mistral_7b.evaluation.harness import HarnessModel, find_tasks, run_tasks
from mistral_7b.machine import version

TOLERANCE = 1e-3  # of a continuation's or text's log-likelihood: float32, sums of up to hundreds of tokens
FOLDER = Path(__file__).with_name("eval_tasks")
TASKS = ("topics_endings", "topics_letters", "mini_choice", "mini_python", "mini_answers", "mini_text")


def answers(found: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to each request of a task: (log-likelihood, greedy), a log-likelihood, or a text."""
    rows = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    return [answer for row in rows for request in row["resps"] for answer in request]


def difference(task: str, ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference of two lists of scores; AssertionError where they are not equal to rounding."""
    assert len(ours) == len(theirs) > 0, task
    if isinstance(ours[0], str):
        assert ours == theirs, f"{task}: {[pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]}"
        return 0.0
    if isinstance(ours[0], tuple | list):
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs], task
        ours, theirs = [value for value, _ in ours], [value for value, _ in theirs]
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert worst < TOLERANCE, f"{task}: a score differs by {worst}"
    return worst


def main(
    json_file: Path | None = None, tasks: tuple[str, ...] = TASKS, rounds: int = 3, batch_size: int = 8
) -> None:
    """Measure and print the record.

    Args:
        json_file: Write the record to this file.
        tasks: Tasks without the network.
        rounds: Times that each adapter runs all tasks.
        batch_size: Requests that both compute together.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "starter"
        convert(resolve("starter"), folder, to="huggingface")
        model, words = Mistral7B.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
        theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size)
    adapters: dict[str, Callable[[], Any]] = {
        "ours": lambda: HarnessModel(model, words, batch_size), "lm_eval_hf": lambda: theirs,
    }  # fmt: skip
    differences: dict[str, float] = {}
    results: dict[str, Any] = {}
    seconds: dict[str, dict[str, list[float]]] = {task: {name: [] for name in adapters} for task in tasks}
    manager = find_tasks(tasks, FOLDER)
    for i in range(rounds + 1):
        for task in tasks:
            found = {}
            for name, make in adapters.items():
                adapter = make()
                gc.collect()
                began = time.perf_counter()
                found[name] = run_tasks(adapter, [task], manager=manager)
                if i > 0:  # not the first, which is warm-up of both
                    seconds[task][name].append(time.perf_counter() - began)
            differences[task] = difference(task, *(answers(found[name], task) for name in adapters))
            results[task] = {name: each["results"][task] for name, each in found.items()}
    best = {task: {name: round(min(each), 3) for name, each in own.items()} for task, own in seconds.items()}
    total = {name: round(sum(own[name] for own in best.values()), 3) for name in adapters}
    record = {
        "what": "lm-eval's tasks by our engine and by lm-eval's adapter of transformers", "model": "starter",
        "dtype": "float32", "batch_size": batch_size, "rounds": rounds, "largest_difference": differences,
        "results": {task: {name: {key: value for key, value in each.items() if isinstance(value, float)}
                           for name, each in own.items()} for task, own in results.items()},
        "seconds_best": best, "seconds": total, "ratio": round(total["lm_eval_hf"] / total["ours"], 2),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lm-eval")},
    }  # fmt: skip
    finish(record, json_file)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    tyro.cli(main)
