"""AsyncLLM over an automaton, for the tests: opened, played, and nothing left of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any
from unittest import mock

import pytest
from automaton import Automaton, check, engine_of

from mistral_7b.engine import async_llm
from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.inputs import InputProcessor
from mistral_7b.sampling.params import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)

_opened: list[AsyncLLM] = []


def open_llm(**config: Any) -> AsyncLLM:
    """An AsyncLLM whose model is an automaton; the test must close it."""
    settings = {"max_sequences": 4, "max_batch_tokens": 16, "page_size": 4, **config}
    engine = engine_of(Automaton(8), 100, **settings)
    engine._fail_step = Engine._fail_step.__get__(engine)  # type: ignore[method-assign]
    reader = InputProcessor(engine, None, "there is none here")
    with mock.patch.object(async_llm, "open_engine", return_value=reader):
        _opened.append(AsyncLLM())
    return _opened[-1]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """After each test of a file that imports this."""
    yield
    left = [llm for llm in _opened if llm._thread.is_alive()]
    for llm in left:
        llm._commands.put(None)
    _opened.clear()
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
