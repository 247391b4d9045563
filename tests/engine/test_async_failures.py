"""AsyncLLM when streams are left, cancelled, slow or broken: pages come back, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from itertools import pairwise
from typing import Any

import pytest
from automaton import Automaton, Oracle, check, engine_of
from torch import Tensor

from mistral_7b.engine import async_llm
from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.reading import Reader
from mistral_7b.errors import EngineError, GenerationError, QueueFullError
from mistral_7b.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)


@pytest.fixture
def open_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AsyncLLM]]:
    """`open_llm(max_sequences=...)`: an AsyncLLM over an automaton; after the test no thread of it may be left."""
    made: list[AsyncLLM] = []

    def make(**config: Any) -> AsyncLLM:
        engine = engine_of(
            Automaton(8), 100, **{"max_sequences": 4, "max_batch_tokens": 16, "page_size": 4, **config}
        )
        engine._fail = Engine._fail.__get__(engine)  # type: ignore[method-assign]
        monkeypatch.setattr(async_llm, "open_engine", lambda *a, **k: Reader(engine, None, "there is none here"))
        made.append(AsyncLLM())
        return made[-1]

    yield make
    left = [llm._thread for llm in made if llm._thread.is_alive()]
    for llm in made:
        llm._commands.put(None)
    assert not left, "the engine's thread goes on"


def play(scene: Coroutine[Any, Any, None]) -> None:
    """Run it; whoever waits for ever is found out."""

    async def timed() -> None:
        await asyncio.wait_for(scene, 20)

    asyncio.run(timed())


async def tokens_of(llm: AsyncLLM, prompt: list[int], params: SamplingParams = GREEDY, **asked: Any) -> list[int]:
    return [t async for piece in llm.stream(prompt, params, **asked) for t in piece.token_ids]


async def settled(llm: AsyncLLM) -> int:
    """Pages that are held after what was asked until now has been done, and one step more."""
    await llm.call(lambda: None)
    await llm.call(lambda: check(llm.engine))
    return await llm.call(lambda: llm.engine.pool.held)


def test_fifty_streams_get_what_each_gets_alone(open_llm: Callable[..., AsyncLLM]) -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            prompts = [[i % 11, i % 7, i % 5] for i in range(50)]
            got = await asyncio.gather(*(tokens_of(llm, p) for p in prompts))
            assert got == [llm.engine.model.greedy(p, 12) for p in prompts]
            assert await settled(llm) == 0

    play(scene())


@pytest.mark.parametrize("how", ["abort", "aclose", "cancel", "break"])
@pytest.mark.parametrize("face", ["stream", "generate"])
def test_who_is_left_gives_its_pages_back(open_llm: Callable[..., AsyncLLM], how: str, face: str) -> None:
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


def test_a_task_may_be_cancelled_at_any_moment(open_llm: Callable[..., AsyncLLM]) -> None:
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


def test_who_gives_up_a_name_that_another_has_does_not_end_the_other(open_llm: Callable[..., AsyncLLM]) -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            first = llm.stream([1, 2, 3], LONG, request_id="same")
            await anext(first)
            with pytest.raises(EngineError, match="'same' is running"):
                await tokens_of(llm, [4], GREEDY, request_id="same")
            release = threading.Event()
            holding = asyncio.create_task(llm.call(release.wait))  # the engine's thread is busy meanwhile
            request = llm.reader.text([4], GREEDY, async_llm.Asked("same"))
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


def test_closing_ends_whoever_runs_waits_or_comes(open_llm: Callable[..., AsyncLLM]) -> None:
    async def scene() -> None:
        llm = open_llm(max_sequences=1)
        streams = [asyncio.create_task(tokens_of(llm, [i], LONG)) for i in range(4)]
        while not llm.engine.scheduler.running:
            await asyncio.sleep(0.001)
        await llm.close()
        for stream in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(stream, EngineError)
            assert "closed" in str(stream)
        for again in (tokens_of(llm, [1]), llm.call(lambda: None)):
            with pytest.raises(EngineError, match="closed"):
                await again
        await llm.close()
        assert llm.engine.pool.held == 0
        check(llm.engine)

    play(scene())


def test_two_event_loops_share_an_engine(open_llm: Callable[..., AsyncLLM]) -> None:
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


def test_an_event_loop_that_ends_takes_its_requests_along(open_llm: Callable[..., AsyncLLM]) -> None:
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


def test_a_loop_that_is_closed_without_a_word_hurts_nobody_else(open_llm: Callable[..., AsyncLLM]) -> None:
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


def test_a_loop_that_closes_while_it_is_told_hurts_nobody_else(open_llm: Callable[..., AsyncLLM]) -> None:
    class Closing:
        def is_closed(self) -> bool:
            return False

        def call_soon_threadsafe(self, *_: object) -> None:
            raise RuntimeError("Event loop is closed")

    async def scene() -> None:
        async with open_llm() as llm:
            mailbox = async_llm._Mailbox()
            mailbox.loop = Closing()  # type: ignore[assignment]
            llm._touched[mailbox] = None
            assert await tokens_of(llm, [5]) == llm.engine.model.greedy([5], 12)

    play(scene())


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(open_llm: Callable[..., AsyncLLM]) -> None:
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


def test_outputs_grow_by_what_has_come_and_the_last_is_finished(open_llm: Callable[..., AsyncLLM]) -> None:
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


def test_outputs_are_made_of_pieces_and_never_of_what_the_thread_is_writing(
    open_llm: Callable[..., AsyncLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion's tokens and log-probabilities are appended one after the other: between them it is torn."""
    from mistral_7b.completion import Completion

    def torn(self: Completion) -> None:
        raise AssertionError("a completion is read by another thread than the one that writes it")

    async def scene() -> None:
        async with open_llm() as llm:
            monkeypatch.setattr(Completion, "output", torn)
            outputs = [o async for o in llm.generate([1, 2, 3], GREEDY)]
            assert outputs[-1].outputs[0].token_ids == llm.engine.model.greedy([1, 2, 3], 12)

    play(scene())


def test_the_queue_refuses_at_once_and_forgets_nobody(open_llm: Callable[..., AsyncLLM]) -> None:
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
            assert llm._coming == 0

    play(scene())


def test_errors_come_before_the_first_piece(open_llm: Callable[..., AsyncLLM]) -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            for prompt, params, kind in (([], GREEDY, GenerationError), ([1], SamplingParams(n=5), EngineError)):
                with pytest.raises(kind):
                    await anext(llm.stream(prompt, params))
            with pytest.raises(TypeError):
                await anext(llm.stream([1], GREEDY, colour="red"))
            assert llm.engine.idle

    play(scene())


# ------------------------------------------------------------------ the engine itself breaks


def test_a_step_that_fails_is_raised_where_it_is_waited_for(open_llm: Callable[..., AsyncLLM]) -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            hidden = llm.engine.model.hidden

            def failing(tokens: Tensor, batch: Any) -> Tensor:
                if 9 in tokens.tolist():
                    raise RuntimeError("the model broke")
                return hidden(tokens, batch)

            llm.engine.model.hidden = failing
            with pytest.raises(EngineError, match="the model broke") as caught:
                await tokens_of(llm, [9], GREEDY)
            assert isinstance(caught.value.__cause__, RuntimeError)
            llm.engine.model.hidden = hidden
            assert await tokens_of(llm, [5]) == llm.engine.model.greedy([5], 12)
            assert await settled(llm) == 0

    play(scene())


def test_a_bug_in_the_engine_ends_every_stream_and_hangs_none(open_llm: Callable[..., AsyncLLM]) -> None:
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
            assert "a bug" in str(error)
        with pytest.raises(EngineError):
            await tokens_of(llm, [1])
        with pytest.raises(EngineError):
            await llm.call(lambda: None)
        await llm.close()
        assert llm.engine.pool.held == 0

    play(scene())


def test_a_command_that_fails_is_raised_by_its_caller_alone(open_llm: Callable[..., AsyncLLM]) -> None:
    async def scene() -> None:
        async with open_llm() as llm:
            with pytest.raises(ZeroDivisionError):
                await llm.call(lambda: 1 // 0)
            assert await llm.call(lambda: threading.current_thread().name) == "engine"
            assert await tokens_of(llm, [5]) == llm.engine.model.greedy([5], 12)

    play(scene())


def test_nobody_is_lost_who_comes_when_it_has_just_closed(open_llm: Callable[..., AsyncLLM]) -> None:
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


def test_nobody_is_lost_who_comes_while_it_closes(open_llm: Callable[..., AsyncLLM]) -> None:
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
