"""Threads spin on idle cores and sleep beside busy programs, and a control group's quota counts as cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import less

from mistral_7b import ModelArgs, machine
from mistral_7b.engine import threads
from mistral_7b.engine.threads import SharedCores, Usage, is_light
from mistral_7b.kernels import threads as kernel_threads
from mistral_7b.quantization.schemes import random_model


class Machine:
    """A machine whose other programs take a share of this process's time, and preempt it for that."""

    def __init__(self, cpus: int) -> None:
        self.cpus, self.others, self.asked, self.computing = cpus, 0, cpus, cpus
        self.usage = Usage(1.0, 0.0, 0)

    @property
    def runnable(self) -> int:
        return self.computing + self.others

    def step(self, cores: SharedCores) -> bool:
        """Run a step of 0.1 s; return whether its threads slept."""
        with cores:
            slept, self.computing = cores.sleeping, self.asked
            lacking = self.asked + self.others > self.cpus
            wall, cpu, preemptions = self.usage
            took = 0.1 * self.asked * (0.4 if lacking else 0.95)
            self.usage = Usage(wall + 0.1, cpu + took, preemptions + round(300 * took if lacking else took))
        return slept


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Machine:
    computer = Machine(4)

    def ask(n: int) -> None:
        computer.asked = n

    monkeypatch.setattr(torch, "get_num_threads", lambda: computer.asked)
    monkeypatch.setattr(torch, "set_num_threads", ask)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: computer.cpus)
    monkeypatch.setattr(machine, "cores", lambda: computer.cpus)
    monkeypatch.setattr(machine, "runnable", lambda: computer.runnable)
    monkeypatch.setattr(threads, "usage", lambda: computer.usage)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: computer.usage.wall)
    monkeypatch.setattr(threads, "Sleeping", NoThreads)
    for name in threads.POLICIES:
        monkeypatch.delenv(name, raising=False)
    return computer


class NoThreads:
    """Stands for the threads that make others sleep."""

    def __init__(self, cpus: int) -> None:
        assert cpus == 4

    def end(self) -> None:
        pass


def test_threads_spin_on_idle_cores(four: Machine) -> None:
    cores = SharedCores()
    four.others = -3  # only this thread runs before the first step
    assert not four.step(cores)
    four.others = 0
    assert not any(four.step(cores) for _ in range(50))


def test_threads_sleep_beside_busy_programs_and_spin_again_afterwards(four: Machine) -> None:
    cores = SharedCores()
    four.others = -3
    four.step(cores)
    four.others = 2
    assert [four.step(cores) for _ in range(3)] == [False, True, True]
    assert all(four.step(cores) for _ in range(300)), "spinning is not tried while the others are there"
    four.others = 0
    assert [four.step(cores) for _ in range(30)].index(False) < 25


def test_a_machine_that_is_busy_at_the_start_costs_no_slow_step(four: Machine) -> None:
    four.others = 3
    assert four.step(SharedCores())


def test_a_light_model_has_one_thread_beside_busy_programs(four: Machine) -> None:
    cores = SharedCores(light=True)
    four.others, counts = -3, list[int]()
    for others, steps in ((-3, 1), (0, 3), (2, 20), (0, 30)):
        four.others = others
        for _ in range(steps):
            four.step(cores)
            with cores:
                counts.append(four.asked)
            assert four.asked == 4
    assert counts[:4] == [4] * 4
    assert counts[10:24] == [1] * 14
    assert counts[-1] == 4


def test_small_quantized_models_are_light() -> None:
    small = ModelArgs(dim=64, n_layers=2, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2, vocab_size=64)
    assert is_light(random_model(small, "int8", torch.bfloat16))
    assert not is_light(random_model(small, None, torch.bfloat16))  # its sums may depend on the threads
    assert not is_light(random_model(ModelArgs(n_layers=1, vocab_size=64), "int4", torch.bfloat16))


def test_failures_make_attempts_rare(four: Machine) -> None:
    """Where other programs are in the way only of threads that spin."""
    cores, spun = SharedCores(), list[bool]()
    for _ in range(1200):  # two minutes
        four.others = 0 if cores.sleeping else 2
        spun.append(not four.step(cores))
    assert 4 <= sum(spun) <= 12
    assert sum(spun[600:]) <= 2


def test_own_threads_beside_the_engine_are_no_contention(four: Machine) -> None:
    """Those of a server preempt the kernels' threads often, but their time is time of this process."""
    cores = SharedCores()
    four.others = -3
    for _ in range(5):
        with cores:
            wall, cpu, preemptions = four.usage
            four.usage = Usage(wall + 0.1, cpu + 0.39, preemptions + 1000)
        assert not cores.sleeping


@pytest.mark.parametrize("name", threads.POLICIES)
def test_a_policy_of_the_user_holds(four: Machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    cores = SharedCores()
    four.others = 4
    assert not any(four.step(cores) for _ in range(5))


def test_a_quota_bounds_the_threads_of_a_step_alone(four: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    cores = SharedCores()
    for asked, used in ((4, 2), (1, 1), (8, 8)):  # more than the machine's CPUs is meant
        four.asked = asked
        with cores:
            assert four.asked == used
        assert four.asked == asked


SPINNING = """
import sys, time, torch
from mistral_7b.engine.threads import Sleeping

torch.set_num_threads(2)
x, out = torch.ones(1 << 17), []
def spun():
    x.add_(1)
    began = time.process_time()
    time.sleep(0.05)
    return time.process_time() - began
for wanted in (False, True, False):
    if wanted:
        sleeping = Sleeping(len(__import__("os").sched_getaffinity(0)))
        torch.set_num_threads(2)
    time.sleep(0.05)
    print(sorted(spun() for _ in range(5))[2])
    if wanted:
        sleeping.end()
"""


@pytest.mark.skipif(machine.cores() != 2, reason="the waiting of two threads on two CPUs is measured")
def test_threads_of_gnu_openmp_sleep_while_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.POLICIES:
        monkeypatch.delenv(name, raising=False)

    def spent_asleep() -> float:
        """CPU time of waiting threads that sleep, as a share of what they spend when they need not."""
        done = subprocess.run([sys.executable, "-c", SPINNING], capture_output=True, text=True, check=True)
        spinning, sleeping, again = map(float, done.stdout.split())
        if spinning < 1e-3:
            pytest.skip("this OpenMP does not spin")
        return sleeping / min(spinning, again)

    less(0.2, spent_asleep)


FILES = {
    "version 2": {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
    "version 2, a group of its own": {
        "proc/self/cgroup": "0::/outer/inner\n", "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
    },
    "version 1": {
        "proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/docker/0f\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    },
    "version 1, none": {
        "proc/self/cgroup": "1:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    },
    "nothing": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_quota_of_the_control_groups(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES[kind].items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    quota = None if kind in ("nothing", "version 1, none") else 1.5
    assert machine.cpu_quota(tmp_path) == quota
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert machine.cores() == (8 if quota is None else 2)


def test_pytorch_gets_no_more_threads_than_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(kernel_threads.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    kernel_threads.use()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    kernel_threads.use()
    assert asked == [2]
