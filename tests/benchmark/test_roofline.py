"""What the machine can do is measured, and drawn."""

from __future__ import annotations

import pathlib

import pytest
import torch
from bench_samples import job_of, measured, record_of

from mistral_7b.benchmark import machine, plot, roofline
from mistral_7b.benchmark.jobs import LLAMA, OURS, TRANSFORMERS
from mistral_7b.benchmark.records import Record
from mistral_7b.engine import memory
from mistral_7b.errors import BenchmarkError
from mistral_7b.kernels import compiler


def test_bandwidth_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way reads the whole buffer: with a clock that stands at 1/4 s a run, 64 MB are 256 MB/s."""
    monkeypatch.setattr(roofline, "_best", lambda work, seconds: work() is None or 0.25)
    assert roofline.read_bandwidth(64 << 20) == (64 << 20) / 0.25


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("nbytes", [0, 128, 384, 1 << 20])
def test_what_is_timed_reads_everything(nbytes: int, threads: int) -> None:
    library = compiler.library()
    if library is None:
        pytest.skip("without a compiler PyTorch's reductions are all there is")
    words = torch.randint(-(2**62), 2**62, (nbytes // 8,))
    assert library.m7b_read(words.data_ptr(), nbytes, threads) == words.sum().item()


def test_bandwidth_is_that_of_the_fastest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's reductions take a second; what returns a whole number is the kernel, and takes half of one."""
    if compiler.library() is None:
        pytest.skip("without a compiler PyTorch's reductions are all there is")
    monkeypatch.setattr(roofline, "_best", lambda work, seconds: 0.5 if isinstance(work(), int) else 1.0)
    assert roofline.read_bandwidth(64 << 20) == (64 << 20) / 0.5


def test_peak_is_operations_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_best", lambda work, seconds: work() is None or 0.5)
    wanted = 2 * 48 * 32 * 32 / 0.5  # the larger of two numbers of rows
    assert roofline.fp32_peak(32, (16, 48)) == wanted
    assert roofline.bf16_peak(32, (16, 48)) == wanted
    assert roofline.int8_peak(32, (16, 48)) in (wanted, None)


@pytest.mark.parametrize(("quick", "side", "rows"), [(True, 1024, 512), (False, 4096, 1024)])
def test_all_are_measured_quickly_or_well(
    monkeypatch: pytest.MonkeyPatch, quick: bool, side: int, rows: int
) -> None:
    monkeypatch.setattr(roofline, "_best", lambda work, seconds: work() is None or 0.5)
    monkeypatch.setattr(roofline, "buffer_bytes", lambda: 64 << 20)
    found, peak = roofline.measure(1, quick), 2 * rows * side * side / 0.5
    assert (found.read_bandwidth, found.threads) == ((64 << 20) / 0.5, 1)
    assert (found.fp32, found.bf16) == (peak, peak)
    assert found.int8 in (peak, None)


def test_int8_peak_is_of_a_real_product(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    monkeypatch.setattr(roofline, "_best", lambda work, seconds: made.append(work()) or 1.0)
    torch.manual_seed(0)
    if roofline.int8_peak(64, (3,)) is None:
        pytest.skip("oneDNN has no int8 product for this CPU")
    torch.manual_seed(0)
    w = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
    x = torch.randint(-127, 128, (3, 64), dtype=torch.int8)
    wanted = (x.double() @ w.double().T).to(torch.bfloat16)
    assert torch.equal(made[0], wanted)


def test_without_onednn_there_is_no_int8_and_bf16_is_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> None:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "onednn", Nothing())
    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    assert roofline.int8_peak(32, (16,)) is None
    assert (roofline.bf16_peak(32, (16,)) or 0) > 0


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
    with pytest.raises(BenchmarkError, match="nothing to draw"):
        plot.draw(tmp_path / "a.png", [record_of(job_of(what="load", prompt=1), [measured([1.0])])])
    with pytest.raises(BenchmarkError, match=r"--plot .*a\.nonsense"):
        plot.draw(tmp_path / "a.nonsense", samples())
    assert list(tmp_path.iterdir()) == []


def test_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (machine, memory):
        monkeypatch.setattr(place, "read", lambda path: "")
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
    for place in (machine, memory):
        monkeypatch.setattr(place, "read", lambda path: files.get(str(path), ""))
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
    code = "from mistral_7b.benchmark.machine import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert machine.peak_memory() > len(held) > 2 * child
