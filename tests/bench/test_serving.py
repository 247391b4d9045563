"""Traffic, the open-loop client, and both engines under load."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from bench_samples import ARGS
from fake_llama_server import install
from refusals import refused
from serving_samples import job_of
from waiting import less

from mistral_7b.bench.jobs import LLAMA, OURS
from mistral_7b.bench.serving import llama_server, ours
from mistral_7b.bench.serving.client import drive
from mistral_7b.bench.serving.traffic import Arrival, ServingJob, Traffic
from mistral_7b.errors import BenchmarkError


def test_arrivals_are_random_and_of_the_rate() -> None:
    at = [a.at for a in Traffic(2000, 4.0, seed=1).draw(100)]
    gaps = [b - a for a, b in pairwise(at)]
    assert at[0] == 0
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.1)  # as in a Poisson process
    assert {a.at for a in Traffic(20, None).draw(100)} == {0.0}


def test_every_rate_asks_the_same_questions() -> None:
    shape = {"prompt": (10, 40), "output": (3, 6), "shared": 0.5}
    slow, fast = (Traffic(200, rate, **shape).draw(100) for rate in (1.0, 8.0))  # type: ignore[arg-type]
    assert [(a.prompt, a.output) for a in slow] == [(a.prompt, a.output) for a in fast]
    assert [a.at for a in slow] == pytest.approx([8 * a.at for a in fast])
    assert Traffic(200, 1.0, **shape, seed=1).draw(100) != slow  # type: ignore[arg-type]
    assert {len(a.prompt) for a in slow} == set(range(10, 41))
    assert {a.output for a in slow} == {3, 4, 5, 6}
    for a in slow:
        assert a.prompt[0] == 1
        assert min(a.prompt[1:]) >= 3
        assert max(a.prompt) < 100
        half = round(len(a.prompt) / 2)
        assert a.prompt[:half] == max(slow, key=lambda a: len(a.prompt)).prompt[:half]
    assert len({tuple(a.prompt[half:]) for a in slow if len(a.prompt) == 40}) > 1


class Sluggish:
    """A target that answers requests sequentially, and blocks the process when it starts."""

    def __init__(self) -> None:
        self.began, self.called = time.perf_counter(), []
        self.lock = asyncio.Lock()

    async def stream(self, prompt: list[int], output: int) -> AsyncIterator[int]:
        self.called.append(time.perf_counter() - self.began)
        async with self.lock:
            time.sleep(0.1)
            yield 1
            await asyncio.sleep(0.05)
            yield output - 1


def test_nobody_waits_for_a_busy_engine_to_be_sent() -> None:
    async def run() -> tuple[Sluggish, list]:
        target = Sluggish()
        return target, await drive(target, [Arrival(at, [1], 3) for at in (0.0, 0.02, 0.12, 0.13)])

    def sent_within() -> float:
        target, traces = asyncio.run(run())
        # Requests that arrive while the process is blocked are sent right after; latency counts from arrival.
        assert [t.arrived for t in traces] == [0.0, 0.02, 0.12, 0.13]
        for turn, trace in enumerate(traces):
            assert len(trace.tokens) == 3
            assert trace.tokens[0] >= 0.1 + 0.15 * turn
            assert trace.tokens[2] - trace.tokens[0] >= 0.05
            assert trace.error is None
        return target.called[3] - target.called[0]

    less(0.35, sent_within)  # all arrived before the second was answered


@pytest.mark.wording
def test_requests_that_fail_are_told_from_those_that_do_not() -> None:
    class Fragile:
        async def stream(self, prompt: list[int], output: int) -> AsyncIterator[int]:
            if prompt == [7]:
                raise BenchmarkError("seven")
            yield 1
            if prompt != [8]:
                yield output - 1

    def errors(*prompts: int) -> list:
        return [t.error for t in asyncio.run(drive(Fragile(), [Arrival(0.0, [p], 4) for p in prompts]))]

    assert errors(1, 7, 8) == [None, "BenchmarkError: seven", "1 tokens came, not 4"]
    with pytest.raises(BenchmarkError, match="no request was answered; the first: BenchmarkError: seven"):
        errors(7, 7)


def test_a_job_goes_to_another_process_and_is_the_same_there() -> None:
    for rate in (None, 2.5):
        job = job_of(OURS, "none", traffic=Traffic(3, rate, (4, 9), (2, 2), 0.25, 7))
        assert ServingJob.from_json(job.to_json()) == job


def test_our_engine_is_served() -> None:
    traffic = Traffic(6, None, prompt=(64, 64), output=(5, 9), shared=0.75)
    served = ours.serve(job_of(OURS, "none", traffic=traffic, threads=1, max_sequences=2))
    drawn = traffic.draw(ARGS["vocab_size"])
    assert [len(t.tokens) for t in served.traces] == [a.output for a in drawn]
    assert [t.error for t in served.traces] == [None] * 6
    for trace in served.traces:
        assert trace.tokens[0] > 0
        assert trace.tokens == sorted(trace.tokens)
    # Two at a time, and a page is 16 tokens: the last four, at least, find 48 of their 64 tokens computed.
    assert 4 * 48 <= served.cached <= 5 * 48
    assert served.threads == 1
    assert served.alone > 0
    assert served.peak_rss_bytes > 50e6


@pytest.mark.parametrize("kind", ["fine", "silent"])
def test_a_server_is_started_asked_and_stopped(tmp_path: pathlib.Path, kind: str) -> None:
    traffic = Traffic(5, 100.0, prompt=(200, 300), output=(4, 8))
    job = job_of(LLAMA, "Q4_0", traffic=traffic, threads=2, max_sequences=3, source=str(tmp_path / f"{kind}.gguf"))
    served = llama_server.serve(job, install(tmp_path))
    flags = json.loads((tmp_path / "flags").read_text())
    assert " ".join(flags).endswith(" --parallel 3 -c 1536 -t 2 -tb 2 --cache-ram 0")
    warm_up, *asked = map(json.loads, (tmp_path / "requests").read_text().splitlines())
    drawn = traffic.draw(ARGS["vocab_size"])
    assert sorted((a["prompt"], a["max_tokens"]) for a in asked) == sorted((a.prompt, a.output) for a in drawn)
    assert all(a["stream"] and a["ignore_eos"] and a["temperature"] == 0 for a in asked)
    assert warm_up["prompt"][:16] != drawn[0].prompt[:16]
    assert [len(t.tokens) for t in served.traces] == [a.output for a in drawn]
    assert served.alone > 0.01 * drawn[0].output
    if kind == "fine":  # the fake's hundredths of a second
        assert all(t.tokens[-1] - t.tokens[0] > 0.009 * (len(t.tokens) - 1) for t in served.traces)
    assert served.cached == 5 * 3
    assert served.path.startswith("AVX512, AMX_INT8; --parallel 3")
    assert served.versions == {"llama-server": "7 (abc)"}
    assert served.peak_rss_bytes > 1e6
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(anext(llama_server.exchange(int(flags[flags.index("--port") + 1]), "GET", "/health")))


@pytest.mark.wording
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("full", "the server returned 503: .*no slot is free"),
        ("broken", "the connection broke: "),
        ("gone", "llama-server did not start: cannot open the file"),
    ],
)
def test_a_server_that_fails_says_why(tmp_path: pathlib.Path, file: str, message: str) -> None:
    job = job_of(LLAMA, "Q4_0", source=str(tmp_path / f"{file}.gguf"))
    with pytest.raises(BenchmarkError, match=message):
        llama_server.serve(job, install(tmp_path))


def test_a_server_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with refused(BenchmarkError, field="--llama-server"):
        llama_server.serve(job_of(LLAMA, "Q4_0", source="x.gguf"), "/no/such/server")


def test_the_real_server_answers_as_it_is_asked(tmp_path: pathlib.Path) -> None:
    server = os.environ.get("MISTRAL_7B_LLAMA_SERVER")
    if not server:
        pytest.skip("MISTRAL_7B_LLAMA_SERVER names a llama-server")
    pytest.importorskip("gguf")
    from mistral_7b.bench.run import PeerFiles

    file = PeerFiles(sys.executable, str(tmp_path), print).gguf(ARGS, "Q4_0")
    traffic = Traffic(5, 50.0, prompt=(20, 30), output=(4, 8))
    job = dataclasses.replace(job_of(LLAMA, "Q4_0", traffic=traffic, threads=1), source=file)
    served = llama_server.serve(job, server)
    assert [(t.error, len(t.tokens)) for t in served.traces] == [
        (None, a.output) for a in traffic.draw(ARGS["vocab_size"])
    ]
    assert "llama-server" in served.versions
