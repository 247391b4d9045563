"""Measure the engine's overhead outside the model. Prints one line per record; --json writes all records.

    python experiments/engine.py --shape 7b --json FILE      some ten minutes, 8 GB

overhead       time of a step outside the model, with 32 sequences decoding and 0 to 10,000 waiting requests;
               its shares for scheduling, sampling and detokenization
one request    seconds with the engine and with a plain loop over a rolling cache (examples/loop.py), alternately
prefix         time to the first token with a cached prefix, compared with that of the first request
pages          KV cache held during the prefill of four windows, compared with the window and one step's tokens

The model's `hidden` and `logits` are wrapped with timers; the rest of a step counts as outside the model.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import random
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mistral_7b import machine
from mistral_7b.bench.serving.ours import words_for
from mistral_7b.cli.bench import SHAPES
from mistral_7b.engine import containment
from mistral_7b.engine.completion import Completion
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.kernels import backend
from mistral_7b.model import Mistral7B, ModelArgs
from mistral_7b.quantization import random_model
from mistral_7b.sampling.params import SamplingParams

BATCH = 32  # concurrent decoding sequences
WAITING = (0, 100, 1_000, 10_000)
SAMPLERS: dict[str, dict[str, float]] = {"greedy": {"temperature": 0}, "top_p": {"temperature": 0.7, "top_p": 0.9}}
STEPS = 24  # timed steps at each number of waiting requests
PREFIX, OWN = 2_000, 16  # shared and unshared tokens of a prompt
LONG = 4  # windows in the long prompt

LOOP = Path(__file__).resolve().parents[1] / "examples" / "loop.py"

Tell = Callable[..., None]


class Clock:
    """Total seconds spent in some methods of an object."""

    def __init__(self, of: Any, *names: str) -> None:
        self.of, self.methods, self.seconds = of, {name: getattr(of, name) for name in names}, 0.0

    def __enter__(self) -> Clock:
        for name, method in self.methods.items():
            setattr(self.of, name, self._timed(method))
        return self

    def __exit__(self, *_: object) -> None:
        for name, method in self.methods.items():
            setattr(self.of, name, method)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


class Words:
    """Random prompts, all different."""

    def __init__(self, vocabulary: int) -> None:
        self.draw, self.tokens = random.Random(0), range(3, vocabulary)

    def __call__(self, n: int) -> list[int]:
        return self.draw.choices(self.tokens, k=n)


def overhead(llm: LLM, words: Words, tell: Tell, name: str, waits: Sequence[int]) -> None:
    """Time steps of BATCH decoding sequences, in total and outside the model, with more and more waiting requests.

    With random weights all tokens have nearly the same probability, which is the worst case for top_p.
    """
    engine, waiting = llm.engine, []
    params = SamplingParams(**SAMPLERS[name], max_tokens=1_000, ignore_eos=True, seed=0)

    def add(n: int) -> None:
        for _ in range(n):
            request = llm.inputs.text(words(32), params, RequestOptions())
            engine.add(request)
            waiting.append(request.id)

    add(BATCH)
    running = [engine.requests[id].sequences[0] for id in waiting]
    while not all(s.decoding for s in running):
        engine.step()
        if failed := next((s.request.error for s in running if s.request.error), None):
            raise failed
    for n in waits:
        add(n - engine.scheduler.waiting)
        found = timed_steps(engine)
        assert engine.scheduler.waiting == n, "a waiting request has started"
        tell(f"step of {BATCH}, {name}, {n} waiting", **found, share=found["outside"] / found["step"])
    for id in waiting:
        engine.abort(id)


def timed_steps(engine: Engine) -> dict[str, float]:
    """Return the median seconds of a step, of its time outside the model, and of the parts of that."""
    clocks = {
        "model": Clock(engine.model, "hidden", "logits"), "scheduling": Clock(engine.scheduler, "plan", "advance"),
        "sampling": Clock(containment, "sample_rows"), "text": Clock(Completion, "push"),
    }  # fmt: skip
    rows: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        for clock in clocks.values():
            stack.enter_context(clock)
        for _ in range(STEPS + 1):
            before, began = {name: clock.seconds for name, clock in clocks.items()}, time.perf_counter()
            engine.step()
            step = time.perf_counter() - began
            parts = {name: clock.seconds - before[name] for name, clock in clocks.items()}
            rows.append({"step": step, "outside": step - parts.pop("model"), **parts})
    return {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}


def one_request(llm: LLM, words: Words, tell: Tell, rounds: int) -> None:
    """Time a new prompt of 128 tokens and 64 generated tokens, with the engine and with the loop."""
    model, loop = llm.engine.model, runpy.run_path(str(LOOP))["loop"]
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=64, ignore_eos=True, seed=0)
    runs: dict[str, Callable[[list[int]], Any]] = {
        "engine": lambda prompt: llm.generate(prompt, params),
        "loop": lambda prompt: list(loop(model, prompt, params, eos=-1)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        prompt = words(128)
        for name in sorted(runs, reverse=bool(turn % 2)):  # the second run may profit from warm caches
            began = time.perf_counter()
            runs[name](prompt)
            seconds[name].append(time.perf_counter() - began)
    # The machine drifts more than the two differ: ratios of adjacent runs are more robust.
    ratio = statistics.median(e / n for e, n in list(zip(seconds["engine"], seconds["loop"], strict=True))[1:])
    ours, plain = (statistics.median(seconds[name][1:]) for name in ("engine", "loop"))
    tell("one request of 128 + 64 tokens", engine=ours, loop=plain, engine_over_loop=ratio)


def prefix(llm: LLM, words: Words, tell: Tell, rounds: int) -> None:
    """Time the first token of a request with a cached prefix, and of the request that computed the prefix."""
    params = SamplingParams(temperature=0, max_tokens=1)
    first, second = [], []
    for _ in range(rounds):
        common = words(PREFIX)
        for times in (first, second):
            prompt = common + words(OWN)
            began = time.perf_counter()
            (output,) = llm.generate(prompt, params)
            times.append(time.perf_counter() - began)
        cached = output.num_cached_tokens
    a, b = statistics.median(first), statistics.median(second)
    name = f"first token, prompts of {PREFIX} + {OWN} tokens, {PREFIX} of them shared"
    tell(name, first=a, second=b, second_over_first=b / a, cached=cached)


def held_pages(llm: LLM, words: Words, tell: Tell) -> None:
    """Measure the peak number of KV pages held during a prompt of LONG windows."""
    engine, pool, model = llm.engine, llm.engine.pool, llm.engine.model
    window = model.args.sliding_window
    if window is None:
        return
    seen, began = [], time.perf_counter()
    hook = model.norm.register_forward_hook(lambda *_: seen.append(pool.held))  # within a step, at the peak
    llm.generate(words(LONG * window), SamplingParams(temperature=0, max_tokens=8))
    hook.remove()
    most = max(seen)
    token_bytes = sum(t[0, 0].nbytes for entries in pool.layers for t in entries)
    bound = window + engine.config.max_batch_tokens
    tell(
        f"pages of a prompt of {LONG * window} tokens, window {window}", seconds=time.perf_counter() - began,
        most_pages=most, most_tokens=most * pool.page, most_bytes=most * pool.page * token_bytes,
        window_and_step=bound, share=most * pool.page / bound,
    )  # fmt: skip


def build(shape: str, layers: int | None) -> Mistral7B:
    """Return the bundled model, or an int4 model with random weights."""
    if shape == "demo":
        return Mistral7B.from_pretrained("demo")
    return random_model(ModelArgs(**{**SHAPES[shape], **({"n_layers": layers} if layers else {})}), "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", "demo", "7b"), default="7b")
    parser.add_argument("--layers", type=int, help="number of layers, with random weights")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of alternating measurements")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records: list[dict[str, Any]] = []

    def tell(what: str, **figures: float) -> None:
        records.append({"what": what, **figures})
        print(f"{what:<70}" + "  ".join(f"{name} {value:.5g}" for name, value in figures.items()), flush=True)

    model = build(options.shape, options.layers).eval()
    llm = LLM(model, EngineConfig(max_sequences=BATCH), tokenizer=words_for(model))
    words = Words(model.args.vocab_size)
    overhead(llm, words, tell, "greedy", WAITING)
    overhead(llm, words, tell, "top_p", WAITING[:1])
    one_request(llm, words, tell, options.rounds)
    prefix(llm, words, tell, min(2, options.rounds))
    held_pages(llm, words, tell)
    llm.engine.check()
    if options.json:
        head = {
            "date": datetime.date.today().isoformat(), "commit": machine.commit(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "cpu": machine.cpu_name(), "kernels": backend.running(),
            "shape": options.shape, "layers": model.args.n_layers,
            "command": f"python experiments/engine.py --shape {options.shape}",
        }  # fmt: skip
        options.json.write_text(json.dumps({**head, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
