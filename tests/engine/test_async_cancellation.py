"""AsyncLLM when streams are left, cancelled, refused or slow: pages come back, and nobody loses anything."""

from __future__ import annotations

import asyncio
import threading
from itertools import pairwise

import pytest
from automaton import Oracle
from refusals import refused
from scenes import GREEDY, LONG, no_thread_is_left, open_llm, play, settled, tokens_of  # noqa: F401

from mistral_7b.engine import async_llm
from mistral_7b.engine.completion import Completion
from mistral_7b.errors import EngineError, GenerationError, QueueFullError
from mistral_7b.sampling.params import SamplingParams


def test_fifty_streams_get_what_each_gets_alone() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            prompts = [[i % 11, i % 7, i % 5] for i in range(50)]
            got = await asyncio.gather(*(tokens_of(llm, p) for p in prompts))
            assert got == [llm.engine.model.greedy(p, 12) for p in prompts]
            assert await settled(llm) == 0

    play(scene())


@pytest.mark.parametrize("how", ["abort", "aclose", "cancel", "break"])
@pytest.mark.parametrize("face", ["stream", "generate"])
def test_who_is_left_gives_its_pages_back(how: str, face: str) -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            other = asyncio.create_task(tokens_of(llm, [7, 8, 9], GREEDY))
            started = asyncio.Event()

            async def read() -> None:
                async for _ in getattr(llm, face)([1, 2, 3], LONG, request_id="left"):
                    started.set()
                    if how == "break":
                        break

            if how == "aclose":
                generator = getattr(llm, face)([1, 2, 3], LONG, request_id="left")
                await anext(generator)
                await generator.aclose()
            else:
                task = asyncio.create_task(read())
                await started.wait()
                if how == "cancel":
                    task.cancel()
                if how == "abort":
                    llm.abort("left")
                    llm.abort("left")
                    llm.abort("nobody")
                await asyncio.wait([task])
            if how == "break":  # it is for the event loop to close what was left lying
                await asyncio.sleep(0.01)
            left = await llm.call(lambda: "left" in llm.engine.requests)
            assert not left, "it had not been given up when the next command came"
            assert await other == llm.engine.model.greedy([7, 8, 9], 12)
            assert await settled(llm) == 0
            assert llm.engine.counts.finished == {"abort": 1, "length": 1}

    play(scene())


def test_a_task_may_be_cancelled_at_any_moment() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            tasks = []
            for i in range(60):
                tasks.append(asyncio.create_task(tokens_of(llm, [i % 11, 3], LONG if i % 2 else GREEDY)))
                for _ in range(i % 4):
                    await asyncio.sleep(0.0005)
                if i % 2:
                    tasks[i - i % 7 if (i - i % 7) % 2 else i].cancel()
            for i, task in enumerate(tasks):
                if i % 2:
                    task.cancel()
            got = await asyncio.gather(*tasks, return_exceptions=True)
            for i, tokens in enumerate(got):
                if i % 2 == 0:
                    assert tokens == llm.engine.model.greedy([i % 11, 3], 12)
            assert await settled(llm) == 0
            assert llm.engine.idle

    play(scene())


def test_who_gives_up_a_name_that_another_has_does_not_end_the_other() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            first = llm.stream([1, 2, 3], LONG, request_id="same")
            await anext(first)
            with refused(EngineError, field="request_id"):
                await tokens_of(llm, [4], GREEDY, request_id="same")
            release = threading.Event()
            holding = asyncio.create_task(llm.call(release.wait))  # the engine's thread is busy meanwhile
            request = llm.inputs.text([4], GREEDY, async_llm.RequestOptions("same"))
            second = asyncio.create_task(anext(llm.follow(request)))
            await asyncio.sleep(0.02)
            second.cancel()
            await asyncio.wait([second])
            release.set()
            await holding
            await llm.call(lambda: None)
            assert "same" in llm.engine.requests
            await first.aclose()
            assert await settled(llm) == 0

    play(scene())


def test_two_event_loops_share_an_engine() -> None:
    llm = open_llm()
    got: dict[int, list[list[int]]] = {}

    def one(i: int) -> None:
        async def scene() -> None:
            got[i] = await asyncio.gather(*(tokens_of(llm, [i, j]) for j in range(8)))

        play(scene())

    threads = [threading.Thread(target=one, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == {i: [llm.engine.model.greedy([i, j], 12) for j in range(8)] for i in range(3)}
    play(llm.close())


def test_a_slow_reader_holds_up_nobody_and_loses_nothing() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            slow = llm.stream([1, 2, 3], GREEDY)
            got = list((await anext(slow)).token_ids)
            for i in range(5):
                assert await tokens_of(llm, [i, 4]) == llm.engine.model.greedy([i, 4], 12)
            assert await settled(llm) == 0
            got += [t async for piece in slow for t in piece.token_ids]
            assert got == llm.engine.model.greedy([1, 2, 3], 12)

    play(scene())


def test_outputs_grow_by_what_has_come_and_the_last_is_finished() -> None:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, n=2, logprobs=1)

    async def scene() -> None:
        async with open_llm() as llm:
            outputs = [o async for o in llm.generate([1, 2, 3], params, speculation=Oracle(llm.engine.model))]
            wanted = llm.engine.model.greedy([1, 2, 3], 12)
            assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
            for before, after in pairwise(outputs):
                for a, b in zip(before.outputs, after.outputs, strict=True):
                    assert b.token_ids[: len(a.token_ids)] == a.token_ids
            for output in outputs[-1].outputs:
                assert output.token_ids == wanted
                assert [next(iter(entry)) for entry in output.logprobs or []] == wanted
                assert output.finish_reason == "length"

    play(scene())


def test_outputs_are_made_of_pieces_never_of_what_the_thread_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A completion's tokens and log-probabilities are appended one after the other: between them it is torn."""

    def torn(self: Completion) -> None:
        raise AssertionError("a completion is read by another thread than the one that writes it")

    async def scene() -> None:
        async with open_llm() as llm:
            monkeypatch.setattr(Completion, "output", torn)
            outputs = [o async for o in llm.generate([1, 2, 3], GREEDY)]
            assert outputs[-1].outputs[0].token_ids == llm.engine.model.greedy([1, 2, 3], 12)

    play(scene())


def test_the_queue_refuses_at_once_and_forgets_nobody() -> None:
    async def scene() -> None:
        async with open_llm(max_sequences=1, max_waiting=3) as llm:
            running = asyncio.create_task(tokens_of(llm, [1, 2], LONG, request_id="long"))
            while not llm.engine.scheduler.running:
                await asyncio.sleep(0.001)
            tasks = [asyncio.create_task(tokens_of(llm, [i])) for i in range(9)]
            refused = 0
            while refused < 6:
                await asyncio.sleep(0.001)
                refused = sum(task.done() for task in tasks)
            llm.abort("long")
            await running
            got = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(r, QueueFullError) for r in got) == 6
            assert sum(isinstance(r, list) and len(r) == 12 for r in got) == 3
            assert len(await tokens_of(llm, [4])) == 12
            assert not llm._submitted

    play(scene())


def test_errors_come_before_the_first_piece() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            for prompt, params, kind in (([], GREEDY, GenerationError), ([1], SamplingParams(n=5), EngineError)):
                with pytest.raises(kind):
                    await anext(llm.stream(prompt, params))
            with pytest.raises(TypeError):
                await anext(llm.stream([1], GREEDY, colour="red"))
            assert llm.engine.idle

    play(scene())
