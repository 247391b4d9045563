"""A rush of requests starts over several iterations of the event loop."""

from __future__ import annotations

import asyncio

from mistral_7b.server.http.pace import Pace


async def _starts(n: int, callers: int, cancelled: int = 0) -> list[tuple[int, int]]:
    """Return (iteration, caller) of every start."""
    pace, starts, iteration = Pace(n), [], 0

    async def caller(i: int) -> None:
        await pace.turn()
        starts.append((iteration, i))

    tasks = [asyncio.create_task(caller(i)) for i in range(callers)]
    await asyncio.sleep(0)
    for task in tasks[callers - cancelled :]:
        task.cancel()
    while not all(task.done() for task in tasks):
        iteration += 1
        await asyncio.sleep(0)
    return starts


def test_at_most_n_start_in_an_iteration_in_their_order() -> None:
    starts = asyncio.run(_starts(4, 18))
    assert [i for _, i in starts] == list(range(18))
    each = [sum(at == k for at, _ in starts) for k in range(max(starts)[0] + 1)]
    assert max(each) == 4


def test_a_cancelled_caller_takes_no_turn() -> None:
    starts = asyncio.run(_starts(2, 8, cancelled=3))
    assert [i for _, i in starts] == list(range(5))


def test_a_caller_after_a_pause_starts_at_once() -> None:
    async def main() -> None:
        pace = Pace(1)
        for _ in range(3):
            await asyncio.wait_for(pace.turn(), 1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not pace._waiting

    asyncio.run(main())
