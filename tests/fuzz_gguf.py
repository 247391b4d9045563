"""A million hostile GGUF files against the reader: python tests/fuzz_gguf.py [--inputs N] [--seed S]

With atheris (`pip install atheris`) installed, coverage of the reader guides which inputs are kept and damaged
further; without it, they are drawn blindly. Either way the structure-aware hand of gguf_inputs.py damages
them, and an input in three is grown by the grammar. Memory is limited by the system, so that a huge allocation
fails here and not on someone's machine; an input that takes a second of the processor is a hang. The first that
is neither opened nor refused is left in fuzz-failure.gguf. Without a corpus, a seed gives the same run again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import pathlib
import platform
import random
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
try:
    import atheris
except ImportError:
    atheris = None

import torch  # noqa: E402 - before instrumentation: its code is not what is looked at

with atheris.instrument_imports(include=["mistral_7b.checkpoint"]) if atheris else contextlib.nullcontext():
    from gguf_inputs import grown, mutated, seeds, survives

SLOWEST, MOST_MEMORY = (
    1.0,
    256 << 20,
)  # seconds of the processor an input; bytes beyond what the process has when it begins
LOADED = 50  # of those that open every how many-th is made a model of


class Fuzzer:
    """Tries inputs until there were enough, and keeps count."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.path = options, pathlib.Path(folder, "x.gguf")
        self.tried = self.opened = 0
        self.slowest, self.begun = 0.0, time.perf_counter()
        self.seeds = seeds()
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
        self.commit = git.stdout.strip()

    def try_one(self, raw: bytes) -> None:
        self.path.write_bytes(raw)
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SLOWEST)
        try:
            self.opened += survives(self.path, load=self.opened % LOADED == 0)
        except BaseException:
            pathlib.Path("fuzz-failure.gguf").write_bytes(raw)
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest = max(self.slowest, time.process_time() - begin)
        self.tried += 1
        if self.tried % 50_000 == 0:
            print(f"{self.tried} tried, {self.opened} opened", file=sys.stderr, flush=True)
        if self.tried == self.options.inputs:
            self.report()

    def mutate(self, raw: bytes, most: int, seed: int) -> bytes:
        """atheris' hand: an input made from one that was kept."""
        draw = random.Random(seed)
        return (grown(draw) if draw.random() < 1 / 3 else mutated(raw or draw.choice(self.seeds), draw))[:most]

    def blindly(self) -> None:
        draw = random.Random(self.options.seed)
        while self.tried < self.options.inputs:
            self.try_one(self.mutate(draw.choice(self.seeds), 1 << 20, draw.getrandbits(63)))

    def report(self) -> None:
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":")[1].strip() for line in f if "model name" in line), platform.machine())
        record = {
            "what": "GGUF reader fuzzed", "date": datetime.date.today().isoformat(), "hardware": cpu,
            "commit": self.commit, "command": shlex.join(["python", "tests/fuzz_gguf.py", *sys.argv[1:]]),
            "python": platform.python_version(), "torch": torch.__version__,
            "guided_by": "atheris (coverage)" if atheris else "chance",
            "inputs": self.tried, "opened": self.opened, "refused": self.tried - self.opened, "failures": 0,
            "seconds": round(time.perf_counter() - self.begun), "slowest_input_cpu_s": round(self.slowest, 4),
            "memory_limit_bytes_beyond_start": MOST_MEMORY,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }  # fmt: skip
        print(json.dumps(record, indent=2), flush=True)
        if self.options.out:
            pathlib.Path(self.options.out).write_text(json.dumps(record, indent=2) + "\n")


def hang(number: int, frame: object) -> None:
    raise TimeoutError(f"an input took {SLOWEST} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", help="a folder that keeps what atheris found worth keeping, for a next run")
    parser.add_argument("--out", help="a JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, hang)
    shared = "/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        fuzzer = Fuzzer(options, folder)
        for raw in fuzzer.seeds:  # once without a limit: what is imported on first use, and a model
            fuzzer.path.write_bytes(raw)
            assert survives(fuzzer.path)
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY, resource.RLIM_INFINITY))
        if atheris is None:
            fuzzer.blindly()
            return
        corpus = pathlib.Path(options.corpus or pathlib.Path(folder, "corpus"))
        corpus.mkdir(exist_ok=True)
        for i, raw in enumerate(fuzzer.seeds):
            (corpus / str(i)).write_bytes(raw)
        flags = [
            f"-runs={options.inputs}",
            f"-seed={options.seed}",
            "-max_len=65536",
            "-rss_limit_mb=0",
            "-verbosity=0",
        ]
        atheris.Setup([sys.argv[0], *flags, str(corpus)], fuzzer.try_one, custom_mutator=fuzzer.mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
