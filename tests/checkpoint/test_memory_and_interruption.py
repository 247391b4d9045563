"""Memory of loading and converting, and the remains of a killed conversion."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model

from mistral_7b import CheckpointError, Mistral7B, ModelArgs, WriteError
from mistral_7b.checkpoint import convert, quantize, writing
from mistral_7b.checkpoint.gguf import writing as gguf_writing
from mistral_7b.checkpoint.names import expected
from mistral_7b.lora.files import Adapter, Factors, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer.model lies beside")

# 126 MB, the largest tensor 2 MB: the proportion of the 7B model's 14.5 GB and 0.26 GB.
BIG = ModelArgs(
    dim=512, n_layers=16, head_dim=64, hidden_dim=2048, n_heads=8, n_kv_heads=2, vocab_size=2000, sliding_window=32
)
MEASURE = """
import json, os, pathlib, sys, torch
from mistral_7b.checkpoint import convert, load, quantize
from mistral_7b.lora import merge

torch.set_num_threads(1)

def act(what, source, out, target):
    if what == "convert":
        convert(source, out, to=target)
        return None
    if what == "quantize":
        quantize(source, out, target, torch.ones(1, 9, dtype=torch.long), "ones")
        return None
    if what == "merge":
        merge(source, source.parent / f"{source.name}-lora", out, torch.ones(1, 9, dtype=torch.long), to=target)
        return None
    if what == "round":
        return load(source, quantization=target)
    if what == "copy":
        model = load(source, mmap=False)
    else:
        model = load(source, dtype=getattr(torch, target))
    with torch.no_grad():
        for p in model.state_dict().values():
            p.reshape(-1).view(torch.uint8)[::1024].max()  # every page, and no copy as of a sum
    return model

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

folder = pathlib.Path(sys.argv[1])
for i, (what, source, target) in enumerate(json.loads(sys.argv[2])):
    # Each in a process of its own: memory that an earlier one freed would hide what a later one takes.
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    # Whatever the libraries load on first use is not ours to count.
    act(what, folder / ("tiny-int4" if source == "int4" else "tiny"), folder / f"warm{i}", target)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    model = act(what, folder / source, folder / f"out{i}", target)
    print(json.dumps([resident("VmHWM") - before, resident("VmRSS") - before]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sources")
    model = Mistral7B(BIG)
    model.save_pretrained(folder / "huggingface", max_shard_size="40MB")
    model.save_pretrained(folder / "mistral", format="mistral")
    (folder / "pickle").mkdir()
    (folder / "pickle" / "params.json").write_bytes((folder / "mistral" / "params.json").read_bytes())
    torch.save(model.state_dict(), folder / "pickle" / "consolidated.00.pth")
    model.save_pretrained(folder / "bf16.gguf", format="gguf")
    model.save_pretrained(folder / "q4_0.gguf", format="gguf", type="q4_0")
    tiny_model(tiny_args(), torch.bfloat16).save_pretrained(folder / "tiny")
    for name, args in (("huggingface", BIG), ("tiny", tiny_args())):
        shapes = [
            (n.removesuffix(".weight"), s) for n, s in expected(args) if len(s) == 2 and n.startswith("layers")
        ]
        factors = {n: Factors(torch.ones(8, s[1]), torch.ones(s[0], 8), 1.0) for n, s in shapes}
        save_adapter(Adapter(factors), folder / f"{name}-lora", args)
    for name, plain in (("int4", "huggingface"), ("tiny-int4", "tiny")):
        quantize(folder / plain, folder / name, "int4", torch.ones(1, 9, dtype=torch.long), "ones")
    return folder


BOUNDS = {  # (what, source, target) -> peak, as a share of the weights' size
    ("load", "huggingface", "bfloat16"): 1.1,
    ("load", "mistral", "bfloat16"): 1.1,
    ("load", "pickle", "float16"): 1.1,
    ("load", "huggingface", "float16"): 1.1,
    ("load", "bf16.gguf", "bfloat16"): 1.1,
    ("load", "q4_0.gguf", "bfloat16"): 1.3,  # 20 MB of scratch whatever the size, large only beside 126 MB
    ("convert", "huggingface", "mistral"): 0.2,
    ("convert", "mistral", "huggingface"): 0.2,
    ("convert", "pickle", "huggingface"): 0.2,
    ("convert", "huggingface", "gguf"): 0.2,
    ("convert", "bf16.gguf", "mistral"): 0.2,
    ("convert", "q4_0.gguf", "huggingface"): 0.35,
    # Once in memory, int4 is 0.33 of bfloat16 (its embedding and output are int8).
    ("load", "int4", "bfloat16"): 0.37,
    ("copy", "int4", "bfloat16"): 0.37,
    ("round", "huggingface", "int4"): 0.65,  # the distance is that of a layer in float32
    ("quantize", "huggingface", "int4"): 0.3,
    ("merge", "huggingface", "mistral"): 0.5,  # a layer of both models, in part float32, and the adapter
}


# One heap, and each tensor in pages of its own that are given back when it is freed. By default glibc keeps what
# was freed, in as many heaps as threads happened to meet, and raises the size from which it does not as it goes.
ONE_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from Linux's /proc")
def test_peak_memory_stays_near_one_model(sources: pathlib.Path) -> None:
    program = [sys.executable, "-c", MEASURE, sources, json.dumps(list(BOUNDS))]
    run = subprocess.run(program, capture_output=True, text=True, timeout=900, env={**os.environ, **ONE_HEAP})
    assert run.returncode == 0, run.stderr
    size = sum(p.numel() * 2 for p in Mistral7B(BIG, device="meta").parameters())
    for line, (case, bound) in zip(run.stdout.splitlines(), BOUNDS.items(), strict=True):
        peak, after = json.loads(line)
        print(*case, f"peak {peak / size:.3f}, after {after / size:.3f} of the weights' size")
        assert peak <= bound * size, case
        if case[0] == "load" and case[1] not in ("int4", "q4_0.gguf"):  # which stay compressed
            assert after >= 0.9 * size, case  # it was really there, and counted


CONVERT_AND_HANG = """
import sys, time
from mistral_7b.checkpoint import convert

def progress(done, total, name):
    if done > 0.7 * total:
        print("here", flush=True)
        time.sleep(600)

convert(sys.argv[1], sys.argv[2], to=sys.argv[3], max_shard_size="30KB", progress=progress)
"""


@pytest.mark.parametrize("to", ["huggingface", "mistral", "gguf"])
def test_a_killed_conversion_leaves_nothing_that_opens(tmp_path: pathlib.Path, to: str) -> None:
    tiny_model().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", CONVERT_AND_HANG, tmp_path / "source", out, to], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "here\n"
        run.kill()
    assert not out.exists()
    (rest,) = [path for path in tmp_path.iterdir() if path.name != "source"]
    assert rest.name.startswith(".out.partial-")
    written = list(rest.iterdir()) if rest.is_dir() else [rest]
    assert any(path.suffix == ".safetensors" or to == "gguf" for path in written)  # it was killed while writing
    for path in (rest, *written):
        with pytest.raises(CheckpointError):
            Mistral7B.from_pretrained(path)
    convert(tmp_path / "source", out, to=to)  # the remains do not prevent a new run
    assert Mistral7B.from_pretrained(out).args == tiny_args()


@pytest.mark.parametrize("to", ["mistral", "gguf"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk on fire"), ZeroDivisionError])
def test_a_failed_conversion_cleans_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | type[BaseException], to: str
) -> None:
    tiny_model().save_pretrained(tmp_path / "source")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(writing.TokenizerFiles, "write", fail)
    monkeypatch.setattr(gguf_writing, "_encode", fail)
    with pytest.raises(WriteError if isinstance(error, OSError) else error):  # type: ignore[arg-type]
        convert(tmp_path / "source", tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["mistral", "gguf"])
def test_a_full_disk_is_refused_before_writing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    tiny_model().save_pretrained(tmp_path / "source")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with refused(WriteError, place=tmp_path / "out"):
        convert(tmp_path / "source", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["huggingface", "mistral", "gguf"])
@pytest.mark.parametrize("tied", [False, True])
def test_progress_counts_every_byte_once(tmp_path: pathlib.Path, to: str, tied: bool) -> None:
    model = tiny_model(tiny_args(tie_embeddings=tied))
    model.save_pretrained(tmp_path / "source")
    told: list[tuple[int, int, str]] = []
    convert(tmp_path / "source", tmp_path / "out", to=to, progress=lambda *now: told.append(now))
    state = model.state_dict()
    if tied and to != "mistral":
        del state["output.weight"]
    size = sum(p.numel() * 4 for p in state.values())
    assert [name for _, _, name in told] == list(state)
    assert {total for _, total, _ in told} == {size}
    assert [done for done, _, _ in told] == sorted({done for done, _, _ in told})
    assert told[-1][0] == size
