"""AsyncLLM when it is closed or breaks, or an event loop ends: whoever waits hears of it, and nobody for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from automaton import check
from scenes import GREEDY, LONG, no_thread_is_left, open_llm, play, settled, tokens_of  # noqa: F401
from torch import Tensor

from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.mailbox import Mailbox
from mistral_7b.errors import EngineError


def test_closing_ends_whoever_runs_waits_or_comes() -> None:
    async def scene() -> None:
        llm = open_llm(max_sequences=1)
        streams = [asyncio.create_task(tokens_of(llm, [i], LONG)) for i in range(4)]
        while not llm.engine.scheduler.running:
            await asyncio.sleep(0.001)
        await llm.close()
        for stream in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(stream, EngineError)
        for again in (tokens_of(llm, [1]), llm.call(lambda: None)):
            with pytest.raises(EngineError):
                await again
        await llm.close()
        assert llm.engine.pool.held == 0
        check(llm.engine)

    play(scene())


def test_whatever_ends_the_thread_is_heard_of(caplog: pytest.LogCaptureFixture) -> None:
    """A panic of a library in Rust derives from BaseException alone."""

    class PanicException(BaseException):
        pass

    def step() -> None:
        raise PanicException("index out of bounds")

    async def scene() -> None:
        async with open_llm() as llm:
            assert await tokens_of(llm, [1]) == llm.engine.model.greedy([1], 12)
            llm.engine.step = step  # type: ignore[method-assign]
            for _ in range(2):
                with pytest.raises(EngineError) as caught:
                    await tokens_of(llm, [1])
                assert isinstance(caught.value.__cause__, PanicException)
            assert isinstance(llm.broken.__cause__, PanicException)  # type: ignore[union-attr]

    play(scene())
    (record,) = [r for r in caplog.records if r.name == "mistral_7b.engine"]
    assert record.levelname == "CRITICAL"
    assert record.exc_info


def test_an_event_loop_that_ends_takes_its_requests_along() -> None:
    llm = open_llm()
    left = []

    async def leave() -> None:
        left.append(llm.stream([1, 2], LONG, request_id="left"))
        await anext(left[0])
        left.append(asyncio.create_task(tokens_of(llm, [3], LONG)))
        await asyncio.sleep(0.01)

    async def after() -> None:
        assert await settled(llm) == 0
        assert await tokens_of(llm, [5]) == llm.engine.model.greedy([5], 12)
        await llm.close()

    play(leave())
    play(after())


def test_a_loop_that_is_closed_without_a_word_hurts_nobody_else() -> None:
    llm = open_llm()
    loop = asyncio.new_event_loop()
    generator = llm.stream([1, 2], LONG)
    loop.run_until_complete(anext(generator))
    loop.close()

    async def after() -> None:
        assert await tokens_of(llm, [5]) == llm.engine.model.greedy([5], 12)
        await llm.close()

    play(after())
    del generator
    gc.collect()


def test_a_loop_that_closes_while_it_is_told_hurts_nobody_else() -> None:
    class Closing:
        def is_closed(self) -> bool:
            return False

        def call_soon_threadsafe(self, *_: object) -> None:
            raise RuntimeError("Event loop is closed")

    async def scene() -> None:
        async with open_llm() as llm:
            mailbox = Mailbox()
            mailbox.loop = Closing()  # type: ignore[assignment]
            llm._updated[mailbox] = None
            assert await tokens_of(llm, [5]) == llm.engine.model.greedy([5], 12)

    play(scene())


def test_a_step_that_fails_is_raised_where_it_is_waited_for() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            hidden = llm.engine.model.hidden

            def failing(tokens: Tensor, batch: Any) -> Tensor:
                if 9 in tokens.tolist():
                    raise RuntimeError("the model broke")
                return hidden(tokens, batch)

            llm.engine.model.hidden = failing
            with pytest.raises(EngineError) as caught:
                await tokens_of(llm, [9], GREEDY)
            assert isinstance(caught.value.__cause__, RuntimeError)
            llm.engine.model.hidden = hidden
            assert await tokens_of(llm, [5]) == llm.engine.model.greedy([5], 12)
            assert await settled(llm) == 0

    play(scene())


def test_a_bug_in_the_engine_ends_every_stream_and_hangs_none() -> None:
    async def scene() -> None:
        llm = open_llm(max_sequences=1)
        streams = [asyncio.create_task(tokens_of(llm, [i], LONG)) for i in range(3)]
        while not llm.engine.scheduler.running:
            await asyncio.sleep(0.001)

        def plan() -> None:
            raise ZeroDivisionError("a bug")

        llm.engine.scheduler.plan = plan  # type: ignore
        for error in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(error, EngineError)
            assert str(error.__cause__) == "a bug"
        with pytest.raises(EngineError):
            await tokens_of(llm, [1])
        with pytest.raises(EngineError):
            await llm.call(lambda: None)
        await llm.close()
        assert llm.engine.pool.held == 0

    play(scene())


def test_a_command_that_fails_is_raised_by_its_caller_alone() -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            with pytest.raises(ZeroDivisionError):
                await llm.call(lambda: 1 // 0)
            assert await llm.call(lambda: threading.current_thread().name) == "engine"
            assert await tokens_of(llm, [5]) == llm.engine.model.greedy([5], 12)

    play(scene())


def test_nobody_is_lost_who_comes_when_it_has_just_closed() -> None:
    """The thread would end between the look whether it runs and the request: but for the lock."""

    async def scene(ask: Callable[[AsyncLLM], Any]) -> None:
        llm = open_llm()
        check_open, closing = llm._check_open, threading.Thread(target=lambda: asyncio.run(llm.close()))

        def slowly() -> None:
            check_open()
            closing.start()
            threading.Event().wait(0.05)

        llm._check_open = slowly  # type: ignore[method-assign]
        (ended,) = await asyncio.gather(ask(llm), return_exceptions=True)
        assert isinstance(ended, (list, EngineError)), ended
        await asyncio.to_thread(closing.join)

    play(scene(lambda llm: tokens_of(llm, [1])))
    play(scene(lambda llm: llm.call(list)))


def test_nobody_is_lost_who_comes_while_it_closes() -> None:
    """From other threads, at whatever moment: each stream ends, well or with the error that says why."""
    for delay in range(8):
        llm = open_llm()
        ended: list[object] = []

        def come(llm: AsyncLLM = llm, ended: list[object] = ended) -> None:
            async def scene() -> None:
                for i in range(12):
                    ended.append((await asyncio.gather(tokens_of(llm, [i % 11]), return_exceptions=True))[0])

            play(scene())

        threads = [threading.Thread(target=come) for _ in range(3)]
        for thread in threads:
            thread.start()
        threading.Event().wait(delay * 0.003)
        play(llm.close())
        for thread in threads:
            thread.join(20)
        assert len(ended) == 36
        assert all(isinstance(e, (list, EngineError)) for e in ended), ended
