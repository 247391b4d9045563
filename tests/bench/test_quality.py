"""The distance of each format compared with plain formulas, bits counted by hand, and llama.cpp beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile

import pytest
import torch
from refusals import refused
from tiny import tiny_model
from tokenizer_files import byte_level_folder

from mistral_7b import Mistral7B, ModelArgs, Tokenizer
from mistral_7b.bench.jobs import LLAMA, OURS
from mistral_7b.bench.quality import ours, report, run
from mistral_7b.bench.quality.records import PEER_TYPES, QualityRecord
from mistral_7b.bench.run import _imports
from mistral_7b.checkpoint import convert, hub, quantize, read_args
from mistral_7b.checkpoint.reading import open_checkpoint
from mistral_7b.errors import BenchmarkError, CheckpointError
from mistral_7b.quantization.schemes import Scheme

PEER_PYTHON = os.environ.get("MISTRAL_7B_PEER_PYTHON", sys.executable)  # the Python that has llama_cpp
# Whole blocks of every format, and of the tiles of the kernels; the embedding is not the output.
ARGS = ModelArgs(
    dim=256, n_layers=2, head_dim=64, hidden_dim=512, n_heads=4, n_kv_heads=2, vocab_size=704,
    sliding_window=None, rope_theta=1e4, max_seq_len=48,
)  # fmt: skip
TEXT = "for i in range(10): print(i * i)\n" * 40
LAYERS = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)  # weights
TABLE = 704 * 256


def written(folder: pathlib.Path, args: ModelArgs = ARGS) -> pathlib.Path:
    """Write a model with a tokenizer without BOS, and return its folder."""
    tiny_model(args).save_pretrained(folder)
    with tempfile.TemporaryDirectory() as beside:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(byte_level_folder(pathlib.Path(beside)) / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return written(tmp_path_factory.mktemp("model") / "plain")


def plan_of(model: pathlib.Path, *schemes: str | pathlib.Path, **changes: object) -> run.QualityPlan:
    plan = run.QualityPlan("tiny", str(model), schemes, TEXT, "a text", rows=3, threads=1)
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def test_the_distance_is_that_of_plain_formulas(model: pathlib.Path) -> None:
    (record,) = run.run(plan_of(model, "int8"))
    ids = torch.tensor(Tokenizer.from_pretrained(model).encode(TEXT, bos=False)[: 3 * 48]).view(3, 48)
    original, quantized = (
        Mistral7B.from_pretrained(model, dtype=torch.float32, quantization=scheme) for scheme in (None, "int8")
    )
    with torch.inference_mode():
        p, q = (m(ids)[0][:, :-1].double().log_softmax(-1) for m in (original, quantized))
    assert record.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert record.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    for log, found in ((p, record.perplexity_original), (q, record.perplexity)):
        nats = -log.gather(-1, ids[:, 1:, None]).mean()
        assert found == pytest.approx(nats.exp().item(), rel=1e-4)
    assert 0 < record.kl < 0.1
    assert (record.engine, record.scheme, record.tokens, record.own_type) == (OURS, "int8", 3 * 47, "float32")
    assert (record.rows, record.row_tokens, record.threads) == (3, 48, 1)
    assert (record.text, record.text_sha256) == ("a text", hashlib.sha256(TEXT.encode()).hexdigest())


def test_rows_begin_with_bos_where_the_texts_of_a_model_do_and_fit_its_window() -> None:
    demo = hub.resolve("demo")
    tokens, args = run.rows_of(plan_of(demo, rows=2), open_checkpoint(demo)), read_args(demo)[0]
    tokenizer = Tokenizer.from_pretrained(demo)
    ids = tokenizer.encode(TEXT, bos=False)
    width = tokens.shape[1] - 1
    assert tokens.shape == (2, args.sliding_window)
    assert [row[0] for row in tokens.tolist()] == [tokenizer.start_id] * 2
    assert tokens[:, 1:].flatten().tolist() == ids[: 2 * width]


@pytest.mark.parametrize("scheme", run.integer_schemes())
def test_bits_are_those_of_the_tensors_without_the_embedding(model: pathlib.Path, scheme: str) -> None:
    quantized = ours.quantized_model(str(model), scheme)
    left_out = ("tok_embeddings.", "norm.weight")
    size = sum(
        t.nbytes
        for name, t in quantized.state_dict().items()
        if not name.startswith(left_out) and not name.endswith("norm.weight")
    )
    assert ours.bits_per_weight(quantized) == pytest.approx(8 * size / (LAYERS + TABLE))
    assert ours.bits_per_weight(ours.float_model(open_checkpoint(model))) == 32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "layers", "output"), [("q8_0", 8.5, 8.5), ("q4_0", 4.5, 8.5), ("f32", 32, 32)])
def test_bits_of_a_file_are_counted_as_those_of_a_model(
    tmp_path: pathlib.Path, kind: str, layers: float, output: float, tied: bool
) -> None:
    folder = written(tmp_path / "plain", dataclasses.replace(ARGS, tie_embeddings=tied))
    convert(folder, tmp_path / "m.gguf", "gguf", type=kind)
    wanted = (LAYERS * layers + TABLE * output) / (LAYERS + TABLE)
    assert run.file_bits_per_weight(tmp_path / "m.gguf") == pytest.approx(wanted)
    loaded = ours.quantized_model("", tmp_path / "m.gguf")
    assert ours.bits_per_weight(loaded) == pytest.approx(wanted)


def test_a_gguf_file_is_measured_as_it_is(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    convert(model, tmp_path / "m.gguf", "gguf", type="q4_0")
    (record,) = run.run(plan_of(model, tmp_path / "m.gguf"))
    assert (record.scheme, record.file, record.name) == ("Q4_0", "m.gguf", "Q4_0 (m.gguf)")
    dequantized = ours.float_model(open_checkpoint(tmp_path / "m.gguf"))
    tokens = run.rows_of(plan_of(model), open_checkpoint(model))
    original = ours.float_model(open_checkpoint(model))
    weights_alone = run.distance(ours.logits(original, tokens), ours.logits(dequantized, tokens), tokens)["kl"]
    assert record.kl != weights_alone  # activations are quantized, too
    assert record.kl == pytest.approx(weights_alone, rel=0.3)


def test_what_cannot_be_measured_is_refused_first(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "float_model", lambda checkpoint: pytest.fail("it was measured"))
    with refused(BenchmarkError, field="--text"):
        run.run(plan_of(model, "int8", rows=1000))
    with refused(BenchmarkError, field="--peer-python"):
        run.run(plan_of(model, "int8", peers=True, peer_python="false"))
    other = written(tmp_path / "other", dataclasses.replace(ARGS, n_layers=1))
    with refused(BenchmarkError, field="--scheme", place=other):
        run.run(plan_of(model, other))
    small = written(tmp_path / "small", dataclasses.replace(ARGS, vocab_size=64))
    with refused(BenchmarkError, place=small):
        run.run(plan_of(small, "int8"))
    monkeypatch.setattr(run.machine, "memory", lambda: (1 << 30, 1 << 30))
    with refused(BenchmarkError):
        run.run(plan_of(model, "int8"))


def test_a_quantized_model_has_no_float32(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantize(model, tmp_path / "int8", "int8", torch.ones(1, 9, dtype=torch.long), "ones")
    with refused(CheckpointError, place=tmp_path / "int8"):
        run.run(plan_of(tmp_path / "int8", "int8"))


@pytest.fixture(scope="module")
def with_llama() -> None:
    if not _imports(PEER_PYTHON, "llama_cpp"):
        pytest.skip("no llama_cpp here; MISTRAL_7B_PEER_PYTHON names a Python that has it")


@pytest.mark.usefixtures("with_llama")
def test_llama_cpp_computes_the_same_model(model: pathlib.Path) -> None:
    records = run.run(plan_of(model, peers=True, peer_python=PEER_PYTHON))
    found = {r.scheme: r for r in records}
    assert list(found) == ["F32", *PEER_TYPES]
    assert found["F32"].kl < 1e-9
    assert not report.doubt(records)
    assert [round(found[kind].bits_per_weight, 2) for kind in ("F32", "Q8_0", "Q6_K")] == [32, 8.5, 6.56]
    assert found["F32"].kl < found["Q8_0"].kl < found["Q6_K"].kl < found["Q4_0"].kl < 1
    assert {r.engine for r in records} == {LLAMA}
    assert "llama-cpp-python" in records[0].versions


@pytest.mark.usefixtures("with_llama")
def test_a_format_on_whose_grid_the_weights_lie_is_left_out(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    convert(model, tmp_path / "m.gguf", "gguf", type="q4_0")
    records = run.run(plan_of(tmp_path / "m.gguf", peers=True, peer_python=PEER_PYTHON))
    assert [r.scheme for r in records] == ["F32", "Q8_0", "Q6_K", "Q4_K_M", "Q4_1"]
    assert [note for note in report.notes(records) if "Q4_0" in note]


def record_of(engine: str, scheme: str, **changes: object) -> QualityRecord:
    fields = {
        "model": "m", "own_type": "BF16", "text": "t", "text_sha256": "0" * 64, "rows": 1, "row_tokens": 9,
        "threads": 1, "cpu": "a CPU", "date": "2026-01-02", "commit": None, "command": "", "bits_per_weight": 8.5,
        "kl": 0.00123, "top1_agreement": 0.9, "perplexity_original": 10.0, "perplexity": 10.2, "tokens": 8,
        "path": "somewhere", "versions": {"torch": "2"},
    }  # fmt: skip
    return QualityRecord(**{**fields, "engine": engine, "scheme": scheme, **changes})  # type: ignore[arg-type]


def test_the_table_has_a_row_for_each_format_but_the_check() -> None:
    records = [
        record_of(OURS, "int8"),
        record_of(
            OURS, "int8", file="folder", calibration={"method": "m", "tokens": 99, "text": "calibration.txt"}
        ),
        record_of(LLAMA, "F32", kl=2e-11),
        record_of(LLAMA, "Q8_0"),
    ]
    (table,) = report.tables(records)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [c[:2] for c in cells] == [(OURS, "int8"), (OURS, "int8, calibrated (folder)"), (LLAMA, "Q8_0")]
    assert cells[0][2:] == ("8.50", "0.00123", "+2.00%", "90.0%")
    notes = "\n".join(report.notes(records))
    assert "99 tokens of calibration.txt" in notes
    assert "2.0e-11" in notes
    assert report.doubt(records) == ""
    assert report.doubt([record_of(LLAMA, "F32", kl=1e-4)])
    assert json.loads(json.dumps(dataclasses.asdict(records[1])))["calibration"]["tokens"] == 99


def test_integer_schemes_are_those_that_can_be_saved() -> None:
    assert run.integer_schemes()
    assert all(Scheme(name).whole for name in run.integer_schemes())
    assert "bf16" not in run.integer_schemes()
