"""The OpenMP threads of the engine: how they wait, and those of a Python thread that no longer computes."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from contextlib import suppress
from typing import NamedTuple

import torch

from .. import machine
from ..model import Mistral7B

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SOFT = 1  # omp_pause_soft of OpenMP 5.0: release resources, keep the state
CPU_SECONDS = 0.03  # of this process, after which it is decided again how its threads wait
PREEMPTED = 50  # preemptions per CPU second: alone there are below 5, beside a busy process some 300
SHARE = 0.8  # of the time asked for; this process's own other threads preempt too, but count as its time
PATIENCE, LONGEST = 1.0, 64.0  # seconds until spinning is tried again: doubled by each failure
POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # the user's own choice
LIGHT = 5 << 20  # bytes for each layer, read in four loops: waking a thread takes 40 us, in which it reads 0.6 MB
GRAIN = 1 << 15  # elements for which PyTorch uses another thread


def release_openmp_threads() -> None:
    """Release the OpenMP threads of the calling thread, before another thread computes.

    OpenMP keeps a pool of threads for each thread that has run a parallel loop. When two pools together exceed the
    cores, GNU's threads sleep instead of spinning until the next loop, and each loop of a small model takes three
    times as long. The pool is recreated when this thread computes again.
    """
    with suppress(OSError, AttributeError):  # another OpenMP, or none: nothing to release
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(SOFT)


def is_light(model: Mistral7B) -> bool:
    """Whether waking another thread for each parallel loop of a step takes longer than that thread saves.

    Only if all products are those of the project's kernels: sums of PyTorch's may depend on the number of threads.
    """
    if any(type(m) is torch.nn.Linear for m in model.modules()):
        return False
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return weights < LIGHT * model.args.n_layers


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
    """A context in which the threads of parallel loops wait as suits the cores: spinning, or asleep.

    The threads of a parallel loop spin until the last one is done. Nothing is faster on idle cores, but where one
    of them waits for a core that another program uses, a step takes up to a hundred times as long. So they sleep
    while the system preempts this process for others, and spin again when it no longer does. It works whether or
    not torch was imported before this package, unlike OMP_WAIT_POLICY, which is read once; where that is set, it
    holds. There are no more threads than this process's CPUs and quota, unless more than the machine has were
    asked for on purpose.

    With `light`, loops are so short that waking threads takes longer than what they save: one thread computes
    while the others would sleep.
    """

    def __init__(self, light: bool = False) -> None:
        self.light = light
        self.cpus, self.cores = os.cpu_count() or 1, machine.cores()
        self.fixed = any(name in os.environ for name in POLICIES)
        self._sleeping: Sleeping | None = None
        self._patience, self._next_try = PATIENCE, 0.0
        self._wall, self._cpu, self._preemptions = 0.0, 0.0, 0  # in this context since the last decision

    @property
    def sleeping(self) -> bool:
        """Whether threads sleep at the end of a loop."""
        return self._sleeping is not None

    def __enter__(self) -> None:
        self._asked = torch.get_num_threads()
        self._used = min(self.cores, self._asked) if self._asked <= self.cpus else self._asked
        if self._used > 1 and not self.fixed and self._next_try == 0.0:  # the first step
            self._next_try = time.perf_counter()
            self._sleep(self._crowded(1))
        self._running = 1 if self.light and self.sleeping else self._used
        if self._running != self._asked:
            torch.set_num_threads(self._running)
        self._began = usage()

    def __exit__(self, *error: object) -> None:
        if self._running != self._asked:
            torch.set_num_threads(self._asked)
        if self._used == 1 or self.fixed:
            return
        now = usage()
        self._wall += now.wall - self._began.wall
        self._cpu += now.cpu - self._began.cpu
        self._preemptions += now.preemptions - self._began.preemptions
        if self._cpu >= CPU_SECONDS:
            self._decide(now.wall)
            self._wall, self._cpu, self._preemptions = 0.0, 0.0, 0

    def _decide(self, now: float) -> None:
        """Let the threads sleep or spin, by the usage since the last decision."""
        if self._preemptions > PREEMPTED * self._cpu and self._cpu < SHARE * self._wall * self._running:
            if not self.sleeping:
                self._patience = min(2 * self._patience, LONGEST)
            self._sleep(True)
            self._next_try = now + self._patience
        elif self.sleeping and now >= self._next_try and not self._crowded(self._running):
            self._sleep(False)
            self._next_try = now + self._patience
        elif not self.sleeping and now >= self._next_try + LONGEST:
            self._patience = PATIENCE

    def _crowded(self, own: int) -> bool:
        """Whether the threads of other programs, and those of a step, are more than the CPUs just now."""
        return max(0, machine.runnable() - own) + self._used > self.cpus

    def _sleep(self, wanted: bool) -> None:
        if wanted and self._sleeping is None:
            self._sleeping = Sleeping(self.cpus)
            torch.set_num_threads(self._asked)  # a part of that number is common to all Python threads
        elif not wanted and self._sleeping is not None:
            self._sleeping.end()
            self._sleeping = None


class Sleeping:
    """While it lives, all OpenMP threads sleep when they wait: there are more of them than CPUs.

    GNU's library decides so from the number of threads in its pools. A Python thread that has run a parallel loop
    keeps a pool until it ends; here one of `cpus` threads besides itself, which are asleep.
    """

    def __init__(self, cpus: int) -> None:
        self._ended, started = threading.Event(), threading.Event()
        threading.Thread(target=self._hold, args=(cpus + 1, started, self._ended), daemon=True).start()
        started.wait()
        weakref.finalize(self, self._ended.set)

    @staticmethod
    def _hold(threads: int, started: threading.Event, ended: threading.Event) -> None:
        torch.set_num_threads(threads)
        torch.zeros(threads * GRAIN).add_(1)
        started.set()
        ended.wait()

    def end(self) -> None:
        """Release the threads."""
        self._ended.set()
