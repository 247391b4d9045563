"""How many threads the CPU's parallel loops may take. Imports no torch before they are set.

Threads beyond the CPUs only wait for each other, and each takes a stack and scratch memory: some thousands are a
message of the OpenMP library and the end of the process, a hundred thousand a segmentation fault. PER_CPU leaves
room for measuring what too many cost, and for a process that sees fewer CPUs than it may use.
"""

from __future__ import annotations

import os

from ..errors import ConfigError

PER_CPU = 4


def most() -> int:
    """The largest number of threads that is accepted on this machine."""
    return PER_CPU * (os.cpu_count() or 1)


def check(threads: int | None, name: str = "threads") -> None:
    """ConfigError for a number of threads that this machine cannot run; None is as many as PyTorch takes."""
    if threads is not None and threads < 1:
        raise ConfigError(f"{name} must be at least 1, not {threads}", field=name)
    if threads is not None and threads > most():
        raise ConfigError(
            f"{name} must be at most {most()}, not {threads}: {PER_CPU} for each of this machine's "
            f"{os.cpu_count() or 1} CPUs, for more only wait for each other",
            field=name,
        )


def use(threads: int | None = None, name: str = "threads") -> None:
    """Let PyTorch's loops and the kernels' take so many threads; None: as many as PyTorch takes by itself.

    ConfigError for a number that is out of bounds, also where the environment asked PyTorch for it.
    """
    import torch

    check(threads, name)
    if threads is not None:
        torch.set_num_threads(threads)
    elif (found := torch.get_num_threads()) > most():
        raise ConfigError(
            f"the environment makes PyTorch take {found} threads, and {most()} are accepted on this machine's "
            f"{os.cpu_count() or 1} CPUs",
            field="OMP_NUM_THREADS",
            hint="unset OMP_NUM_THREADS, or set it to the number of CPUs",
        )
