"""`mistral-7b bench`: end to end on small models, and errors."""

from __future__ import annotations

import json
import os
import pathlib

import pytest
from command import start
from refusals import refused

from mistral_7b.bench.records import read_json
from mistral_7b.cli.bench import Bench, plan_of
from mistral_7b.cli.inputs import UsageError

NO_CEILINGS = """
from mistral_7b.bench import run
from mistral_7b.bench.roofline import Ceilings
run.measure_ceilings = lambda *asked: Ceilings(1e9, 1e9)
"""


@pytest.mark.slow
def test_shape_with_a_peer_end_to_end(run, ceilings_asked: list, tmp_path: pathlib.Path) -> None:
    flags = ["--shape", "tiny", "--scheme", "none", "--what", "decode", "batch16", "--context", "20", "--quick"]
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    code, out, err = run("bench", *flags, *files, "--threads", "1", "--peers")
    assert code == 0, err
    assert ceilings_asked == [(1, True)]
    records = read_json(tmp_path / "r.json")
    made = [(r.engine, r.what) for r in records]
    assert made == [(e, w) for w in ("decode", "batch16") for e in ("mistral_7b", "transformers")]
    for r in records:
        assert 0 < r.ceiling_fraction < 1.1
        assert (r.model, r.threads, r.scheme) == ("random tiny", 1, "none" if r.engine == "mistral_7b" else "bf16")
        assert r.context == (20 if r.what == "decode" else 32)
        assert r.peak_rss_bytes > 50e6
    assert (tmp_path / "r.png").stat().st_size > 5000
    for text in ("decode, 1 row after 20 tokens", "16 rows decoding together", "of ceiling", "transformers bf16"):
        assert text in out
    ratio = records[0].tokens_per_s / records[1].tokens_per_s
    assert f"{ratio:.2f}*" in out


def test_bundled_model_end_to_end(run, ceilings_asked: list, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.json"
    flags = ("--scheme", "none", "--what", "load", "prefill", "--prompt", "40", "--quick", "--json", str(path))
    code, out, err = run("bench", *flags)
    assert code == 0, err
    assert ceilings_asked == [(None, True)]
    load, prefill = json.loads(path.read_text())
    assert (load["what"], prefill["what"]) == ("load", "prefill")
    assert 0.5 < load["seconds"] < 60  # includes importing torch
    assert load["tokens_per_s"] == pytest.approx(1 / load["seconds"])
    assert load["bytes_per_s"] * load["seconds"] == pytest.approx(2 * 8e6, rel=0.3)  # 8 million parameters
    assert "load, to the first token" in out


def test_a_terminated_bench_leaves_no_files(tmp_path: pathlib.Path) -> None:
    process = start(
        "bench", "--shape", "tiny", "--threads", "1", before=NO_CEILINGS,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stderr is not None
    while b"decode" not in (said := process.stderr.readline()):
        assert said
    assert list(tmp_path.iterdir())
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.wording
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--context", "0"], "--context must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--shape", "tiny", "--layers", "0"], "--layers must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--shape", "8b"], "--shape"),
        (["--scheme", "int3"], "--scheme"),
        (["--shape", "tiny", "--what", "load"], "name a model instead of --shape"),
        (["--layers", "2"], "--layers needs --shape"),
        (["demo", "--shape", "7b"], "exclude each other"),
        (["--json", "/nowhere/r.json"], "there is no folder /nowhere"),
        (["--plot", "/nowhere/r.png"], "there is no folder /nowhere"),
        (["/nowhere"], "/nowhere"),
        (["{short}", "--context", "65"], "is 64 tokens, not 512"),
        (["{short}", "--context", "65", "--prompt", "5"], "is 64 tokens, not 65"),
    ],
)
def test_what_is_refused(run, short: str, words: list[str], message: str) -> None:
    code, out, err = run("bench", *(w.format(short=short) for w in words))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_missing_matplotlib_is_told_before_anything_is_measured(run, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run("bench", "--shape", "tiny", "--plot", "r.png")
    assert (code, out) == (2, "")
    assert err == "mistral-7b: a plot needs matplotlib; pip install 'mistral-7b[plot]'\n"


def test_a_shape_has_fewer_layers_and_no_file(windowed: str) -> None:
    plan = plan_of(Bench(shape="7b", layers=4))
    assert (plan.args["n_layers"], plan.args["dim"], plan.source) == (4, 4096, None)
    assert plan.whats == ("decode", "prefill", "batch16")
    assert plan.model == "random 7b, 4 layers"
    plan = plan_of(Bench(windowed, context=1000))
    assert (plan.source, plan.args["sliding_window"]) == (windowed, 8)
    assert plan.schemes == ("int4", "int8", "bf16")


@pytest.mark.usefixtures("ceilings_asked")
def test_a_quantized_folder_is_measured_in_its_own_scheme(run, windowed: str, tmp_path: pathlib.Path) -> None:
    out = str(tmp_path / "int8")
    assert run("quantize", windowed, out, "--scheme", "int8", "--tokens", "20").code == 0
    assert plan_of(Bench(out)).schemes == plan_of(Bench(out, scheme=("int8",))).schemes == ("int8",)
    with refused(UsageError, field="--scheme"):
        plan_of(Bench(out, scheme=("int4", "int8")))
    path, flags = tmp_path / "r.json", ("--what", "decode", "--context", "20", "--threads", "1", "--quick")
    assert run("bench", out, *flags, "--json", str(path)).code == 0
    (record,) = read_json(path)
    assert record.scheme == "int8"
