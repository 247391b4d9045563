"""Who reads an answer now and then gets what has come since as one piece, and hears of the end at once."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scenes import GREEDY, LONG, no_thread_is_left, open_llm, play  # noqa: F401
from waiting import soon

from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.completion import TextPiece
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.mailbox import Mailbox
from mistral_7b.engine.threads import release_openmp_threads
from mistral_7b.sampling.logprobs import Logprob
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.tool_calls import ToolCallDelta


async def read(llm: AsyncLLM, params: SamplingParams, rest: float) -> list[TextPiece]:
    request = llm.inputs.text([1, 2, 3], params, RequestOptions())
    return [piece async for piece in llm.follow(request, lambda: rest)]


@pytest.mark.parametrize("rest", [0.0, 0.002, 60.0])
def test_whatever_the_rest_all_comes_and_the_end_at_once(rest: float) -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            pieces = await read(llm, SamplingParams(max_tokens=300, temperature=0, ignore_eos=True), rest)
            assert [t for p in pieces for t in p.token_ids] == llm.engine.model.greedy([1, 2, 3], 300)
            assert [p.finish_reason for p in pieces][-1] == "length"
            assert all(p.finish_reason is None for p in pieces[:-1])
            if rest == 60:
                assert len(pieces) == 2  # what was there when it first looked, and the rest

    soon(15, lambda: play(scene()), clock=time.perf_counter)


def test_no_piece_comes_before_the_rest_is_over() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            request = llm.inputs.text([1, 2, 3], LONG, RequestOptions())
            times = []
            async for _ in llm.follow(request, lambda: 0.05):
                times.append(asyncio.get_running_loop().time())
                if len(times) == 4:
                    break
            assert times[3] - times[0] > 0.09  # the first rest is shorter: all end together, on a grid

    play(scene())


def test_what_came_in_a_rest_is_told_after_it_though_nothing_follows() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.wait(0.02))
        await asyncio.sleep(0)
        assert mailbox.throttled
        mailbox.pieces.append(TextPiece("a"))  # and is not announced, as by the engine's thread
        await waiting
        assert not mailbox.throttled

    play(scene())


def test_pieces_of_several_completions_keep_apart() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            params = SamplingParams(max_tokens=40, temperature=1, seed=5, n=3, ignore_eos=True)
            slow, fast = await read(llm, params, 60.0), await read(llm, params, 0.0)
            assert len(slow) < len(fast)
            for i in range(3):
                whole = [t for p in fast if p.index == i for t in p.token_ids]
                assert [t for p in slow if p.index == i for t in p.token_ids] == whole
                assert len(whole) == 40

    play(scene())


def test_many_rest_beside_each_other_and_one_who_does_not() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            several = await asyncio.gather(*(read(llm, GREEDY, rest) for rest in [0, 0.01, 0.5, 60] * 5))
            (expected,) = {tuple(t for p in pieces for t in p.token_ids) for pieces in several}
            assert list(expected) == llm.engine.model.greedy([1, 2, 3], 12)

    play(scene())


def test_joined_pieces_are_their_parts_in_order() -> None:
    one, two = {5: Logprob(-1.0, 1, "a")}, {6: Logprob(-2.0, 2, "b")}
    call, more = ToolCallDelta(0, "id", "f"), ToolCallDelta(0, arguments="{}")
    first = TextPiece("a", 2, (5,), None, None, (one,), (call,))
    last = TextPiece("b", 2, (6,), "stop", "end", (two,), (more,))
    assert TextPiece.joined([first]) is first
    assert TextPiece.joined([first, last]) == TextPiece("ab", 2, (5, 6), "stop", "end", (one, two), (call, more))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_threads_of_loops_are_let_go_of() -> None:
    """And come back: see engine/threads.py for why."""
    counts = []

    def compute() -> None:
        torch.set_num_threads(3)
        for _ in range(2):
            torch.ones(1 << 20).sqrt()
            counts.append(len(os.listdir("/proc/self/task")))
            release_openmp_threads()
            time.sleep(0.1)
            counts.append(len(os.listdir("/proc/self/task")))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    if "libgomp.so.1" not in Path("/proc/self/maps").read_text():
        pytest.skip("another OpenMP than GNU's")
    assert [a - b for a, b in pairwise(counts)] == [2, -2, 2]
