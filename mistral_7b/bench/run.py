"""Run jobs, each in its own process, and collect records.

Engines alternate within each workload (ours, peer, ours, peer ...), so that a drift of the machine affects all of
them. The parent process holds no model, which leaves the memory to the jobs.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .. import machine
from ..errors import BenchmarkError
from ..kernels import threads
from ..kernels.cpu import compiler
from . import work
from .jobs import BATCH, BATCH_PROMPT, LLAMA, LOADS, OURS, TRANSFORMERS, Job, Measured
from .records import Record, record
from .roofline import PROBES, Ceilings

PACKAGE = pathlib.Path(__file__).parent.parent
# The peers of each of our schemes: of as many bits per weight, or of comparable quality.
PEERS = {
    "int4": ((LLAMA, "Q4_0"), (LLAMA, "Q4_K_M")),
    "q4_k_m": ((LLAMA, "Q4_K_M"),),
    "q6_k": ((LLAMA, "Q6_K"),),
    "int8": ((LLAMA, "Q8_0"),),
    "bf16": ((LLAMA, "BF16"), (TRANSFORMERS, "bf16")),
    "none": ((TRANSFORMERS, "bf16"),),
}
# Environment variables that speed up peers: with malloc on huge pages llama.cpp decodes Q4_0 of 7B at 7.55 tokens
# per second, else at 7.22 (two cores of a Sapphire Rapids). This package allocates its own (cpu/huge_pages.py).
PEER_VARIABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SPARE = 1 << 30  # bytes besides weights and cache: activations, libraries
CEILINGS_SECONDS = 60.0  # for all probes; 7 s suffice on an idle machine
ENDING = 1.0  # seconds from the probes' deadline to that of the process


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure. `args` are the fields of ModelArgs; `model` is the name in the records."""

    model: str
    args: dict[str, Any]
    source: str | None
    schemes: tuple[str, ...]
    whats: tuple[str, ...]
    context: int = 512
    prompt: int = 512
    threads: int | None = None
    quick: bool = False
    rounds: int = 1
    peers: bool = False
    peer_python: str = sys.executable
    files: str | None = None  # a folder to keep the peers' files in
    adapter: str | None = None  # a LoRA adapter, for this package alone

    def __post_init__(self) -> None:
        threads.check(self.threads)

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs in the order they run."""
        for what in self.whats:
            seen = []
            for scheme in self.schemes:
                for engine, kind in ((OURS, scheme), *(PEERS[scheme] if self.peers else ())):
                    if (engine, kind) in seen or (what == "load" and engine == TRANSFORMERS):
                        continue  # transformers needs the model on disk in its own format
                    seen.append((engine, kind))
                    yield self.job(engine, kind, what)

    def job(self, engine: str, scheme: str, what: str) -> Job:
        prompt = {"decode": self.context, "prefill": self.prompt, "batch16": BATCH_PROMPT, "load": 1}[what]
        return Job(
            engine, scheme, what, self.args, self.source if engine == OURS else None,
            rows=BATCH if what == "batch16" else 1, prompt=prompt, threads=self.threads, quick=self.quick,
            adapter=self.adapter if engine == OURS else None,
        )  # fmt: skip


def run(plan: Plan, tell: Callable[[str], None] = lambda text: None) -> list[Record]:
    """Run the plan; ceilings are measured before and after, and the better values count.

    All engines use the number of threads of the ceilings. Jobs that cannot run are reported through `tell` and
    skipped. Raises BenchmarkError if no job could run.
    """
    compiler.library()  # so that no measurement includes compiling it
    tell("measuring this machine's ceilings")
    ceilings = measure_ceilings(plan.threads, plan.quick)
    plan = dataclasses.replace(plan, threads=ceilings.threads)
    found: dict[tuple[str, str, str], tuple[Job, list[Measured]]] = {}
    missing: dict[tuple[str, str], BenchmarkError] = {}
    with tempfile.TemporaryDirectory(prefix="mistral-7b-bench-") as folder:
        files = PeerFiles(plan.peer_python, plan.files or folder, tell)
        for turn in range(plan.rounds):
            for job in plan.jobs():
                if (job.engine, job.scheme) in missing:
                    continue
                tell(f"{job.what}: {job.engine} {job.scheme}" + (f", round {turn + 1}" if plan.rounds > 1 else ""))
                try:
                    check_memory(job.args, job.scheme)
                    runs = measure(files.placed(job), plan.peer_python)
                except BenchmarkError as error:
                    tell(f"skipped: {job.engine} {job.scheme}: {error}")
                    missing[job.engine, job.scheme] = error
                    continue
                found.setdefault((job.engine, job.scheme, job.what), (job, []))[1].extend(runs)
    if not found:
        raise next(iter(missing.values()))
    if not plan.quick:
        ceilings = ceilings.best(measure_ceilings(plan.threads))
    cpu, date, commit = machine.cpu_name(), datetime.date.today().isoformat(), machine.commit()
    return [
        record(job, runs, ceilings, cpu=cpu, date=date, commit=commit, model=plan.model)
        for job, runs in found.values()
    ]


def measure_ceilings(threads: int | None = None, quick: bool = False) -> Ceilings:
    """Measure all ceilings. BenchmarkError if that takes more than a minute."""
    found = find_ceilings(threads, quick)
    if left := [name for name in PROBES if name not in found]:
        raise BenchmarkError(
            f"the ceilings ({', '.join(left)}) could not be measured within {CEILINGS_SECONDS} seconds",
            field=", ".join(left),
            hint="close other programs",
        )
    return Ceilings(**found)


def find_ceilings(
    threads: int | None = None,
    quick: bool = False,
    seconds: float = CEILINGS_SECONDS,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return the fields of Ceilings measured within `seconds`; `tell` gets the next name.

    Runs in a separate process, which briefly uses gigabytes of memory. Its probes share the time, and the process
    is killed at the deadline.
    """
    arguments = json.dumps([threads, quick, time.time() + seconds - ENDING])
    found: dict[str, Any] = {}
    tell("starting")
    for line in _lines(sys.executable, "process", ("ceilings", arguments), {}, seconds):
        found |= json.loads(line)
        if left := [name for name in PROBES if name not in found]:
            tell(left[0])
    return found


def measure(job: Job, peer_python: str) -> list[Measured]:
    """Run a job in one process; for load in several, the first of which warms the page cache."""
    python = sys.executable if job.engine == OURS else peer_python
    if job.engine == TRANSFORMERS and not _imports(python, "transformers"):
        python = sys.executable  # the peer's Python may have only llama.cpp
    runs = []
    for n in range(1 + LOADS[job.quick] if job.what == "load" else 1):
        now = dataclasses.replace(job, started=time.time()) if job.what == "load" else job
        runs.append(Measured(**call(python, now.to_json(), **({} if job.engine == OURS else PEER_VARIABLES))))
        if job.what == "load" and n == 0:
            runs.clear()
    return runs


def check_memory(args: dict[str, Any], scheme: str) -> None:
    """Raise BenchmarkError if the weights do not fit in free memory."""
    weights = work.weight_memory(args, scheme)
    need, free = weights + SPARE, machine.memory()[1]
    if free and need > free:
        raise BenchmarkError(
            f"{scheme} weights of this shape take {weights / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            field="--layers",
            hint="close other programs, or use fewer --layers",
        )


class PeerFiles:
    """GGUF files of random weights for llama.cpp, one per type, created when first needed."""

    def __init__(self, python: str, folder: str, tell: Callable[[str], None]) -> None:
        self.python, self.folder, self.tell = python, pathlib.Path(folder).expanduser(), tell

    def placed(self, job: Job) -> Job:
        """Return the job with the path of the file it needs."""
        if job.engine != LLAMA:
            return job
        need(self.python, "llama_cpp", "gguf")
        return dataclasses.replace(job, source=self.gguf(job.args, job.scheme))

    def gguf(self, args: dict[str, Any], scheme: str) -> str:
        """Return the file of this shape and type. BenchmarkError if it cannot be created."""
        shape = "-".join(str(args[k]) for k in ("n_layers", "dim", "hidden_dim", "vocab_size"))
        path = self.folder / f"random-words-{shape}-{scheme}.gguf"
        if not path.exists():
            need(self.python, "gguf")
            self.tell(f"writing {path.name}, random weights")
            self.folder.mkdir(parents=True, exist_ok=True)
            size, free = work.weight_memory(args, scheme), shutil.disk_usage(self.folder).free
            if size > free:
                raise BenchmarkError(
                    f"{path.name} takes {size / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f}",
                    field="--keep",
                    hint="use a folder with more free space",
                )
            temporary = path.with_suffix(".part")
            try:
                _python(
                    self.python,
                    "peers.llama_file",
                    str(temporary),
                    scheme,
                    json.dumps({**args, "promoted": _promoted(args["n_layers"])}),
                )
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)
        return str(path)


def need(python: str, *modules: str) -> None:
    """Raise BenchmarkError if this Python lacks one of the modules."""
    if not _imports(python, *modules):
        raise BenchmarkError(
            f"{python} has no {' and '.join(modules)}",
            field="--peer-python",
            hint="pip install llama-cpp-python gguf, or name with --peer-python the Python that has them",
        )


def call(python: str, *argv: str, **variables: str) -> dict[str, Any]:
    output = _python(python, "process", *argv, **variables).strip()
    if not output:
        raise BenchmarkError("the process ended without a result")
    out: dict[str, Any] = json.loads(output.splitlines()[-1])
    return out


def _python(python: str, module: str, *argv: str, **variables: str) -> str:
    """Run a module of this package and return its output, see `_lines`."""
    return "".join(_lines(python, module, argv, variables))


def _lines(
    python: str, module: str, argv: Sequence[str], variables: Mapping[str, str], seconds: float | None = None
) -> Iterator[str]:
    """Run a module of this folder under any Python, with only this package added to its path.

    Yields each line of stdout as it is printed. The process is killed after `seconds`. `variables` are set in its
    environment unless the user has set them. Raises BenchmarkError with the error of the process (`_failure`).
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    with tempfile.TemporaryDirectory(prefix="mistral-7b-path-") as path, tempfile.TemporaryFile("w+") as error_log:
        (pathlib.Path(path) / PACKAGE.name).symlink_to(PACKAGE, target_is_directory=True)
        before = os.environ.get("PYTHONPATH")
        environment = {
            **variables,
            **os.environ,
            "PYTHONPATH": os.pathsep.join([path, *([before] if before else [])]),
        }
        command = [python, "-m", f"mistral_7b.bench.{module}", *argv]
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=error_log, text=True, env=environment
            )
        except OSError as error:
            raise BenchmarkError(f"{python} cannot be run: {error.strerror}") from error
        timer = threading.Timer(seconds or threading.TIMEOUT_MAX, end)
        timer.daemon = True
        timer.start()
        with process:
            try:
                assert process.stdout is not None
                yield from process.stdout
                process.wait()
            finally:
                timer.cancel()
                process.kill()  # no effect if it has exited
        error_log.seek(0)
        output = error_log.read().strip().splitlines()
    if late.is_set():
        return
    if process.returncode < 0:
        why = " (out of memory?)" if process.returncode == -9 else ""
        raise BenchmarkError(f"the process was killed by signal {-process.returncode}{why}")
    if process.returncode:
        raise _failure(output, process.returncode)


def _failure(output: Sequence[str], code: int) -> BenchmarkError:
    """Build the error of a failed process from the last line of its stderr: JSON data or text."""
    last = output[-1] if output else f"the process ended with code {code}"
    try:
        return BenchmarkError(**json.loads(last))
    except (ValueError, TypeError):
        return BenchmarkError(last)


def _imports(python: str, *modules: str) -> bool:
    """Return whether this Python can import the modules."""
    code = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {modules!r})))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise BenchmarkError(
            f"--peer-python {python} cannot be run: {error.strerror}", field="--peer-python"
        ) from error


def _promoted(n_layers: int) -> list[int]:
    """The layers whose wv and w2 llama.cpp's Q4_K_M keeps in Q6_K."""
    from ..quantization.schemes import is_promoted

    return [layer for layer in range(n_layers) if is_promoted(f"layers.{layer}.feed_forward.w2", n_layers)]
