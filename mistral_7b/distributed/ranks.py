"""The processes of a run as torchrun starts them, ranks 0 to W - 1, and what they sum and agree on.

    torchrun --nproc-per-node W -m mistral_7b COMMAND ...

All ranks run the same program on the same arguments, and every collective is called by all of them in the same
order. Rank 0 alone prints and writes files. Outside torchrun W is 1, and nothing here communicates. Imports torch
only to communicate.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from ..errors import ConfigError, DistributedError, first_line

T = TypeVar("T")
TIMEOUT = 300.0  # seconds that a rank waits for the others in a collective
LEADS = "MISTRAL_7B_LEADS"  # set where rank 0 decides for all (engine/followers.py)
REPORTED = "mistral_7b/reported"  # how many ranks have wanted to report an error


def size() -> int:
    """Return W, the number of processes that torchrun started for this run; 1 outside it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def sharing() -> int:
    """Return the number of processes of this run on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def leads() -> bool:
    """Whether rank 0 alone decides what all ranks compute."""
    return LEADS in os.environ


def launched() -> bool:
    """Whether torchrun started this process, also if it is the only one."""
    return "RANK" in os.environ


def start(timeout: float = TIMEOUT) -> None:
    """Connect the ranks, unless they are connected; a rank that is silent for `timeout` seconds ends the run."""
    import torch
    import torch.distributed as dist

    if not launched() or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backends, timeout=datetime.timedelta(seconds=timeout))


def connected() -> bool:
    """Whether `start` has connected this process with the others of the run."""
    if not launched():
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def first(value: Callable[[], T]) -> T:
    """Return rank 0's `value()`, on every rank; the others do not call theirs."""
    if not launched():
        return value()
    import torch.distributed as dist

    start()
    found = [value() if rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    return found[0]  # type: ignore[return-value]


def least(number: int) -> int:
    """Return the smallest of the ranks' numbers, where they are connected; else this one."""
    if not connected():
        return number
    import torch
    import torch.distributed as dist

    dist.all_reduce(found := torch.tensor(number), dist.ReduceOp.MIN)
    return int(found)


class Share:
    """The parts of every update that this process computes: part r, r + n, r + 2n... of replica r of n."""

    def __init__(self, replica: int = 0, replicas: int = 1) -> None:
        self.replica, self.replicas = replica, replicas
        self.interrupted = False  # since the last update, on any rank
        self._signals = 0

    def total(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the sums over all replicas; learn whether a rank was interrupted."""
        if not connected():
            return dict(sums)
        import torch
        import torch.distributed as dist

        own = list(sums.values()) if self.replicas > 1 else [0.0] * len(sums)
        dist.all_reduce(found := torch.tensor([float(self._signals), *own], dtype=torch.float64))
        signals, *totals = found.tolist()
        self.interrupted = signals > 0
        return dict(zip(sums, totals, strict=True)) if self.replicas > 1 else dict(sums)

    @contextlib.contextmanager
    def interrupted_between_updates(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM for the next `total`: ranks stop after the same update, or wait forever."""

        def note(number: int, frame: object) -> None:
            self._signals += 1

        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)} if connected() else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turn what gloo and NCCL raise when another process has ended or is silent into DistributedError."""
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        import torch.distributed as dist

        if not connected() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        silent = "imed out" in str(error)
        raise DistributedError(
            f"rank {rank()} of {size()} lost another process of the run: it "
            + (f"did not answer within the time limit ({first_line(error)})" if silent else "has ended"),
            hint="start the run again; training resumes from its last saved state, which is valid",
        ) from error


def reports() -> bool:
    """Whether this process prints the error that ends it: of all ranks the first, so that there is one message."""
    if size() == 1:
        return True
    import torch.distributed as dist

    try:  # of torchrun itself, so that it outlives any rank
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=10))
        return store.add(f"{REPORTED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return rank() == 0


def check_divides(field: str, parts: int, **counts: int) -> None:
    """Raise ConfigError, naming what cannot be divided, unless `parts` divides every count."""
    for name, count in counts.items():
        if count % parts:
            raise ConfigError(
                f"{field} {parts} does not divide {name}, which is {count}",
                field=field,
                hint=f"start a number of processes that divides {count}",
            )
