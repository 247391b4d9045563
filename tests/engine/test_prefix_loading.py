"""Pages that are read from disk and written beside other requests, however slow the disk and scarce the pages."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from automaton import Automaton, engine_of, request_of
from test_prefix_cache_disk import (
    PAGE,
    PARAMS,
    PROMPT,
    ask,
    config_of,
    files_in,
    filled,
    model_of,
    restarted,
    said,
)
from tiny import tokens_of

from mistral_7b.engine import disk_io
from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.disk_cache import DiskScheduler
from mistral_7b.engine.disk_files import PageFiles
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.page_contents import page_bytes
from mistral_7b.sampling.params import SamplingParams

__all__ = ["filled"]  # a fixture


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("n_pages", [9, 40])
def test_pages_hold_what_was_written_for_them(window: int | None, n_pages: int, tmp_path: Path) -> None:
    """An automaton sees to it that each page it reads is its own; engines come and go, pages are scarce."""
    model, draw = Automaton(window), random.Random(n_pages)
    bank = [[draw.randrange(11) for _ in range(draw.randrange(1, 14))] for _ in range(4)]
    hits = 0
    for _ in range(12):
        engine = engine_of(
            model, n_pages, prefix_cache=tmp_path, page_size=PAGE, max_sequences=4, max_batch_tokens=16
        )
        to_come = [[t for part in draw.sample(bank, draw.randrange(1, 4)) for t in part] for _ in range(10)]
        while to_come or not engine.idle:
            if to_come and draw.random() < 0.5:
                n = draw.randrange(1, 3)
                params = SamplingParams(max_tokens=8 // n, temperature=0, ignore_eos=True, n=n)
                request = request_of(engine, to_come.pop()[: n_pages * PAGE - 16], params)
                engine.add(request)
                if draw.random() < 0.2:
                    engine.abort(request.id)
                    assert request.finished
            engine.step()
            engine.check()
            assert engine.counts.steps < 5000, "it does not come to an end"
            model.check_keys(engine.pool)
        hits += engine.counts.disk_hits
        engine.scheduler.close()
    assert hits > 100


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are read and written when this is set."""
    let = threading.Event()
    for name in ("read", "write"):
        work = getattr(PageFiles, name)
        monkeypatch.setattr(PageFiles, name, lambda *a, work=work: let.wait(60) and work(*a))
    yield let
    let.set()


def test_a_slow_disk_delays_its_own_request_alone(filled: Path, slow: threading.Event) -> None:
    llm = restarted(filled)
    request, other = (
        llm.inputs.text(p, PARAMS, RequestOptions()) for p in (PROMPT, tokens_of((9,), seed=3).tolist())
    )
    llm.engine.add(request)
    llm.engine.add(other)
    while not other.finished:
        llm.engine.step()
        llm.engine.check()
    assert request.cached is None
    assert llm.engine.scheduler.waiting == 1
    slow.set()
    while not request.finished:
        llm.engine.step()
    assert request.cached == 40


def test_what_is_in_memory_of_a_prefix_stays_while_the_rest_is_read(tmp_path: Path) -> None:
    kind = "int8 without a window"
    first = restarted(tmp_path, kind)
    ask(first)
    again = restarted(tmp_path, kind, first, kv_cache_bytes=12 * page_bytes(first.engine.pool))
    ask(again, PROMPT[:9])
    ask(again, tokens_of((30,), seed=8).tolist())
    request = again.inputs.text(PROMPT, PARAMS, RequestOptions())
    assert again.engine.pool.find(request.sequences[0].key_of(1, PAGE)) is not None
    read = again.engine.counts.disk_read_bytes
    assert ask(again).num_cached_tokens == 40
    assert again.engine.counts.disk_read_bytes - read == 8 * page_bytes(again.engine.pool)


def test_pages_that_were_read_are_held_until_their_request_begins(filled: Path) -> None:
    wanted = said(ask(LLM(model_of("int8"), config_of(None))))
    llm = restarted(filled, max_sequences=1)  # as few pages as one sequence needs
    long = dataclasses.replace(PARAMS, max_tokens=60)
    running, request = (
        llm.inputs.text(p, q, RequestOptions())
        for p, q in ((tokens_of((9,), seed=3).tolist(), long), (PROMPT, PARAMS))
    )
    llm.engine.add(running)
    llm.engine.add(request)
    while not request.finished:
        llm.engine.step()
        llm.engine.check()
    assert request.cached == 40
    assert said(request.output()) == wanted


def test_one_request_is_read_at_a_time_and_the_first_in_rank(tmp_path: Path) -> None:
    prompts = [tokens_of((20,), seed=seed).tolist() for seed in range(4)]
    llm = restarted(tmp_path)
    llm.generate(prompts[1:], PARAMS)
    llm = restarted(tmp_path, before=llm, max_sequences=1, kv_cache_bytes=60 * page_bytes(llm.engine.pool))
    engine, scheduler = llm.engine, llm.engine.scheduler
    long = dataclasses.replace(PARAMS, max_tokens=60)
    running = llm.inputs.text(prompts[0], long, RequestOptions())
    waiting = [
        llm.inputs.text(p, PARAMS, RequestOptions(priority=n)) for p, n in zip(prompts[1:], (1, 2, 0), strict=True)
    ]
    engine.add(running)
    engine.step()
    for request in waiting[:2]:
        engine.add(request)
    assert isinstance(scheduler, DiskScheduler)

    def until_read(hits: int) -> None:
        while engine.counts.disk_hits < hits and not running.finished:
            engine.step()
        for _ in range(5):
            engine.step()

    until_read(16)
    assert engine.counts.disk_hits == 16
    assert scheduler._held_back == [waiting[1]]
    engine.add(waiting[2])
    until_read(32)
    assert scheduler._held_back == [waiting[1]], "the first in rank is read, and no other until it has begun"
    while not engine.idle:
        engine.step()
    assert [request.cached for request in waiting] == [16, 16, 16]


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_is_given_up_while_it_is_read_leaves_nothing(
    begun: bool, tmp_path: Path, slow: threading.Event
) -> None:
    kind = "int8 without a window"
    slow.set()
    first = restarted(tmp_path, kind)
    ask(first)
    llm = restarted(tmp_path, kind, first)
    ask(llm, PROMPT[:9])  # two pages are in memory, and held while the others are read
    slow.clear()
    requests = [llm.inputs.text(PROMPT, PARAMS, RequestOptions()) for _ in range(2)]
    for request in requests:
        llm.engine.add(request)
    if begun:
        llm.engine.step()
    for request in requests:
        llm.engine.abort_request(request)
    assert llm.engine.idle
    assert llm.engine.scheduler.waiting == 0
    llm.engine.check()
    slow.set()
    assert ask(llm).num_cached_tokens == 40


def test_pages_are_dropped_where_the_disk_is_slow(
    tmp_path: Path, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_io, "BUFFER", 1)  # one page waits, and one is being written
    llm = restarted(tmp_path, "int8 without a window")
    for seed in range(3):
        ask(llm, tokens_of((40,), seed=seed).tolist())
    written = 30 - llm.engine.counts.disk_dropped
    assert 1 <= written <= 2
    slow.set()
    llm.engine.scheduler.close()
    assert len(files_in(tmp_path)) == written


def test_a_server_counts_what_it_finds(filled: Path) -> None:
    async def scene() -> None:
        async with AsyncLLM(model_of("int8"), config_of(filled)) as llm:
            outputs = [o async for o in llm.generate(PROMPT, PARAMS)]
            assert outputs[-1].num_cached_tokens == 40
            assert said(outputs[-1])[0][0] == said(ask(LLM(model_of("int8"), config_of(None))))[0][0]

    asyncio.run(asyncio.wait_for(scene(), 60))
