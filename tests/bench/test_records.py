"""Bytes and operations compared with manual counts, ceilings, and records."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import pytest
import torch
from bench_samples import ARGS, CEILINGS, SHAPE, job_of, measured, record_of
from refusals import refused

from mistral_7b import WriteError
from mistral_7b.bench import records, work
from mistral_7b.bench.jobs import LLAMA, OURS, TRANSFORMERS, Job
from mistral_7b.bench.peers.ours import kv_token_bytes
from mistral_7b.bench.report import doubt, ratios
from mistral_7b.bench.roofline import Ceilings
from mistral_7b.cache import Stateless
from mistral_7b.model import Mistral7B, ModelArgs
from mistral_7b.quantization.schemes import compressed_bytes

FIELDS = {  # the format that others may rely on
    "engine", "scheme", "what", "tokens_per_s", "bytes_per_s", "ceiling_fraction", "peak_rss_bytes", "context",
    "threads", "cpu", "date", "commit", "versions",
}  # fmt: skip


def test_bytes_of_a_step_by_hand() -> None:
    # A layer: wq 64x64, wk and wv 32x64, wo 64x64, three of 96x64; two norms of 64. bfloat16 is 2 bytes.
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64 + 2 * 64
    model = Mistral7B(SHAPE)
    assert compressed_bytes(model) == 2 * (2 * layer + 64 + 160 * 64)  # norm and output; the embedding is not read
    assert compressed_bytes(Mistral7B(dataclasses.replace(SHAPE, tie_embeddings=True))) == compressed_bytes(model)
    assert kv_token_bytes(model) == 2 * 2 * 2 * 16 * 2  # layers, k and v, heads, width, bytes
    assert work.layer_weights(ARGS) == 2 * (layer - 2 * 64)
    # Three rows of 6 tokens, or of 50 tokens with 8 visible in the window.
    assert work.bytes_read(ARGS, 1000, 256, 3, 6) == 1000 + 3 * 6 * 256
    assert work.bytes_read(ARGS, 1000, 256, 3, 50) == 1000 + 3 * 8 * 256


def test_weights_of_the_real_size() -> None:
    args = dataclasses.asdict(ModelArgs())
    norms = (2 * 32 + 1) * 4096
    assert work.layer_weights(args) + 2 * work.table_weights(args) + norms == 7_241_732_096  # as published
    assert work.weight_memory(args, "int4") == pytest.approx(4.07e9, rel=0.01)


@pytest.mark.parametrize(("held", "new", "pairs"), [(0, 3, 1 + 2 + 3), (6, 4, 7 + 8 + 8 + 8), (100, 1, 8)])
def test_keys_seen_in_a_window(held: int, new: int, pairs: int) -> None:
    assert work.keys_seen(ARGS, held, new) == pairs
    assert work.keys_seen({**ARGS, "sliding_window": None}, 100, 2) == 101 + 102


def test_operations_are_those_that_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = Mistral7B(dataclasses.replace(SHAPE, sliding_window=None), dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model.hidden(torch.ones(3, 5, dtype=torch.long), Stateless(None))[:, -1:])
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op) and "bmm" not in str(op))
    attention = 3 * 4 * 2 * 4 * 16 * work.keys_seen({**ARGS, "sliding_window": None}, 0, 5)
    assert work.operations({**ARGS, "sliding_window": None}, 3, 0, 5) == products + attention


def test_what_bounds_a_record() -> None:
    args = {"weight_bytes": 8_000_000, "kv_token_bytes": 0}
    decode = record_of(job_of(), [measured([0.010, 0.020, 0.016], **args)])
    assert decode.tokens_per_s == pytest.approx(1 / 0.016)
    assert decode.bytes_per_s == pytest.approx(8e6 / 0.016)
    assert decode.ceiling_fraction == pytest.approx(0.5)  # 8 MB at 1 GB/s take 8 ms
    few = {"weight_bytes": 8, "kv_token_bytes": 0}
    prefill = record_of(job_of(what="prefill", prompt=500), [measured([1.0], 500, **few)])
    assert prefill.tokens_per_s == 500
    ops = work.operations(ARGS, 1, 0, 500)
    assert prefill.ceiling_fraction == pytest.approx(ops / 2e10)
    assert (prefill.operations_per_s, prefill.matrix_peak) == (ops, 2e10)
    assert prefill.intensity == pytest.approx(ops / 8)


def test_rounds_are_put_together() -> None:
    found = [measured([1.0, 2.0], peak_rss_bytes=5), measured([3.0], peak_rss_bytes=7, generate_tokens_per_s=2.0)]
    r = record_of(job_of(), found)
    assert (r.seconds, r.repetitions, r.peak_rss_bytes, r.generate_tokens_per_s) == (2.0, 3, 7, 2.0)
    assert r.spread == pytest.approx((2.8 - 1.2) / 2)
    assert record_of(job_of(), [measured([1.0])]).spread == 0


def test_sixteen_rows_read_the_weights_once() -> None:
    job = job_of(what="batch16", rows=16, prompt=4)
    r = record_of(job, [measured([0.5], 16, weight_bytes=1000, kv_token_bytes=10)])
    assert (r.tokens_per_s, r.bytes_per_s, r.rows) == (32, (1000 + 16 * 5 * 10) / 0.5, 16)


def test_peaks_by_scheme() -> None:
    assert [CEILINGS.peak(s) for s in ("int4", "Q8_0", "bf16", "none", "BF16")] == [4e10, 4e10, 2e10, 2e10, 2e10]
    old = Ceilings(read_bandwidth=1, fp32=9.0, bf16=3.0, int8=None)
    assert [old.peak(s) for s in ("int4", "bf16")] == [9.0, 9.0]  # float32 is faster and can do their work
    assert old.best(Ceilings(2, 8.0, 4.0, 5.0)) == Ceilings(2, 9.0, 4.0, 5.0)


def test_format_and_the_way_back(tmp_path: pathlib.Path) -> None:
    wanted = [record_of(job_of(), [measured([1.0])]), record_of(job_of(LLAMA, "Q4_0"), [measured([2.0])])]
    path = tmp_path / "records.json"
    records.write_json(path, wanted)
    data = json.loads(path.read_text())
    assert isinstance(data, list)
    assert all(set(fields) >= FIELDS for fields in data)
    assert records.read_json(path) == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["records.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.json"
    records.write_json(path, [])
    before = path.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with refused(WriteError, place=path):
        records.write_json(path, [record_of(job_of(), [measured([1.0])])])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["records.json"]


def test_ratios_are_to_peers_of_the_same_work() -> None:
    made = [
        record_of(job_of(OURS, "int4"), [measured([0.1])]),
        record_of(job_of(LLAMA, "Q4_0"), [measured([0.2])]),
        record_of(job_of(TRANSFORMERS, "bf16"), [measured([0.4])]),
        record_of(job_of(LLAMA, "Q4_0", "prefill"), [measured([0.001], 500)]),
        record_of(job_of(OURS, "bf16", "load"), [measured([0.1])]),
    ]
    (only,) = ratios(made)
    assert (only.what, only.scheme, only.best_peer) == ("decode", "int4", "llama.cpp Q4_0")
    assert only.times == pytest.approx({"llama.cpp Q4_0": 2.0, "transformers bf16": 4.0})


def test_times_that_scatter_are_doubted() -> None:
    calm, wild = (
        record_of(job_of(), [measured([1.0, 1.1])]),
        record_of(job_of(LLAMA, "Q4_0"), [measured([1.0, 2.0])]),
    )
    assert doubt([calm]) == ""
    assert doubt([calm, wild]).endswith("do not quote these results: decode llama.cpp Q4_0")


def test_a_job_survives_the_way_to_its_process() -> None:
    job = job_of(what="load", started=12.5, threads=3, source="/a file")
    assert Job.from_json(job.to_json()) == job
