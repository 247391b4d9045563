"""`mistral-7b bench --serving`: end to end with a peer, and errors."""

from __future__ import annotations

import json
import pathlib

import pytest
from fake_llama_server import install

from mistral_7b.bench.jobs import LLAMA, OURS
from mistral_7b.bench.serving.traffic import Traffic
from mistral_7b.cli.bench import Bench
from mistral_7b.cli.bench_serving import ServingOptions, command, plan_of


def test_a_sweep_beside_a_peer_end_to_end(run, tmp_path: pathlib.Path) -> None:
    path, picture = (str(tmp_path / name) for name in ("r.json", "r.png"))
    (tmp_path / "random-words-2-64-128-256-Q4_0.gguf").touch()  # kept since last time
    flags = ("--shape", "tiny", "--scheme", "int4", "--serving", "--rate", "40", "--requests", "4")
    sizes = ("--prompt-tokens", "20", "30", "--output-tokens", "3", "--threads", "1")
    peer = ("--llama-server", install(tmp_path), "--keep", str(tmp_path))
    code, out, err = run("bench", *flags, *sizes, *peer, "--json", path, "--plot", picture)
    assert code == 0, err
    records = json.loads(pathlib.Path(path).read_text())
    assert [(r["engine"], r["scheme"], r["rate"]) for r in records] == [
        (OURS, "int4", 40.0), (LLAMA, "Q4_0", 40.0),
    ]  # fmt: skip
    for r in records:
        assert (r["model"], r["what"], r["requests"]) == ("random tiny", "serving", 4)
        assert (r["threads"], r["failed"]) == (1, 0)
        assert (r["prompt"], r["output"], r["shared"], r["seed"]) == ([20, 30], [3, 3], 0.0, 0)
        assert r["command"].startswith("mistral-7b bench --shape tiny --scheme int4 --serving --rate 40 ")
        assert str(tmp_path) not in json.dumps(r)
        assert {"cpu", "date", "commit", "versions", "peak_rss_bytes"} <= set(r)
        times = [r[name] for name in ("first_token", "between_tokens", "latency")]
        assert all(0 <= t["p50"] <= t["p95"] <= t["p99"] for t in times)  # tokens may come two at a time
        assert r["first_token"]["p50"] > 0
        assert r["latency"]["p50"] > 0
        assert r["tokens_per_s"] == pytest.approx(12 / r["seconds"])
    assert pathlib.Path(picture).stat().st_size > 20_000
    for text in ("4 at 40/s", "first token, s", "ours over the peer's", "prompts of 20 to 30 tokens"):
        assert text in out
    assert json.loads((tmp_path / "flags").read_text())[1] == str(tmp_path / "random-words-2-64-128-256-Q4_0.gguf")


def test_flags_become_points() -> None:
    options = ServingOptions(
        serving=True, rate=(2.0, float("inf"), 2.0), requests=(16, 32), prompt_tokens=(8,), output_tokens=(2, 5),
        shared=0.5, seed=3,
    )  # fmt: skip
    plan = plan_of(Bench(shape="tiny", scheme=("int8",), rounds=2, traffic=options), ["--serving"])
    usual = ((8, 8), (2, 5), 0.5, 3)
    assert plan.points == tuple(Traffic(n, rate, *usual) for rate in (2.0, None) for n in (16, 32))
    assert (plan.max_sequences, plan.max_batch_tokens, plan.rounds, plan.schemes) == (64, 256, 2, ("int8",))
    timed = plan_of(Bench(shape="tiny", traffic=ServingOptions(serving=True, rate=(0.5, 4.0), seconds=30.0)), [])
    assert [(p.requests, p.rate) for p in timed.points] == [(15, 0.5), (120, 4.0)]


def test_a_command_is_kept_without_the_places_of_this_machine() -> None:
    assert command(["--serving", "--llama-server", "/a/b c/llama-server", "--rate", "inf"]) == (
        "mistral-7b bench --serving --llama-server llama-server --rate inf"
    )


@pytest.mark.wording
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "2", "--shared", "0.5"], "--rate, --shared: only with --serving"),
        (["--serving", "--what", "decode", "--peers"], "--what, --peers: not with --serving"),
        (["--serving", "--rate", "0"], "--rate takes numbers above 0, or inf, not 0.0"),
        (["--serving", "--rate", "nan"], "--rate takes numbers above 0, or inf, not nan"),
        (["--serving", "--requests", "4", "0"], "--requests must be at least 1"),
        (["--serving", "--seconds", "-1"], "--seconds must be above 0"),
        (["--serving", "--prompt-tokens", "9", "8"], "--prompt-tokens takes a number, or the least and the most"),
        (["--serving", "--output-tokens", "1", "2", "3"], "--output-tokens takes a number, or the least and"),
        (["--serving", "--shared", "1.5"], "--shared is a share from 0 to 1"),
        (["--serving", "--threads", "0"], "--threads must be at least 1"),
        (["--serving", "--max-sequences", "300"], "max_batch_tokens (256) must hold a page of a prompt"),
        (["--serving", "--plot", "/nowhere/r.png"], "there is no folder /nowhere"),
        (["{short}", "--serving", "--prompt-tokens", "60", "--output-tokens", "5"], "is 64 tokens, not 65"),
    ],
)
def test_what_is_refused(run, short: str, words: list[str], message: str) -> None:
    code, out, err = run("bench", *(w.format(short=short) for w in words))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
