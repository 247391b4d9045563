"""`mistral-7b eval harness`: tasks of lm-eval on the engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from typing import Any

from ..errors import EvaluationError
from .inputs import ModelName, ModelOptions, UsageError, read_flags


@dataclasses.dataclass(frozen=True)
class Harness(ModelOptions):
    """Run tasks of lm-eval. Without the network: mini_choice, mini_python, mini_answers, mini_text."""

    model: ModelName = "demo"
    """A folder, a file, a hub id, "starter" or "demo"."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, or paths of YAML files."""
    include: str | None = None
    """A folder with YAML files of further tasks."""
    batch_size: int = 8
    """Requests of 2048 tokens that are computed together, or more short ones; the scores do not depend on it."""
    limit: int | None = None
    """Only the first documents of each task."""
    few_shot: int | None = None
    """Solved examples in a prompt; None: as the task says."""
    chat: bool = False
    """Put the prompts into the model's chat template."""
    json: bool = False
    """Print the results as one JSON object."""


def run(argv: list[str]) -> int:
    args = read_flags(Harness, "eval harness", argv)
    if not args.tasks:
        raise UsageError("--tasks is missing", field="--tasks", hint="name tasks, such as mini_choice")
    for name, low in (("batch_size", 1), ("limit", 1), ("few_shot", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} must be at least {low}, not {value}", field=flag)
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "`eval harness` needs lm-eval", field="lm_eval", hint="`pip install 'mistral-7b[eval]'` installs it"
        )
    from ..evaluation.task_names import check_names

    check_names(args.tasks, args.include)  # before lm-eval is imported, which takes seconds
    from ..evaluation.harness import evaluate, find_tasks

    manager = find_tasks(args.tasks, args.include)  # before the model is read
    model, tokenizer = args.open(args.model)

    found = evaluate(
        model, tokenizer, args.tasks, include=args.include, batch_size=args.batch_size, limit=args.limit,
        few_shot=args.few_shot, chat=args.chat, manager=manager,
    )  # fmt: skip
    results = {task: metrics_of(values) for task, values in found["results"].items()}
    if args.json:
        print(json.dumps({"model": args.model, "results": results}, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "documents", "metric", "value")
    for task, metrics in results.items():
        for name, value in metrics.items():
            if name != "documents":
                table.add_row(task, str(metrics.get("documents", "")), name, f"{value:.4f}")
    Console().print(table)
    return 0


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers in lm-eval's results of a task, and its number of documents."""
    out: dict[str, float] = {"documents": int(values["sample_len"])} if "sample_len" in values else {}
    for name, value in values.items():
        metric, _, filter_name = name.partition(",")
        if filter_name and isinstance(value, int | float) and not metric.endswith("_stderr"):
            out[metric if filter_name == "none" else f"{metric} ({filter_name})"] = float(value)
    return out
