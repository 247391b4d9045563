"""Decode speed on shared and on idle cores, by how the threads of parallel loops wait.

    python experiments/busy_cores.py [--models demo mid] [--kinds bfloat16 int8] [--rounds 5] [--json FILE]

ours          as installed: threads spin, or sleep beside busy programs (engine/threads.py)
torch first   torch is imported before mistral_7b, so that its OpenMP library has read its environment already
one thread    as ours, with --threads 1
passive       a fixed number of threads and OMP_WAIT_POLICY=PASSIVE: they never spin
spinning      a fixed number of threads, which spin as long as GNU's OpenMP has it: some milliseconds
spin N        a fixed number of threads and GOMP_SPINCOUNT=N, for each N of --spin

Every setting is a long-lived process; they run a round each in turn, first alone ("idle", which means something
only on a quiet machine), then beside one busy process per core ("loaded"). A row gives the median tokens per
second, and the median over the rounds of the ratio to the best setting of that round. The goals: loaded at least
1/1.3 = 0.77 for "ours" and "torch first"; idle, "ours" at least 0.98.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commits import commit_of

HERE = Path(__file__).resolve().parents[1]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
MID = {"dim": 1024, "n_layers": 8, "head_dim": 64, "hidden_dim": 3584, "n_heads": 16, "n_kv_heads": 4}
SETTINGS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {  # name -> environment, arguments of `serve`
    "ours": ({}, ()),
    "torch first": ({}, ("--torch-first",)),
    "one thread": ({}, ("--threads", "1")),
    "passive": ({"OMP_WAIT_POLICY": "PASSIVE"}, ("--fixed",)),
    "spinning": ({}, ("--fixed",)),
}
BUSY = "while True: pass"
Speeds = dict[str, list[float]]


def serve(model_name: str, kind: str, seconds: float, threads: int | None) -> None:
    """Decode for some seconds for each line of stdin, and print the tokens per second."""
    import torch

    from mistral_7b import LLM, Mistral7B, ModelArgs, SamplingParams
    from mistral_7b.kernels import threads as thread_count
    from mistral_7b.quantization.schemes import random_model

    thread_count.use(threads)
    torch.manual_seed(0)
    scheme = None if kind == "bfloat16" else kind
    if model_name == "demo":
        model = Mistral7B.from_pretrained("demo", quantization=scheme)
    else:
        model = random_model(ModelArgs(**MID), scheme, torch.bfloat16)
    llm = LLM(model)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    llm.generate([[1, 5, 7]], params)
    print("ready", flush=True)
    for _ in sys.stdin:
        tokens, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            llm.generate([[1, 5, 7]], params)
            tokens += 24
        print(tokens / took, flush=True)


class Process:
    """A process with one setting."""

    def __init__(self, environment: dict[str, str], arguments: list[str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**kept, "PYTHONPATH": str(HERE), **environment}, text=True,
        )  # fmt: skip
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def round(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.read())

    def close(self) -> None:
        self.process.communicate()


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep that many cores busy."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def compare(settings: dict[str, Process], rounds: int, busy: int) -> Speeds:
    """Run the settings in turn, each measurement beside `busy` processes that live no longer than it."""
    speeds: Speeds = {name: [] for name in settings}
    for _ in range(rounds):
        for name, process in settings.items():
            with load(busy):
                speeds[name].append(process.round())
    return speeds


def ratios(speeds: Speeds) -> dict[str, float]:
    """Return each setting's median ratio to the best one of the same round."""
    best = [max(round_) for round_ in zip(*speeds.values(), strict=True)]
    return {
        name: statistics.median(mine / top for mine, top in zip(found, best, strict=True))
        for name, found in speeds.items()
    }


def measure(options: argparse.Namespace, model: str, kind: str, cores: int) -> list[dict[str, Any]]:
    """Return the records of one model in one kind, and print their rows."""
    chosen = {**SETTINGS, **{f"spin {n}": ({"GOMP_SPINCOUNT": str(n)}, ("--fixed",)) for n in options.spin}}
    processes: dict[str, Process] = {}
    records = []
    try:
        for name, (environment, extra) in chosen.items():
            arguments = ["--models", model, "--kinds", kind, "--seconds", str(options.seconds), *extra]
            processes[name] = Process(environment, arguments)
        for state in options.states:
            before = os.getloadavg()[0]
            speeds = compare(processes, options.rounds, cores if state == "loaded" else 0)
            share = ratios(speeds)
            for name, found in speeds.items():
                median = statistics.median(found)
                print(
                    f"{model:<6}{kind:<10}{state:<8}{name:<13}{median:9.1f} tokens/s  {share[name]:5.2f}",
                    flush=True,
                )
                records.append(
                    {"model": model, "kind": kind, "state": state, "setting": name, "tokens_per_second": found,
                     "ratio_to_best": share[name], "load_before": before}
                )  # fmt: skip
    finally:
        for process in processes.values():
            process.close()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("demo", "mid"), default=["demo", "mid"])
    parser.add_argument("--kinds", nargs="+", choices=("bfloat16", "int8", "int4"), default=["bfloat16", "int8"])
    parser.add_argument("--states", nargs="+", choices=("idle", "loaded"), default=["idle", "loaded"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="length of a measurement")
    parser.add_argument("--spin", type=int, nargs="*", default=[], help="other values of GOMP_SPINCOUNT")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--torch-first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fixed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        if options.torch_first:
            import torch  # noqa: F401
        if options.fixed:
            from mistral_7b.engine import forward

            forward.SharedCores = contextlib.nullcontext  # type: ignore[misc, assignment]
        serve(options.models[0], options.kinds[0], options.seconds, options.threads)
        return
    from mistral_7b import machine

    cores = machine.cores()
    records = [
        record
        for model in options.models
        for kind in options.kinds
        for record in measure(options, model, kind, cores)
    ]
    if options.json:
        facts = {"date": datetime.date.today().isoformat(), "cpu": machine.cpu_name(), "cores": cores}
        command = ["experiments/busy_cores.py", *sys.argv[1:]]
        whole = {**facts, "commit": commit_of(HERE), "command": command, "measurements": records}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
