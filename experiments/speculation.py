"""Measure prompt lookup speculation on grounded tasks, and replay its traces at 7B size.

    python experiments/speculation.py [--dtype float32] [--tokens 200] [--json FILE]
    python experiments/speculation.py --shape 7b --scheme int4 --trace FILE [--json FILE]

The first command runs the bundled model with and without prompt lookup on text it was not trained on: it
continues a test file of this project, and repeats a function with a renamed argument. The exit code is 1 unless
the tokens are equal. FILE contains the results and the tokens of each run: a trace.

The second command replays traces on a model of another size with random weights. It feeds the prompt and tokens
of the trace; tokens are drafted, accepted and rolled back as in the original run, and each step takes the time
it takes at that size. It also times one step by its number of rows. `--shape demo` tests the command in
seconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_7b import Mistral7B, ModelArgs, SamplingParams, Tokenizer
from mistral_7b.cache import RollingCache
from mistral_7b.engine.speculation import StepTime, common_prefix_length
from mistral_7b.generate import Speculation, generate

ROOT = Path(__file__).parent.parent
FUNCTION = '''\
def read_rows(path, separator=","):
    """Read a table and return its rows as a list of dictionaries."""
    with open(path, encoding="utf-8") as file:
        header = file.readline().rstrip("\\n").split(separator)
        rows = []
        for line in file:
            values = line.rstrip("\\n").split(separator)
            if len(values) != len(header):
                raise ValueError("the line has %d values" % len(values))
            rows.append(dict(zip(header, values)))
    return rows


# The same with another name for the separator:

def read_rows(path, delimiter=","):
    """Read a table and return'''
TEMPERATURES = (0.0, 0.7)
ROWS = (1, 2, 3, 4, 6, 8, 11, 16)  # timed numbers of rows in a step


def tasks() -> dict[str, str]:
    """Return the prompts by name."""
    return {
        "continue a test file": (ROOT / "tests/sampling/test_sampling.py").read_text()[:2500],
        "edit": FUNCTION,
    }


def run_demo(options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Run every task with and without speculation; return the records, and whether all tokens are equal."""
    model = Mistral7B.from_pretrained("demo", dtype=getattr(torch, options.dtype))
    assert model.source is not None
    tokenizer = Tokenizer.from_pretrained(model.source)
    records = []
    for task, prompt in tasks().items():
        for temperature in TEMPERATURES:
            params = SamplingParams(temperature=temperature, seed=1, max_tokens=options.tokens, ignore_eos=True)
            ids = tokenizer.encode(prompt)
            speculate = Speculation(max_draft=options.max_draft)
            seconds, texts = [], []
            for how in (None, speculate):
                generate(model, [ids], SamplingParams(max_tokens=4, ignore_eos=True), tokenizer)  # warm
                began = time.perf_counter()
                output = generate(model, [ids], params, tokenizer, speculate=how)[0].outputs[0]
                seconds.append(time.perf_counter() - began)
                texts.append(output.token_ids)
            tally = speculate.tally
            records.append({
                "task": task, "temperature": temperature, "tokens_equal": texts[0] == texts[1],
                "tokens_per_s": round(options.tokens / seconds[0], 1),
                "tokens_per_s_guessing": round(options.tokens / seconds[1], 1),
                "speedup": round(seconds[0] / seconds[1], 2), "tokens_per_step": round(tally.tokens_per_step, 2),
                "acceptance": round(tally.acceptance, 3), **vars(tally),
                "prompt_token_ids": ids, "token_ids": texts[0],
            })  # fmt: skip
            show(records[-1])
    return records, all(record["tokens_equal"] for record in records)


@torch.inference_mode()
def replay(
    model: Mistral7B, prompt: Sequence[int], ids: Sequence[int], speculate: Speculation | None
) -> tuple[float, list[tuple[int, int]]]:
    """Return the seconds to generate `ids` after `prompt`, and the drafted and accepted tokens of each step."""
    most = speculate.max_draft if speculate else 0
    cache = prefilled(model, prompt, len(ids), most)
    speculator = speculate.speculator([*prompt, ids[0]], len(prompt) + len(ids)) if speculate else None
    step_time = StepTime(speculate.row_cost if speculate else None)
    generated, steps = 1, []
    began = time.perf_counter()
    while generated < len(ids):
        at = time.perf_counter()
        draft: list[int] = []
        if speculator and step_time.known:
            draft = speculator.propose(len(ids) - generated - 1, lambda n: step_time(1 + n), no_sampler)
        hidden = model.hidden(torch.tensor([[ids[generated - 1], *draft]]), cache)
        model.logits(hidden[0]).argmax(-1).tolist()
        accepted = common_prefix_length(draft, ids[generated:])
        new = ids[generated : generated + accepted + 1]
        if draft:
            cache.rollback(1 + len(draft) - len(new))
        if speculator:
            speculator.update(new)
        generated += len(new)
        steps.append((len(draft), accepted))
        step_time.add(1 + len(draft), time.perf_counter() - at)
    return time.perf_counter() - began, steps


def no_sampler(logits: Tensor, ahead: Sequence[int]) -> int:
    raise AssertionError("prompt lookup does not sample")


def prefilled(model: Mistral7B, prompt: Sequence[int], more: int, slack: int) -> RollingCache:
    """Return a cache with the prompt prefilled."""
    cache = model.rolling_cache(1, len(prompt) + more, slack=slack)
    for part in torch.tensor([prompt]).split(512, dim=1):
        model.hidden(part, cache)
    return cache


@torch.inference_mode()
def step_seconds(model: Mistral7B, prompt: Sequence[int], repeats: int) -> dict[int, float]:
    """Return the median seconds of a step by its number of rows, measured alternately."""
    cache = prefilled(model, prompt, max(ROWS), max(ROWS))
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for repeat in range(repeats + 1):
        for rows in ROWS:
            began = time.perf_counter()
            model.logits(model.hidden(torch.full((1, rows), 5), cache)[0]).argmax(-1).tolist()
            if repeat:  # the first round warms up
                seconds[rows].append(time.perf_counter() - began)
            cache.rollback(rows)
    return {rows: statistics.median(s) for rows, s in seconds.items()}


def run_replay(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Replay every trace of a file on a model of the given shape."""
    traces = json.loads(options.trace.read_text())["records"]
    if options.shape == "demo":
        model = Mistral7B.from_pretrained("demo", dtype=getattr(torch, options.dtype))
    else:
        from mistral_7b.quantization import random_model

        model = random_model(ModelArgs.v0_1(), options.scheme)
    cost = step_seconds(model, traces[0]["prompt_token_ids"], options.repeats)
    records: list[dict[str, Any]] = [
        {"what": "seconds of a step by rows", "seconds": {rows: round(s, 5) for rows, s in cost.items()},
         "in_steps_of_one_row": {rows: round(s / cost[1], 2) for rows, s in cost.items()}}
    ]  # fmt: skip
    show(records[-1])
    for trace in traces:
        prompt, ids = trace["prompt_token_ids"], trace["token_ids"]
        plain, _ = replay(model, prompt, ids, None)
        speculate = Speculation(max_draft=options.max_draft)
        seconds, steps = replay(model, prompt, ids, speculate)
        records.append({
            "task": trace["task"], "temperature": trace["temperature"], "shape": options.shape,
            "scheme": options.scheme, "tokens_per_s": round((len(ids) - 1) / plain, 2),
            "tokens_per_s_guessing": round((len(ids) - 1) / seconds, 2), "speedup": round(plain / seconds, 2),
            "tokens_per_step": round(speculate.tally.tokens_per_step, 2),
            "acceptance": round(speculate.tally.acceptance, 3), "guessed_and_right": steps,
        })  # fmt: skip
        show(records[-1])
    return records


def show(record: dict[str, Any]) -> None:
    print({k: v for k, v in record.items() if not isinstance(v, list)}, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("7b", "demo"), help="replay traces at this size")
    parser.add_argument("--scheme", default="int4", help="quantization of the 7B model")
    parser.add_argument("--trace", type=Path, help="a FILE written by the first command")
    parser.add_argument("--dtype", default="float32", help="type of the bundled model")
    parser.add_argument("--tokens", type=int, default=200, help="tokens generated per task")
    parser.add_argument("--max-draft", type=int, default=Speculation.max_draft)
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each step size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if (options.shape is None) != (options.trace is None):
        parser.error("--shape and --trace need each other")
    equal = True
    if options.shape:
        records = run_replay(options)
    else:
        records, equal = run_demo(options)
    if options.json:
        about = {
            "date": datetime.date.today().isoformat(), "torch": torch.__version__, "threads": options.threads,
            "shape": options.shape or "demo", "scheme": options.scheme if options.shape == "7b" else options.dtype,
        }  # fmt: skip
        options.json.write_text(json.dumps({**about, "records": records}) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
