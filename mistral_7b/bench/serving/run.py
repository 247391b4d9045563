"""Run engines alternately under the same traffic, one point of the sweep after another.

Each engine at each point runs in its own process, so that no prefix cache carries over to the next.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import tempfile
from collections.abc import Callable, Iterator

from ... import machine
from ...errors import BenchmarkError
from ...kernels import threads
from ..jobs import LLAMA, OURS
from ..run import PEERS, PeerFiles, call, check_memory
from . import llama_server
from .client import Served
from .records import Circumstances, ServingRecord, record
from .traffic import ServingJob, Traffic


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """What to measure. `args` are the fields of ModelArgs; `model` is the name in the records.

    max_sequences  concurrent completions, of the peer as well
    server         path of llama.cpp's llama-server, to measure it too
    files          a folder to keep the peer's files in; None: a temporary one
    command        the command line, for the records
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
        """Yield the jobs in the order they run."""
        for traffic in self.points:
            for scheme in self.schemes:
                yield self.job(OURS, scheme, traffic)
                for engine, kind in PEERS[scheme][:1] if self.server else ():
                    if engine == LLAMA:
                        yield self.job(engine, kind, traffic)

    def job(self, engine: str, scheme: str, traffic: Traffic) -> ServingJob:
        source = self.source if engine == OURS else None
        return ServingJob(
            engine, scheme, self.args, source, traffic, self.max_sequences, self.max_batch_tokens, self.threads
        )


def run(plan: ServingPlan, tell: Callable[[str], None] = lambda text: None) -> list[ServingRecord]:
    """Run the plan. Jobs that cannot run are reported through `tell` and skipped.

    Raises BenchmarkError if no job could run.
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
                    tell(f"skipped: {job.engine} {job.scheme}: {error}")
                    missing[job.engine, job.scheme] = error
                    continue
                threads = served.threads  # the peer uses PyTorch's default, too
                found.setdefault((job.engine, job.scheme, job.traffic), (job, []))[1].append(served)
    if not found:
        raise next(iter(missing.values()))
    here = Circumstances(
        machine.cpu_name(), datetime.date.today().isoformat(), machine.commit(), plan.command, plan.model
    )
    return [record(job, rounds, here) for job, rounds in found.values()]


def measure(plan: ServingPlan, job: ServingJob, files: PeerFiles) -> Served:
    """Run one job. Raises BenchmarkError if it cannot run."""
    check_memory(job.args, job.scheme)
    if job.engine == OURS:
        return Served.from_dict(call(sys.executable, "serving", job.to_json()))
    assert plan.server is not None, "only a plan with a server has jobs for it"
    placed = dataclasses.replace(job, source=files.gguf(job.args, job.scheme))
    return llama_server.serve(placed, plan.server)
