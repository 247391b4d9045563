"""The number of threads of a step follows the cores to be had, and a control group's quota counts as cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mistral_7b import LLM, SamplingParams, machine
from mistral_7b.engine import threads
from mistral_7b.engine.threads import SharedCores, Usage
from mistral_7b.kernels import threads as kernel_threads


class Machine:
    """A machine whose other programs take a share of this process's time, and preempt it for that."""

    def __init__(self, cpus: int) -> None:
        self.cpus, self.others, self.asked, self.used = cpus, 0, cpus, 1
        self.usage = Usage(0.0, 0.0, 0)

    @property
    def runnable(self) -> int:
        return self.others + self.used  # which spin a while after a step

    def step(self, cores: SharedCores) -> int:
        """Run a step of 0.1 s; return its number of threads."""
        with cores:
            used = self.used = self.asked
            lacking = used + self.others > self.cpus
            wall, cpu, preemptions = self.usage
            took = 0.1 * used * (0.4 if lacking else 0.95)
            self.usage = Usage(wall + 0.1, cpu + took, preemptions + round(300 * took if lacking else took))
        return used


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
    return computer


def test_idle_cores_are_all_used_and_the_number_is_restored(four: Machine) -> None:
    cores = SharedCores()
    assert [four.step(cores) for _ in range(20)] == [4] * 20
    assert four.asked == 4


def test_busy_cores_are_left_to_others_and_taken_back(four: Machine) -> None:
    cores = SharedCores()
    four.others = 2
    assert [four.step(cores) for _ in range(3)] == [4, 2, 2]
    assert {four.step(cores) for _ in range(50)} == {2}, "four fit only while fewer others want a CPU"
    four.others = 0
    assert [four.step(cores) for _ in range(2)] == [2, 4]
    four.others = 4
    assert [four.step(cores) for _ in range(4)] == [4, 2, 1, 1]
    assert four.asked == 4


def test_a_machine_that_is_busy_at_the_start_costs_no_slow_step(four: Machine) -> None:
    four.others = 3
    assert four.step(SharedCores()) == 1


def test_failures_make_attempts_rare(four: Machine) -> None:
    """The others are not seen as waiting whenever an attempt is decided on."""
    cores = SharedCores()
    used = []
    for n in range(600):  # a minute
        four.others = 0 if n and used[-1] < 4 else 2
        used.append(four.step(cores))
    assert used.count(4) < 12


def test_own_threads_beside_the_engine_are_no_contention(four: Machine) -> None:
    """Those of a server preempt the kernels' threads often, but their time is time of this process."""
    cores = SharedCores()
    for _ in range(5):
        with cores:
            wall, cpu, preemptions = four.usage
            four.usage = Usage(wall + 0.1, cpu + 0.39, preemptions + 1000)
        assert cores.threads == 4


def test_more_threads_than_cpus_and_one_thread_are_kept(four: Machine) -> None:
    cores = SharedCores()
    four.others = 4
    for asked in (8, 1):
        four.asked = asked
        assert [four.step(cores) for _ in range(3)] == [asked] * 3


def test_the_engine_computes_the_same_on_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    found = []
    for free in (1, 2):
        monkeypatch.setattr(SharedCores, "_free", lambda self, own, free=free: free)
        monkeypatch.setattr(machine, "cores", lambda: 2)
        seen = []
        monkeypatch.setattr(torch, "set_num_threads", seen.append)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        llm = LLM("demo", quantization="int8")
        found.append(llm.generate("import os", params)[0].outputs[0].token_ids)
        assert set(seen) == ({1, 2} if free == 1 else set())
    assert found[0] == found[1]


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
