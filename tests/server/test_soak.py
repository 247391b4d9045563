"""Well-behaved and misbehaving clients together for seconds; experiments/serving_soak.py runs for ten minutes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

from serving import serving

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from serving_soak import GREEDY, KEYS, soak

from mistral_7b.engine.config import EngineConfig
from mistral_7b.server.config import ServerConfig


def test_the_well_behaved_notice_nothing_of_the_others() -> None:
    config = ServerConfig(port=0, api_keys=(*KEYS, GREEDY), max_connections=64)
    with serving(config, EngineConfig(max_sequences=8, max_batch_tokens=48, page_size=4)) as it:
        server = SimpleNamespace(port=it.port, rss=1.0)
        tally, last = asyncio.run(soak(server, clients=20, seconds=4.0))  # type: ignore[arg-type]
        it.idle()
        assert tally.errors == []
        assert tally.answers >= 10
        assert tally.vanished >= 2
        assert set(tally.garbage) <= {400, 401, 404, 431}
        assert sum(tally.garbage.values()) >= 4
        assert last['requests_finished_total{reason="error"}'] == 0
        assert last["event_loop_lag_seconds_count"] > 10
        assert it.llm.engine.pool.held == 0
        metrics = it.ask("GET", "/metrics", headers={"x-api-key": KEYS[0]})
        held = [line for line in metrics[2].decode().splitlines() if "pages_held" in line]
        assert held[-1].endswith(" 0.0")


def test_pages_are_free_within_a_step_of_a_client_leaving() -> None:
    async def leave(port: int) -> None:
        from serving_clients import Client, post

        client = await Client.connect(port)
        body = {"prompt": "def", "max_tokens": 900, "stream": True, "ignore_eos": True}
        await client.ask(post("/v1/completions", body), leave_after=3)

    with serving() as it:
        engine, ended = it.llm.engine, []
        finish = engine._finish

        def noted(request, reason, **more):
            finish(request, reason, **more)
            ended.append((reason, engine.pool.held, engine.counts.steps))

        engine._finish = noted  # type: ignore[method-assign]
        told: list[int] = []
        abort = it.llm.abort
        it.llm.abort = lambda name: (told.append(engine.counts.steps), abort(name))  # type: ignore[func-returns-value]
        asyncio.run(leave(it.port))
        it.idle()
        ((reason, held, steps),) = ended
        assert (reason, held) == ("abort", 0)
        assert steps - told[0] <= 1
