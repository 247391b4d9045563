"""The OpenMP threads of the engine: how many a step uses, and those of a Python thread that no longer computes."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from typing import NamedTuple

import torch

from .. import machine

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SOFT = 1  # omp_pause_soft of OpenMP 5.0: release resources, keep the state
CPU_SECONDS = 0.03  # of this process, after which its number of threads is decided again
PREEMPTED = 50  # preemptions per CPU second: alone there are below 5, beside a busy process some 300
SHARE = 0.8  # of the time asked for; this process's own other threads preempt too, but count as its time
PATIENCE, LONGEST = 1.0, 64.0  # seconds until more threads are tried again: doubled by each failure


def release_openmp_threads() -> None:
    """Release the OpenMP threads of the calling thread, before another thread computes.

    OpenMP keeps a pool of threads for each thread that has run a parallel loop. When two pools together exceed the
    cores, GNU's threads sleep instead of spinning until the next loop, and each loop of a small model takes three
    times as long. The pool is recreated when this thread computes again.
    """
    with suppress(OSError, AttributeError):  # another OpenMP, or none: nothing to release
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(SOFT)


class Usage(NamedTuple):
    """Seconds on the clock, CPU seconds of this process, and how often the system has preempted it."""

    wall: float
    cpu: float
    preemptions: int


def usage() -> Usage:
    """The usage of this process so far."""
    if resource is None:
        return Usage(time.perf_counter(), 0.0, 0)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_nivcsw)


class SharedCores:
    """A context in which PyTorch and the kernels use no more threads than there are cores to be had.

    The threads of a parallel loop spin until the last one is done. Nothing is faster on idle cores, but where one
    of them waits for a core that another program uses, a step takes up to a hundred times as long. So the number
    of threads is halved while the system preempts this process for others, and doubled when it no longer does, up to
    PyTorch's own number and this process's CPUs and quota. A number above the machine's CPUs was asked for on
    purpose, and is kept.
    """

    def __init__(self) -> None:
        self.cpus, self.cores = os.cpu_count() or 1, machine.cores()
        self.threads = min(self.cores, self._free(1))
        self._patience, self._next_try = PATIENCE, 0.0
        self._wall, self._cpu, self._preemptions = 0.0, 0.0, 0  # in this context since the last decision

    def __enter__(self) -> None:
        self._asked = torch.get_num_threads()
        self._used = min(self.threads, self._asked) if self._asked <= self.cpus else self._asked
        if self._used != self._asked:
            torch.set_num_threads(self._used)
        self._began = usage()

    def __exit__(self, *error: object) -> None:
        if self._used != self._asked:
            torch.set_num_threads(self._asked)
        if self._asked == 1 or self._used > self.cpus:
            return
        now = usage()
        self._wall += now.wall - self._began.wall
        self._cpu += now.cpu - self._began.cpu
        self._preemptions += now.preemptions - self._began.preemptions
        if self._cpu >= CPU_SECONDS:
            self.decide(now.wall)
            self._wall, self._cpu, self._preemptions = 0.0, 0.0, 0

    def decide(self, now: float) -> None:
        """Change the number of threads, by the usage since the last decision."""
        if self._preemptions > PREEMPTED * self._cpu and self._cpu < SHARE * self._wall * self._used:
            self._next_try = now + self._patience
            if self._used > 1:
                self._patience = min(2 * self._patience, LONGEST)
            self.threads = max(1, self._used // 2)
        elif self.threads < self.cores and now >= self._next_try and self._free(self.threads) > self.threads:
            self.threads = min(2 * self.threads, self.cores)
            self._next_try = now + self._patience
        elif now >= self._next_try + LONGEST:
            self._patience = PATIENCE

    def _free(self, own: int) -> int:
        """The CPUs of this machine that no other program wants just now, at least one."""
        return max(1, self.cpus - max(0, machine.runnable() - own))
