"""Alternating jobs in their own processes, missing peers, and too little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from bench_samples import ARGS, CEILINGS, job_of, measured
from refusals import refused
from waiting import soon

from mistral_7b.bench import process, run
from mistral_7b.bench.jobs import LLAMA, OURS, TRANSFORMERS, Job, Measured
from mistral_7b.bench.roofline import Ceilings
from mistral_7b.errors import BenchmarkError

PLAN = run.Plan(
    "small", ARGS, None, ("int4", "bf16", "none"), ("decode", "prefill"), context=6, prompt=20, peers=True
)
PEER_PYTHON = os.environ.get("MISTRAL_7B_PEER_PYTHON", sys.executable)  # the Python that has llama_cpp and gguf


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Replaces processes: every job takes a second; jobs are recorded."""
    asked: list[Job] = []

    def one(job: Job, peer_python: str) -> list[Measured]:
        asked.append(job)
        return [measured([1.0])]

    monkeypatch.setattr(run, "measure", one)
    monkeypatch.setattr(run, "measure_ceilings", lambda threads=None, quick=False: CEILINGS)
    monkeypatch.setattr(run.PeerFiles, "placed", lambda self, job: job)
    return asked


def test_engines_take_turns_within_each_kind_of_work() -> None:
    order = [(j.what, j.engine, j.scheme) for j in PLAN.jobs()]
    turn = [
        (OURS, "int4"), (LLAMA, "Q4_0"), (LLAMA, "Q4_K_M"), (OURS, "bf16"), (LLAMA, "BF16"),
        (TRANSFORMERS, "bf16"), (OURS, "none"),
    ]  # fmt: skip
    assert order == [(what, *who) for what in ("decode", "prefill") for who in turn]
    assert [j.engine for j in dataclasses.replace(PLAN, peers=False).jobs()] == [OURS] * 6


def test_everybody_gets_the_same_work() -> None:
    plan = dataclasses.replace(PLAN, whats=("decode", "prefill", "batch16", "load"), threads=2, source="/a model")
    for what, rows, prompt in (("decode", 1, 6), ("prefill", 1, 20), ("batch16", 16, 32), ("load", 1, 1)):
        jobs = [j for j in plan.jobs() if j.what == what]
        assert {(j.rows, j.prompt, j.threads) for j in jobs} == {(rows, prompt, 2)}
        assert {(j.engine, j.source) for j in jobs if j.engine == OURS} == {(OURS, "/a model")}
        assert not [j for j in jobs if j.engine != OURS and j.source]
    assert not [j for j in plan.jobs() if j.what == "load" and j.engine == TRANSFORMERS]


def test_rounds_repeat_all_of_it(measure: list[Job]) -> None:
    records = run.run(dataclasses.replace(PLAN, rounds=3))
    once = list(dataclasses.replace(PLAN, threads=CEILINGS.threads).jobs())
    assert measure == once * 3
    assert [(r.engine, r.scheme, r.what) for r in records] == [(j.engine, j.scheme, j.what) for j in once]
    assert {r.repetitions for r in records} == {3}


@pytest.mark.wording
def test_a_peer_that_fails_is_told_once_and_left_out(measure: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def placed(self: run.PeerFiles, job: Job) -> Job:
        if job.engine == LLAMA:
            raise BenchmarkError("no llama here")
        return job

    monkeypatch.setattr(run.PeerFiles, "placed", placed)
    told: list[str] = []
    records = run.run(PLAN, told.append)
    assert {r.engine for r in records} == {OURS, TRANSFORMERS}
    assert [t for t in told if "skipped" in t] == [
        "skipped: llama.cpp Q4_0: no llama here", "skipped: llama.cpp Q4_K_M: no llama here",
        "skipped: llama.cpp BF16: no llama here",
    ]  # fmt: skip


def test_nothing_to_show_is_an_error(measure: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.machine, "memory", lambda: (2 << 30, 1 << 30))
    with refused(BenchmarkError, field="--layers"):
        run.run(PLAN)
    assert measure == []


@pytest.mark.wording
def test_what_does_not_fit_does_not_spoil_the_rest(measure: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(args: dict[str, Any], scheme: str) -> None:
        if scheme == "none":
            raise BenchmarkError("too large")

    monkeypatch.setattr(run, "check_memory", check)
    told: list[str] = []
    assert {r.scheme for r in run.run(PLAN, told.append)} == {"int4", "Q4_0", "Q4_K_M", "bf16", "BF16"}
    assert [t for t in told if "skipped" in t] == ["skipped: mistral_7b none: too large"]


def test_the_better_ceilings_of_before_and_after_count(
    measure: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = iter([CEILINGS, dataclasses.replace(CEILINGS, read_bandwidth=3e9)])
    monkeypatch.setattr(run, "measure_ceilings", lambda threads=None, quick=False: next(both))
    assert {r.read_bandwidth for r in run.run(PLAN)} == {3e9}


@pytest.mark.wording
@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/no/such/python", "/no/such/python cannot be run"),
        ("#!/bin/sh\nkill -9 $$", "killed by signal 9 (out of memory?)"),
        ("#!/bin/sh\necho first >&2; echo what was wrong >&2; exit 3", "^what was wrong$"),
        ("#!/bin/sh\nexit 3", "ended with code 3"),
        ("#!/bin/sh\nexit 0", "ended without a result"),
    ],
)
def test_a_process_that_fails_is_one_message(tmp_path: pathlib.Path, python: str, message: str) -> None:
    if python.startswith("#!"):
        script = tmp_path / "python"
        script.write_text(python)
        script.chmod(0o755)
        python = str(script)
    with pytest.raises(BenchmarkError, match=message.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
        run.call(python, "{}")


def test_an_error_crosses_from_the_process_with_its_data() -> None:
    with refused(BenchmarkError, field="quantization"):  # the process itself rejects the job
        run.call(sys.executable, job_of(OURS, "int3", threads=1).to_json())
    data = {"message": "odd", "field": "n", "place": "a.json", "hint": "make it even"}
    assert run._failure(["a warning", json.dumps(data)], 1).data == data
    assert run._failure([], 3).field is None


def test_the_package_alone_is_on_the_path_of_a_peer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer's Python must not import our libraries, which may be installed beside the package."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$PYTHONPATH|$(ls "${PYTHONPATH%%:*}")|$*"\n')
    script.chmod(0o755)
    for before in (None, "/of/the/user"):
        monkeypatch.delenv("PYTHONPATH", raising=False)
        if before:
            monkeypatch.setenv("PYTHONPATH", before)
        path, seen, asked = run._python(str(script), "process", "a", "b").strip().split("|")
        folder, *rest = path.split(os.pathsep)
        assert (seen, asked) == ("mistral_7b", "-m mistral_7b.bench.process a b")
        assert rest == ([before] if before else [])
        assert not pathlib.Path(folder).exists()
        assert os.environ.get("PYTHONPATH") == before


def test_ceilings_come_from_a_process_of_their_own(ceilings: Ceilings) -> None:
    assert 1e9 < ceilings.read_bandwidth < 1e13
    assert 1e9 < ceilings.fp32 < 1e15
    assert ceilings.threads == 1


@pytest.fixture
def stuck(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that measures the first ceiling and never ends the second."""
    script = tmp_path / "python"
    lines = "echo '{\"threads\": 2}'; echo '{\"read_bandwidth\": 1e9}'"
    script.write_text(f"#!/bin/sh\n{lines}; trap '' TERM INT; exec sleep 1000\n")
    script.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(script))


def test_a_probe_that_never_ends_is_ended_and_the_others_count(stuck: None) -> None:
    def found() -> None:
        told: list[str] = []
        began = time.monotonic()
        assert run.find_ceilings(seconds=1, tell=told.append) == {"threads": 2, "read_bandwidth": 1e9}
        assert time.monotonic() - began >= 1
        assert told == ["starting", "read_bandwidth", "fp32"]

    soon(10, found, clock=time.monotonic)


def test_a_bench_without_all_ceilings_says_which(stuck: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.find_ceilings, "__defaults__", (None, False, 1.0, lambda text: None))
    with refused(BenchmarkError, field="fp32, bf16, int8"):
        run.measure_ceilings()


def test_kernels_are_compiled_before_anything_is_timed(
    measure: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(run.compiler, "library", lambda: told.append("(compiled)"))
    run.run(PLAN, told.append)
    assert told[:2] == ["(compiled)", "measuring this machine's ceilings"]


def test_peers_get_huge_pages_unless_the_user_has_settings(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, found = tmp_path / "python", dataclasses.asdict(measured([1.0]))
    script.write_text(f"#!/bin/sh\necho '{run.json.dumps(found)}' | sed \"s/somewhere/$GLIBC_TUNABLES/\"")
    script.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(script))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for engine, wanted in ((OURS, ""), (LLAMA, "glibc.malloc.hugetlb=1")):
        assert run.measure(job_of(engine), str(script))[0].path == wanted
    monkeypatch.setenv("GLIBC_TUNABLES", "of the user")
    assert run.measure(job_of(LLAMA), str(script))[0].path == "of the user"


@pytest.mark.parametrize("what", ["decode", "prefill", "batch16"])
@pytest.mark.parametrize("engine", [OURS, TRANSFORMERS])
def test_every_engine_does_every_work(engine: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoding in a process; the rest in this one, because a process takes seconds to start."""
    job = job_of(engine, "none" if engine == OURS else "bf16", what, prompt=5, threads=1, quick=True)
    job = dataclasses.replace(job, rows=16 if what == "batch16" else 1)
    if what == "decode":
        (found,) = run.measure(job, sys.executable)
    else:
        assert process.main([job.to_json()]) == 0
        found = Measured(**json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found.tokens == {"decode": 1, "prefill": 5, "batch16": 16}[what]
    assert min(found.seconds) > 0
    assert (found.threads, found.kv_token_bytes) == (1, 256)
    assert 50e6 < found.peak_rss_bytes < 3e9
    assert (found.generate_tokens_per_s is not None) == (engine == OURS and what == "decode")


@pytest.mark.parametrize("scheme", ["int4", "int8", "bf16"])
def test_every_scheme_runs_and_its_bytes_are_those_of_its_name(scheme: str) -> None:
    from mistral_7b.bench.peers.ours import Engine
    from mistral_7b.bench.work import BITS, layer_weights, table_weights

    args = {**ARGS, "dim": 256, "hidden_dim": 512, "head_dim": 64}  # whole groups, so that nothing is padded
    engine = Engine(dataclasses.replace(job_of(scheme=scheme, rows=2, threads=1), args=args))
    engine.begin()
    before = engine.logits
    engine.step()
    assert engine.logits.shape == before.shape == (2, 1, 160)
    assert not engine.logits.equal(before)
    table = table_weights(args) * (1 if scheme == "int4" else BITS[scheme] / 8)  # int4 keeps the output in int8
    wanted = layer_weights(args) * BITS[scheme] / 8 + table
    assert engine.weight_bytes == pytest.approx(wanted, rel=0.02)  # scales and norms


@pytest.mark.parametrize("what", ["load", "decode"])
def test_a_source_is_opened_in_its_scheme(tmp_path: pathlib.Path, what: str) -> None:
    import torch

    from mistral_7b import ModelArgs
    from mistral_7b.bench.peers.ours import build
    from mistral_7b.checkpoint import quantize
    from mistral_7b.quantization.schemes import random_model, scheme_of

    random_model(ModelArgs(**ARGS), None).save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "int8", "int8", torch.ones(1, 9, dtype=torch.long), "ones")
    made = [
        build(job_of(scheme=scheme, what=what, source=str(tmp_path / name)))
        for name, scheme in (("plain", "int8"), ("int8", "int8"), ("plain", "none"))
    ]
    assert [str(scheme_of(m)) for m in made] == ["int8", "int8", "None"]
    left, right = (m.state_dict() for m in made[:2])
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_engines_of_one_shape_read_equally_many_bytes() -> None:
    from mistral_7b.bench.peers.hf_transformers import Engine as Transformers
    from mistral_7b.bench.peers.ours import Engine as Ours

    for args in (ARGS, {**ARGS, "tie_embeddings": True}):
        job = dataclasses.replace(job_of(scheme="none", threads=1), args=args)
        assert Ours(job).weight_bytes == Transformers(job).weight_bytes


def test_transformers_of_random_weights_is_whole() -> None:
    """All tensors are initialized after meta: logits are finite, rotary angles are correct."""
    import torch
    import transformers

    from mistral_7b.bench.peers.hf_transformers import build

    model = build(ARGS)
    plain = transformers.MistralForCausalLM(model.config)
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    logits = model(torch.arange(20)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_a_full_disk_is_seen_before_the_file_is_begun(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setattr(run, "_imports", lambda python, *modules: True)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: run.shutil._ntuple_diskusage(9, 9, 0))
    with refused(BenchmarkError, field="--keep"):
        run.PeerFiles(PLAN.peer_python, str(tmp_path), lambda text: None).placed(PLAN.job(LLAMA, "BF16", "decode"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def with_llama() -> Callable[[Job], Job]:
    if not run._imports(PEER_PYTHON, "llama_cpp", "gguf"):
        pytest.skip("no llama_cpp and gguf here; MISTRAL_7B_PEER_PYTHON names a Python that has them")
    return lambda job: job


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "BF16"])
def test_llama_reads_the_file_made_for_it(with_llama: object, tmp_path: pathlib.Path, kind: str) -> None:
    plan = dataclasses.replace(PLAN, peer_python=PEER_PYTHON, whats=("batch16",), threads=1, quick=True)
    files = run.PeerFiles(plan.peer_python, str(tmp_path), lambda text: None)
    job = files.placed(plan.job(LLAMA, kind, "batch16"))
    assert [p.name for p in tmp_path.iterdir()] == [pathlib.Path(str(job.source)).name]
    (found,) = run.measure(job, PEER_PYTHON)
    bits = {"Q4_0": 4.5, "Q8_0": 8.5, "BF16": 16}[kind]
    matrices = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64) + 160 * 64
    assert found.weight_bytes == matrices * bits / 8 + 5 * 64 * 4  # norms are float32
    assert "AMX" in found.path
    assert found.tokens == 16


def test_random_blocks_are_weights_of_a_sane_size() -> None:
    pytest.importorskip("gguf")
    import gguf
    import numpy as np

    from mistral_7b.bench.peers.llama_file import random_blocks

    for kind in ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "BF16"):
        blocks = random_blocks(kind, 32 * 4096)
        weights = gguf.quants.dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType[kind])
        assert weights.size == 32 * 4096
        assert 0.01 < np.std(weights) < 0.03


def test_a_file_in_q4_k_m_keeps_the_promoted_matrices_in_six_bits(tmp_path: pathlib.Path) -> None:
    gguf = pytest.importorskip("gguf")
    from mistral_7b.bench.peers.llama_file import write

    args = {**ARGS, "dim": 256, "hidden_dim": 256, "n_heads": 4, "head_dim": 64, "n_layers": 2, "promoted": [1]}
    write(str(tmp_path / "x.gguf"), "Q4_K_M", args)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    six = {name for name, kind in kinds.items() if kind == "Q6_K"}
    assert six == {"blk.1.attn_v.weight", "blk.1.ffn_down.weight", "output.weight"}
    assert kinds["blk.0.ffn_down.weight"] == kinds["token_embd.weight"] == "Q4_K"


def test_a_file_of_random_weights_has_a_word_for_every_token(tmp_path: pathlib.Path) -> None:
    gguf = pytest.importorskip("gguf")
    from mistral_7b.bench.peers.llama_file import write

    write(str(tmp_path / "x.gguf"), "Q4_0", ARGS)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    words = fields["tokenizer.ggml.tokens"].contents()
    assert len(words) == len(set(words)) == ARGS["vocab_size"]
    assert words[:4] == ["<unk>", "<s>", "</s>", "\u2581w0"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
