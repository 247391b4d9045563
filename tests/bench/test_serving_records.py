"""Records of traces, computed by hand; alternating engines; tables and plot."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from bench_samples import ARGS
from refusals import refused
from serving_samples import HERE, job_of, served

from mistral_7b.bench.jobs import LLAMA, OURS
from mistral_7b.bench.serving import plot, report, run
from mistral_7b.bench.serving.client import Served, Trace
from mistral_7b.bench.serving.records import ServingRecord, kept_up, record, unfinished
from mistral_7b.bench.serving.traffic import ServingJob, Traffic
from mistral_7b.errors import BenchmarkError

# Two requests of 5 tokens, one that fails and one that is answered at once.
TRACES = [
    Trace(0.0, [1.0, 1.5, 2.5], 5), Trace(1.0, [1.5, 2.0, 4.0], 5), Trace(2.0, [2.1], 5, "broken"),
]  # fmt: skip


def record_of(
    engine: str = OURS, scheme: str = "int4", rate: float | None = None, **changes: Any
) -> ServingRecord:  # fmt: skip
    made = record(job_of(engine, scheme, traffic=Traffic(2, rate, (5, 5), (3, 3))), [served(*TRACES[:2])], HERE)
    return dataclasses.replace(made, **changes)


def test_a_record_by_hand() -> None:
    r = record(job_of(OURS, traffic=Traffic(3, 1.0, (5, 5), (3, 3))), [served(*TRACES, cached=2)], HERE)
    assert (r.seconds, r.failed, r.requests, r.cached_tokens) == (4.0, 1, 3, 2)
    assert (r.requests_per_s, r.tokens_per_s, r.total_tokens_per_s) == (2 / 4, 6 / 4, 16 / 4)
    assert r.first_token == pytest.approx({"p50": 0.75, "p95": 0.975, "p99": 0.995})  # of 1 and 0.5
    assert r.between_tokens["p50"] == pytest.approx(0.75)  # of 0.5, 1, 0.5, 2
    assert r.latency == pytest.approx({"p50": 2.75, "p95": 2.975, "p99": 2.995})  # of 2.5 and 3
    assert r.unfinished == 3
    assert (r.cpu, r.command, r.model, r.what) == ("a CPU", "mistral-7b bench --serving", "small", "serving")
    assert json.loads(json.dumps(dataclasses.asdict(r)))["rate"] == 1.0


def test_rounds_are_medians_of_rates_and_all_of_the_times() -> None:
    slow = [Trace(t.arrived, [3 * s for s in t.tokens], t.prompt) for t in TRACES[:2]]
    r = record(job_of(OURS), [served(*TRACES[:2]), served(*slow), served(*slow)], HERE)
    assert (r.seconds, r.rounds, r.tokens_per_s) == (12.0, 3, 6 / 12)
    assert r.spread == pytest.approx(0.8 * 8 / 12)
    assert r.first_token["p50"] == pytest.approx((2.0 + 3.0) / 2 + 0.5)  # of 1, 0.5, 3, 3.5, 3, 3.5
    assert r.kept_up is None


def queue(rate: float, seconds: float, service: float = 1.0) -> list[Trace]:
    """A server that takes `service` seconds per request, in order of arrival."""
    free, traces = 0.0, []
    for arrival in Traffic(round(rate * seconds), rate, seed=3).draw(100):
        free = max(free, arrival.at) + service
        traces.append(Trace(arrival.at, [free], 1))
    return traces


@pytest.mark.parametrize(
    ("rate", "seconds", "verdict"),
    [(0.2, 400, True), (0.7, 400, True), (1.2, 200, False), (5.0, 100, False), (30.0, 1.5, None), (0.5, 24, None)],
)
def test_whether_a_queue_grows(rate: float, seconds: float, verdict: bool | None) -> None:
    traces = queue(rate, seconds)
    assert kept_up(served(*traces)) is verdict
    if verdict is False:
        assert unfinished(traces) > 0.15 * len(traces)
    if verdict is True:
        assert unfinished(traces) < 0.2 * len(traces)


def test_a_server_too_slow_for_anyone_is_not_taken_for_a_short_run() -> None:
    late = [dataclasses.replace(t, tokens=[t.tokens[0] + 50]) for t in queue(2.0, 20)]
    assert kept_up(served(*late, alone=1.0)) is False
    assert kept_up(served(*late, alone=50.0)) is None


PLAN = run.ServingPlan(
    "small", ARGS, "/a model", ("int4", "none"), (Traffic(4, 2.0), Traffic(4)), 8, 64,
    rounds=2, server="/a server",
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ServingJob]:
    """Replaces processes: every engine gives the same answers; jobs are recorded."""
    jobs: list[ServingJob] = []

    def call(python: str, *argv: str) -> dict:
        assert argv[0] == "serving"
        jobs.append(ServingJob.from_json(argv[1]))
        return dataclasses.asdict(served(*TRACES[:2], threads=3))

    def serve(job: ServingJob, server: str) -> Served:
        assert server == "/a server"
        jobs.append(job)
        return served(*TRACES[:2], threads=job.threads)

    monkeypatch.setattr(run, "call", call)
    monkeypatch.setattr(run.llama_server, "serve", serve)
    monkeypatch.setattr(run.PeerFiles, "gguf", lambda self, args, scheme: f"/{scheme}.gguf")
    return jobs


def test_engines_take_turns_at_every_point(asked: list[ServingJob]) -> None:
    records = run.run(PLAN)
    turn = [(OURS, "int4", "/a model"), (LLAMA, "Q4_0", "/Q4_0.gguf"), (OURS, "none", "/a model")]
    once = [(*who, traffic) for traffic in PLAN.points for who in turn]
    assert [(j.engine, j.scheme, j.source, j.traffic) for j in asked] == once * 2
    assert [(r.engine, r.scheme, r.rate, r.rounds) for r in records] == [
        (engine, scheme, traffic.rate, 2) for engine, scheme, _, traffic in once
    ]
    # The number of threads is not set: the peer gets as many as ours used.
    assert [j.threads for j in asked] == [None] + [3] * 11
    assert {(j.max_sequences, j.max_batch_tokens) for j in asked} == {(8, 64)}
    run.run(dataclasses.replace(PLAN, server=None, rounds=1))
    assert {j.engine for j in asked[12:]} == {OURS}


@pytest.mark.wording
def test_a_peer_that_fails_is_told_once_and_left_out(
    asked: list[ServingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: object, args: dict, scheme: str) -> str:
        raise BenchmarkError("no llama here")

    monkeypatch.setattr(run.PeerFiles, "gguf", none)
    told: list[str] = []
    assert {r.engine for r in run.run(PLAN, told.append)} == {OURS}
    assert [t for t in told if "skipped" in t] == ["skipped: llama.cpp Q4_0: no llama here"]
    monkeypatch.setattr(run, "call", lambda *argv: none(None, {}, ""))
    with pytest.raises(BenchmarkError):
        run.run(PLAN)


def text_of(records: list[ServingRecord]) -> str:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    for table in report.tables(records):
        console.print(table)
    return report.heading(records) + console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_hold_the_figures_and_ours_over_the_peer() -> None:
    peer = record_of(LLAMA, "Q4_0", tokens_per_s=0.6, kept_up=False)
    records = [
        record_of(rate=2.0, kept_up=False, unfinished=17), record_of(rate=0.5, kept_up=True, spread=0.5, rounds=3),
        record_of(), peer,
    ]  # fmt: skip
    text = text_of(records)
    for part in ("grew to 17", "kept up", "2 at 0.5/s", "2 at once", "prompts of 5 tokens", "seed 0", "50.0%"):
        assert part in text
    row = next(line for line in text.splitlines() if "2 at 2/s" in line and "0.75" in line)
    assert [cell.strip() for cell in row.split("|")[4:7]] == [
        "0.75 / 0.975 / 0.995", "750 / 1850 / 1970", "2.75 / 2.98 / 3",
    ]  # fmt: skip
    (pair,) = report.ratios(records)
    assert pair == (records[2], peer)  # records of other traffic are not compared
    ratio = [cell.strip() for cell in text.splitlines()[-2].split("|")[1:6]]
    assert ratio == ["int4", "llama.cpp Q4_0", "2 at once", "2.50", "1.00"]
    assert "ours over" not in text_of(records[:3])
    assert report.doubt([record_of(failed=2)]) == "2 requests failed; throughput and latency exclude them"
    assert "the machine was busy: mistral_7b int4 2 at 0.5/s" in report.doubt(records)
    assert report.doubt([record_of()]) == ""


def test_the_picture_has_every_engine_and_point(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    records = [
        record_of(engine, scheme, rate, tokens_per_s=speed, kept_up=rate != 2.0 if rate else None)
        for engine, scheme, speed in ((OURS, "int4", 10.0), (LLAMA, "Q4_0", 5.0))
        for rate in (2.0, 1.0, None)
    ]
    plot.draw(tmp_path / "serving.svg", records)
    drawn = (tmp_path / "serving.svg").read_text()
    places = [drawn.index(f"<!-- {text} -->") for text in ("at 1/s", "at 2/s", "at once")]
    assert places == sorted(places)
    for text in ("mistral_7b int4", "llama.cpp Q4_0", "the queue grew", "p99"):
        assert f"<!-- {text} -->" in drawn
    with refused(BenchmarkError, field="--plot"):
        plot.draw(tmp_path / "serving.xyz", records)
    assert [p.name for p in tmp_path.iterdir()] == ["serving.svg"]
