"""Continuous batching: plans of a scheduler without a model, then all parts of the course together."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from mistral_7b.course.compare import equal, expect, wrong
from mistral_7b.engine.completion import Completion
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.pages import PagePool, first_key
from mistral_7b.engine.request import Request
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.tokenizer import Tokenizer

PROMPTS = (
    "import os\n\n\ndef main(",
    "class Stack:\n    def push(self",
    "for i in range(",
    "import os\n\n\ndef read(",
)
CONFIG = EngineConfig(page_size=4, max_sequences=3, max_batch_tokens=12)


def check(ex: Any) -> str:
    _check_decode_first(ex)
    _check_chunks(ex)
    _check_copy_on_write(ex)
    for pages in (40, 16):
        _check_run(ex, pages)
    return _check_decoder(ex)


def _scheduler(ex: Any, pages: int = 40) -> Any:
    return ex.Scheduler(PagePool(1, 1, 2, pages, 4, dtype=torch.float32), None, CONFIG)


def _add(scheduler: Any, order: int, length: int, max_tokens: int = 8) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    ids = [100 * order + i for i in range(length)]
    completion = Completion(ids, params, max_tokens, 0, 0, None, ends=frozenset())
    request = Request(str(order), None, ids, params, [completion], first_key(), order=order)
    scheduler.add(request)
    return request


def _step(scheduler: Any) -> dict[int, int]:
    """One step as the engine does it, without a model: the tokens planned, by request."""
    plan = scheduler.plan()
    for s, n in plan:
        needed = -(-(s.computed + n) // 4)
        expect(
            s.stop >= needed,
            f"request {s.request.id} has {s.stop} pages of 4 for {s.computed + n} tokens",
            "call self._allocate, whose _find_pages takes a page for each 4 tokens",
        )
        scheduler.advance(s, n)
        if s.uncomputed == 0:
            s.completion.push(7, None)
            s.append_tokens([7])
            if s.completion.finished:
                scheduler.end(s)
    scheduler.check_pages()
    return {s.request.order: n for s, n in plan}


def _check_decode_first(ex: Any) -> None:
    scheduler = _scheduler(ex)
    _add(scheduler, 0, 5)
    equal(
        _step(scheduler),
        {0: 5},
        "the plan {request: tokens} for one prompt of 5 tokens",
        {(): "a waiting request is admitted: self._fit says whether, self._begin runs it"},
    )
    _add(scheduler, 1, 40)
    plan = _step(scheduler)
    equal(
        plan.get(0),
        1,
        "the tokens of a running sequence that decodes, beside a new prompt of 40",
        {None: "sequences that decode come first: each feeds its newest token in every step"},
    )
    expect(
        sum(plan.values()) <= 12,
        f"a step of {sum(plan.values())} tokens, more than max_batch_tokens = 12",
        "what decodes is subtracted from the budget before prompts are cut to what is left",
    )
    expect(
        plan.get(1, 0) > 0,
        "the prompt of 40 tokens is not begun beside the sequence that decodes",
        "prefill and decode share a step: that is continuous batching",
    )


def _check_chunks(ex: Any) -> None:
    scheduler = _scheduler(ex)
    request = _add(scheduler, 0, 30)
    s, scheduler.queues.waiting = request.sequences[0], 0
    for computed, budget, right, mistakes in (
        (0, 64, 30, {}),
        (0, 12, 12, {}),
        (0, 11, 8, {11: "a chunk ends where a page ends, unless the prompt ends first"}),
        (
            6,
            11,
            10,
            {
                11: "a chunk ends where a page ends: positions count, not the chunk's length",
                8: "the chunk begins at position 6: its end, not its length, is a multiple of the page",
            },
        ),
        (
            24,
            8,
            6,
            {
                8: "no more tokens than are left to compute",
                4: "the prompt ends first: its last page need not be full",
            },
        ),
        (
            2,
            1,
            0,
            {-2: "no chunk is negative", 1: "a chunk ends where a page ends; with a budget of 1 there is none"},
        ),
    ):
        s.computed = computed
        got = scheduler._chunk_size(s, budget, False)
        equal(
            got,
            right,
            f"_chunk_size with {computed} of 30 tokens computed, a budget of {budget}, pages of 4",
            mistakes,
        )
    s.computed = 0


def _check_copy_on_write(ex: Any) -> None:
    scheduler = _scheduler(ex, pages=4)
    pool, s = scheduler.pool, _add(scheduler, 0, 6).sequences[0]
    scheduler._begin(s, 0, [])
    expect(scheduler._find_pages(s, 6) is True, "_find_pages(6 tokens) with four free pages is not True")
    equal(s.stop, 2, "the pages of a sequence after _find_pages for 6 tokens, pages of 4")
    s.computed = 6
    for page in s.held:
        pool.share(page)
    before = s.held
    expect(scheduler._find_pages(s, 1), "_find_pages(1 token) fails, and two pages are free")
    expect(
        s.held[1] != before[1],
        "a sequence writes position 6 into a page that another sequence holds too",
        "a shared page that is written is copied first: pool.copy, then release the old one",
    )
    equal(
        s.held[0],
        before[0],
        "the first page, which is full and not written",
        {s.held[0]: "only pages from computed // page on are written; the others stay shared"},
    )
    equal(pool.holders[before[1]], 1, "the holders of the page that was copied", {2: "release the old page"})
    held = s.stop
    try:
        found = scheduler._find_pages(s, 30)
    except KeyError:
        wrong("_find_pages(30 tokens) takes more pages than the pool has", "compare with pool.available first")
    expect(found is False, "_find_pages(30 tokens) with one free page is not False")
    equal(
        s.stop,
        held,
        "the pages of the sequence after _find_pages returned False",
        {held + 1: "count what is missing before taking any page"},
    )
    pool.release(before)
    scheduler.end(s)


def _check_run(ex: Any, pages: int) -> None:
    scheduler = _scheduler(ex, pages)
    requests = [_add(scheduler, i, 5 + 6 * i, max_tokens=10) for i in range(5)]
    for _ in range(400):
        running = [s for s in scheduler.running if s.decoding]
        plan = _step(scheduler)
        expect(sum(plan.values()) <= 12, f"a step of {sum(plan.values())} tokens, more than max_batch_tokens = 12")
        stalled = [s.request.order for s in running if s.running and s.request.order not in plan]
        expect(
            not stalled,
            f"with {pages} pages, request {stalled and stalled[0]} could decode and has no token in a step",
            "every sequence that decodes takes part in every step, unless it is preempted",
        )
        if all(r.sequences[0].ended for r in requests):
            equal(scheduler.pool.held, 0, "the pages that are held when all requests have ended")
            return
        expect(
            bool(plan),
            f"with {pages} pages, a step has no token and {len(requests)} requests have not all ended",
            "a prompt whose chunk is 0 blocks the step, or no request is admitted",
        )
    expect(False, f"with {pages} pages, five requests have not ended after 400 steps")


def _check_decoder(ex: Any) -> str:
    own, int8 = importlib.import_module("ex07_model"), importlib.import_module("ex12_int8")
    model, tokenizer = int8.quantize_linears(own.open_demo()), Tokenizer.from_pretrained("demo")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    texts = ex.decode_all(model, tokenizer, PROMPTS, params)
    alone = [ex.decode_all(model, tokenizer, [prompt], params)[0] for prompt in PROMPTS]
    _same_texts(texts, alone)
    return "your model, quantized, four texts at a time:\n" + "\n".join(
        f"    {prompt!r} {text!r}" for prompt, text in zip(PROMPTS, texts, strict=True)
    )


def _same_texts(together: Sequence[str], alone: Sequence[str]) -> None:
    for prompt, got, right in zip(PROMPTS, together, alone, strict=True):
        equal(
            got,
            right,
            f"the text after {prompt!r}, computed together with three others (expected: as it is alone)",
        )
