"""Measuring and plotting the machine's ceilings."""

from __future__ import annotations

import itertools
import pathlib

import pytest
import torch
from bench_samples import job_of, measured, record_of
from refusals import refused

from mistral_7b import machine
from mistral_7b.bench import plot, roofline
from mistral_7b.bench.jobs import LLAMA, OURS, TRANSFORMERS
from mistral_7b.bench.records import Record
from mistral_7b.errors import BenchmarkError
from mistral_7b.kernels import block_formats
from mistral_7b.kernels.cpu import compiler
from mistral_7b.kernels.linear import block_linear_twin


def test_bandwidth_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop reads the whole buffer: with a fake clock of 1/4 s per run, 64 MB give 256 MB/s."""
    monkeypatch.setattr(roofline, "_shortest", lambda ways, seconds: 0.25 if [way() for way in ways] else 0)
    assert roofline.read_bandwidth(64 << 20) == (64 << 20) / 0.25


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("nbytes", [0, 128, 384, 1 << 20])
def test_what_is_timed_reads_everything(nbytes: int, threads: int) -> None:
    library = compiler.library()
    if library is None:
        pytest.skip("without a compiler PyTorch's reductions are all there is")
    words = torch.randint(-(2**62), 2**62, (nbytes // 8,))
    assert library.m7b_read(words.data_ptr(), nbytes, threads) == words.sum().item()


class Clock:
    """A fake clock: only work advances it, by the seconds it declares."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(roofline.time, "perf_counter", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_fastest_way_counts(clock: Clock) -> None:
    ways = [lambda took=took: clock.work(took) for took in (0.1, 0.05, 0.2)]
    assert roofline._shortest(ways, 1.5) == pytest.approx(0.05)
    assert 101.2 < clock.now <= 101.5


@pytest.mark.parametrize("took", [3.0, 700.0])
def test_a_slow_way_runs_once(clock: Clock, took: float) -> None:
    assert roofline._shortest([lambda: clock.work(took)] * 4, 1.5) == took
    assert clock.now == 100 + took


@pytest.mark.parametrize("row", [1e-7, 1e-5, 1e-3, 0.02, 0.46, 2.0])
def test_no_product_is_started_that_is_not_expected_to_fit(clock: Clock, row: float) -> None:
    """oneDNN's reference loop takes 0.46 s per row of 4096 by 4096: eight minutes for 1024 rows."""
    asked: list[int] = []

    def work(rows: int) -> None:
        asked.append(rows)
        clock.work(row * rows)

    assert roofline._most(work, 1024, 1.5) == pytest.approx(1 / row)
    assert clock.now <= 100 + max(1.5, 2 * row) + 1e-6
    assert asked[:2] == [1, 1]
    assert all(b <= roofline.GROWTH * a for a, b in itertools.pairwise(asked))
    if row <= 1e-3:
        assert asked[-1] == 1024, "a fast product is measured at its full size"


def test_rows_that_come_at_a_fixed_price_are_measured_together(clock: Clock) -> None:
    assert roofline._most(lambda rows: clock.work(0.01 + 1e-5 * rows), 1024, 1.5) == pytest.approx(1024 / 0.02024)


def test_a_buffer_that_takes_long_to_fill_is_smaller(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "fill_", lambda part, value: clock.work(0.5))
    words = torch.empty(8 * roofline.CHUNK // 4, dtype=torch.int32)
    assert roofline._filled(words, 1.2).nbytes == 3 * roofline.CHUNK
    assert roofline._filled(words, 0).nbytes == roofline.CHUNK


@pytest.fixture
def one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each workload once, at full size, and pretend that it takes half a second."""
    monkeypatch.setattr(roofline, "_shortest", lambda ways, seconds: 0.5 if [way() for way in ways] else 0)
    monkeypatch.setattr(roofline, "_most", lambda work, most, seconds: most / 0.5 if len(work(most)) else 0)


def test_peak_is_operations_over_seconds(one_run: None) -> None:
    wanted = 2 * 48 * 64 * 64 / 0.5
    assert roofline.fp32_peak(64, 48) == wanted
    assert roofline.bf16_peak(64, 48) == wanted
    assert roofline.int8_peak(64, 48) == (None if compiler.library() is None else wanted)


@pytest.mark.parametrize(("quick", "side", "rows"), [(True, 1024, 512), (False, 4096, 1024)])
def test_all_are_measured_quickly_or_well(
    monkeypatch: pytest.MonkeyPatch, one_run: None, quick: bool, side: int, rows: int
) -> None:
    monkeypatch.setattr(roofline, "_most", lambda work, most, seconds: most / 0.5)
    monkeypatch.setattr(roofline, "buffer_bytes", lambda: 64 << 20)
    found, peak = dict(roofline.measure(quick)), 2 * rows * side * side / 0.5
    assert tuple(found) == roofline.PROBES
    assert found["read_bandwidth"] == (64 << 20) / 0.5
    assert (found["fp32"], found["bf16"]) == (peak, peak)
    assert found["int8"] in (peak, None)


def test_time_is_shared_and_what_has_none_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = [1000.0], []
    monkeypatch.setattr(roofline.time, "time", lambda: now[0])

    def probe(*where: int, seconds: float = 0) -> float:
        given.append(seconds or where[-1])
        now[0] += 3
        return 1.0

    for name in ("read_bandwidth", "fp32_peak", "bf16_peak", "int8_peak"):
        monkeypatch.setattr(roofline, name, probe)
    assert list(roofline.measure(until=1004.0)) == [("read_bandwidth", 1.0), ("fp32", 1.0)]
    assert given == [1.0, pytest.approx(1 / 3)]
    assert list(roofline.measure(until=999.0)) == []
    assert len(list(roofline.measure(until=2000.0))) == len(roofline.PROBES)
    assert given[2:] == [roofline.SECONDS] * 4


def test_int8_peak_is_of_our_own_kernel_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler.library() is None:
        pytest.skip("without a compiler there is no kernel to measure")
    made: list[torch.Tensor] = []
    monkeypatch.setattr(torch.ops, "onednn", None)  # its reference product may take minutes
    monkeypatch.setattr(roofline, "_most", lambda work, most, seconds: made.append(work(most)) or 1.0)
    torch.manual_seed(0)
    assert roofline.int8_peak(64, 3) == 2 * 64 * 64
    torch.manual_seed(0)
    x = torch.randn(64).to(torch.bfloat16)
    w = (torch.randn(64) * 40 + 128).clamp(1, 255).to(torch.uint8)
    codes, d = block_formats.tile("Q8_0", w.repeat(64, 1), None, torch.ones(64, 2, 1, dtype=torch.float16))
    wanted = block_linear_twin(x.repeat(3, 1), codes, d, 64, "Q8_0")
    assert torch.equal(made[0], wanted)
    assert wanted.abs().max() > 100


def test_without_kernels_there_is_no_int8_and_bf16_may_be_the_plain_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> None:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    monkeypatch.setattr(compiler, "library", lambda: None)
    assert roofline.int8_peak(64, 16) is None
    assert (roofline.bf16_peak(64, 16, 0.01) or 0) > 0


def test_buffer_outgrows_the_cache_but_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "last_level_cache", lambda: 1 << 30)
    monkeypatch.setattr(roofline, "memory", lambda: (64 << 30, 32 << 30))
    assert roofline.buffer_bytes() == 4 << 30
    monkeypatch.setattr(roofline, "memory", lambda: (8 << 30, 4 << 30))
    assert roofline.buffer_bytes() == 1 << 30


def samples() -> list[Record]:
    out = []
    for engine, scheme, speed in (
        (OURS, "int4", 1.0), (OURS, "int8", 1.1), (OURS, "bf16", 2.0),
        (LLAMA, "Q4_0", 1.2), (LLAMA, "Q8_0", 1.3), (TRANSFORMERS, "bf16", 2.2),
    ):  # fmt: skip
        for what, tokens in (("decode", 1), ("prefill", 500), ("batch16", 16)):
            job = job_of(engine, scheme, what, rows=16 if what == "batch16" else 1, prompt=500)
            out.append(record_of(job, [measured([speed * tokens], tokens)]))
    return out


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_picture_is_written(tmp_path: pathlib.Path, ending: str) -> None:
    path = tmp_path / f"roofline.{ending}"
    plot.draw(path, samples())
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    assert path.stat().st_size > 5000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_labels_hit_neither_each_other_nor_points_nor_roofs() -> None:
    Figure, Canvas = plot.matplotlib_classes()
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    Canvas(figure)
    axes = figure.add_subplot()
    shown = samples()
    plot.roofs(axes, shown)
    roofs = len(axes.texts)
    assert roofs == 3  # int8, bf16, reading
    plot.points(axes, shown)
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(t, renderer) for t in axes.texts]
    assert len(boxes) == roofs + len(shown)
    for n, box in enumerate(boxes[roofs:], roofs):
        assert not box.count_overlaps(boxes[:n])


def test_what_cannot_be_drawn(tmp_path: pathlib.Path) -> None:
    with refused(BenchmarkError, field="--what"):
        plot.draw(tmp_path / "a.png", [record_of(job_of(what="load", prompt=1), [measured([1.0])])])
    with refused(BenchmarkError, field="--plot"):
        plot.draw(tmp_path / "a.nonsense", samples())
    assert list(tmp_path.iterdir()) == []


def test_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read", lambda path: "")
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    assert machine.cpu_name()
    assert not any(machine.instruction_sets().values())
    assert machine.last_level_cache() == 0
    assert machine.memory()[0] >= 0
    assert machine.peak_memory() > 0


def test_flags_and_memory_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/cpuinfo": "model name\t: Some CPU\nflags\t\t: fpu avx2 amx_int8\n",
        "/proc/meminfo": "MemTotal:       1000 kB\nMemAvailable:    600 kB\n",
        "/sys/fs/cgroup/memory.max": "512000\n",
        "/sys/fs/cgroup/memory.current": "102400\n",
        "/proc/self/status": "VmHWM:\t   77 kB\n",
    }
    monkeypatch.setattr(machine, "read", lambda path: files.get(str(path), ""))
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    assert machine.cpu_name() == "Some CPU"
    assert [name for name, on in machine.instruction_sets().items() if on] == ["AVX2", "AMX int8"]
    assert machine.memory() == (512000, 409600)
    assert machine.peak_memory() == 77 << 10


def test_peak_memory_of_a_small_child_is_not_that_of_a_large_parent() -> None:
    import subprocess
    import sys

    held = bytearray(300 << 20)
    code = "from mistral_7b.machine import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert machine.peak_memory() > len(held) > 2 * child
