"""The number of threads of the CPU's parallel loops. Imports torch only when setting it.

More threads than CPUs do not help, and each needs a stack and scratch memory: with some thousands the OpenMP
library aborts the process, a hundred thousand cause a segmentation fault. PER_CPU permits measuring the cost of
oversubscription, and processes that see fewer CPUs than they may use.
"""

from __future__ import annotations

import os

from ..errors import ConfigError

PER_CPU = 4


def most() -> int:
    """The largest number of threads accepted on this machine."""
    return PER_CPU * (os.cpu_count() or 1)


def check(threads: int | None, name: str = "threads") -> None:
    """Raise ConfigError unless `threads` is within 1..most(); None (PyTorch's default) is accepted."""
    if threads is not None and threads < 1:
        raise ConfigError(f"{name} must be at least 1, not {threads}", field=name)
    if threads is not None and threads > most():
        raise ConfigError(
            f"{name} must be at most {most()}, not {threads}: {PER_CPU} for each of this machine's "
            f"{os.cpu_count() or 1} CPUs, since more do not run in parallel",
            field=name,
        )


def use(threads: int | None = None, name: str = "threads") -> None:
    """Set the number of threads of PyTorch and the kernels; None: PyTorch's default, within the CPU quota.

    Raises ConfigError if the number is out of bounds, also if the environment sets PyTorch's default so.
    """
    import torch

    from .. import machine

    check(threads, name)
    if threads is not None:
        torch.set_num_threads(threads)
    elif (found := torch.get_num_threads()) > most():
        raise ConfigError(
            f"the environment sets PyTorch to {found} threads, but at most {most()} are accepted on this "
            f"machine's {os.cpu_count() or 1} CPUs",
            field="OMP_NUM_THREADS",
            hint="unset OMP_NUM_THREADS, or set it to the number of CPUs",
        )
    elif found > (cores := machine.cores()) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)
