"""A replica: one engine, as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from ray import serve

from ...engine.async_llm import AsyncLLM
from ...engine.followers import LostRank
from ...engine.request import Request
from ...engine.resume import Job, resume
from ...errors import EngineError, Mistral7BError
from ..operations.metrics import engine_metrics
from .wire import NAME, News, ReplicaLostError, Route, without_data

logger = logging.getLogger("mistral_7b.server")

PACE = 0.025  # seconds between two messages to a server with many requests
BUSY = 32  # requests at which it is reached
IDLE = 5.0  # seconds without a request after which a server is listened to no longer, so that a replica can drain
KNOWN_PAGES = 1 << 15  # cached pages, the newest, that are told to the router
LAST_WORDS = 1.0  # seconds between a failure of the engine and the end of the process


class Line:
    """The news for one server, until it takes them."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.event = asyncio.Event()
        self.jobs = 0

    def put(self, news: News) -> None:
        self.news.append(news)
        self.event.set()


class Replica:
    """Runs jobs on its engine. `open_llm` loads the model."""

    def __init__(self, open_llm: Callable[[], AsyncLLM]) -> None:
        self.llm = open_llm()
        self.llm.inputs.warm_up()
        self.id = serve.get_replica_context().replica_id.unique_id
        self.lines: dict[str, Line] = {}

    async def describe(self) -> bytes:
        """What a server needs to read requests: model and pages, without the data of tensors."""
        engine = self.llm.engine
        return without_data((engine.model, engine.pool, engine.config))

    async def generate(self, server: str, job: Job, route: Route) -> AsyncGenerator[str, None]:
        """Run a job: yield this replica's name, and return at the job's end. Cancelling it aborts the job."""
        line = self.lines.setdefault(server, Line())
        line.jobs += 1
        last = News(job.id, ended=True)
        gone = threading.Event()
        try:
            yield self.id
            last = await self._run(job, line, gone)
        except Mistral7BError as e:
            if isinstance(e.__cause__, LostRank):  # not the request's error: it continues on another replica
                os._exit(1)
            last = News(job.id, ended=True, error=e)
        except Exception as e:
            logger.exception("request %s failed", job.id)
            last = News(job.id, ended=True, error=EngineError(f"the request failed: {e!r}"))
        finally:
            gone.set()
            line.jobs -= 1
            line.put(last)
            if self.llm.broken is not None:  # Ray starts another
                asyncio.get_running_loop().call_later(LAST_WORDS, os._exit, 1)

    async def _run(self, job: Job, line: Line, gone: threading.Event) -> News:
        request, ends = await asyncio.to_thread(resume, self.llm.inputs, job, gone)
        if ends:
            line.put(News(job.id, ends))
        known = False
        if request.pooling or request.pending:
            async with aclosing(self.llm.follow(request, lambda: min(line.jobs / BUSY, 1) * PACE)) as pieces:
                async for piece in pieces:
                    line.put(News(job.id, [piece], *(() if known else _facts(request))))
                    known = True
        return News(job.id, (), *_facts(request), ended=True)

    async def listen(self, server: str, replica: str) -> AsyncGenerator[list[News], None]:
        """Yield the news of a server's jobs until there has been none for IDLE seconds."""
        if replica != self.id:
            raise ReplicaLostError(f"replica {replica} has ended")
        line = self.lines.setdefault(server, Line())
        while True:
            try:
                await asyncio.wait_for(line.event.wait(), IDLE)
            except TimeoutError:
                if line.jobs or line.news:
                    continue
                self.lines.pop(server, None)
                return
            line.event.clear()
            taken, line.news = line.news, []
            yield taken

    # ------------------------------------------------------------------ what Ray Serve asks

    async def check_health(self) -> None:
        """Raises if the engine has failed."""
        if self.llm.broken is not None:
            raise self.llm.broken

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The engine's own queue: requests that run or wait."""
        return {"requests": float(len(self.llm.engine.requests))}

    async def record_routing_stats(self) -> dict[str, Any]:
        """Load, cached pages and metrics, for routers and for /metrics."""
        pages = await self.llm.call(lambda: list(self.llm.engine.pool.page_of)[-KNOWN_PAGES:])
        return {
            "requests": len(self.llm.engine.requests), "pages": b"".join(key[:NAME] for key in pages),
            "metrics": list(engine_metrics(self.llm)),
        }  # fmt: skip


def _facts(request: Request) -> tuple[dict[str, Any], float | None]:
    """What a request has learned besides its pieces, and how long it has waited."""
    names = ("cached", "prompt_logprobs", "pooled", "pooled_tokens")
    return {name: getattr(request, name) for name in names}, request.metrics.queue_time
