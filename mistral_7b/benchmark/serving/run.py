"""Engines in turn under the same traffic, one point of the sweep after another.

Each engine at each point is a process of its own, so that no keys and values of one point are found by the next.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import tempfile
from collections.abc import Callable, Iterator

from ...errors import BenchmarkError
from ...kernels import threads
from .. import machine
from ..jobs import LLAMA, OURS
from ..run import PEERS, PeerFiles, call, check_memory
from . import llama_server
from .client import Served
from .records import Circumstances, ServingRecord, record
from .traffic import ServingJob, Traffic


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """What is to be measured. `args` are the fields of ModelArgs, `model` the name in the records.

    max_sequences  completions computed together, of the peer as well
    server         llama.cpp's llama-server, if it is to be measured too
    files          a folder that keeps the peer's files; none: a temporary one
    command        as it was given, for the records
    """

    model: str
    args: dict
    source: str | None
    schemes: tuple[str, ...]
    points: tuple[Traffic, ...]
    max_sequences: int
    max_batch_tokens: int
    threads: int | None = None
    rounds: int = 1
    server: str | None = None
    peer_python: str = sys.executable
    files: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        threads.check(self.threads)

    def jobs(self) -> Iterator[ServingJob]:
        """In the order in which they run."""
        for traffic in self.points:
            for scheme in self.schemes:
                yield self.job(OURS, scheme, traffic)
                for engine, kind in PEERS[scheme] if self.server else ():
                    if engine == LLAMA:
                        yield self.job(engine, kind, traffic)

    def job(self, engine: str, scheme: str, traffic: Traffic) -> ServingJob:
        source = self.source if engine == OURS else None
        return ServingJob(
            engine, scheme, self.args, source, traffic, self.max_sequences, self.max_batch_tokens, self.threads
        )


def run(plan: ServingPlan, tell: Callable[[str], None] = lambda text: None) -> list[ServingRecord]:
    """Measure everything in the plan. What cannot be done here is told, and left out.

    Raises BenchmarkError if that is everything.
    """
    found: dict[tuple[str, str, Traffic], tuple[ServingJob, list[Served]]] = {}
    missing: dict[tuple[str, str], BenchmarkError] = {}
    with tempfile.TemporaryDirectory(prefix="mistral-7b-bench-") as folder:
        files, threads = PeerFiles(plan.peer_python, plan.files or folder, tell), plan.threads
        for turn in range(plan.rounds):
            for job in plan.jobs():
                if (job.engine, job.scheme) in missing:
                    continue
                again = f", round {turn + 1}" if plan.rounds > 1 else ""
                tell(f"serving, {job.traffic.name}: {job.engine} {job.scheme}{again}")
                try:
                    served = measure(plan, dataclasses.replace(job, threads=threads), files)
                except BenchmarkError as error:
                    tell(f"left out: {job.engine} {job.scheme}: {error}")
                    missing[job.engine, job.scheme] = error
                    continue
                threads = served.threads  # the peer takes as many as PyTorch has taken by itself
                found.setdefault((job.engine, job.scheme, job.traffic), (job, []))[1].append(served)
    if not found:
        raise next(iter(missing.values()))
    here = Circumstances(
        machine.cpu_name(), datetime.date.today().isoformat(), machine.commit(), plan.command, plan.model
    )
    return [record(job, rounds, here) for job, rounds in found.values()]


def measure(plan: ServingPlan, job: ServingJob, files: PeerFiles) -> Served:
    """Run one job. BenchmarkError says why it cannot be."""
    check_memory(job.args, job.scheme)
    if job.engine == OURS:
        return Served.from_dict(call(sys.executable, "serving", job.to_json()))
    assert plan.server is not None, "only a plan with a server has jobs for it"
    placed = dataclasses.replace(job, source=files.gguf(job.args, job.scheme))
    return llama_server.serve(placed, plan.server)
