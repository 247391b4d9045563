"""RemoteLLM: an AsyncLLM whose requests run on replicas, and continue on another one when theirs dies.

    follow    a request's pieces, as AsyncLLM's
    _run      a task for each request: call `generate`, wait for the end; when the replica is lost, again with the
              tokens that have come so far (engine/resume.py)
    _read     a task for each replica: `listen` to it, and hand its news to the requests

The server holds the stream: a replica that dies takes nothing with it but the tokens that it has not sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from ...engine.async_llm import AsyncLLM
from ...engine.engine import Engine
from ...engine.inputs import InputProcessor
from ...engine.mailbox import Mailbox
from ...engine.request import Request
from ...engine.resume import job_of
from ...errors import EngineError, Mistral7BError
from ...model import Mistral7B
from ...text.tokenizer import Tokenizer
from .wire import News, on_meta, route_of

logger = logging.getLogger("mistral_7b.server")

RETRY = 0.2  # seconds before the third attempt, and as many more before each further one
ATTEMPTS = 4  # replicas that a request may lose: one that crashes engines shall not end them all


class RemoteInputs(InputProcessor):
    """Makes requests for other engines. Their grammars are compiled where they run."""

    def _start_grammars(self, request: Request, *_: object) -> None:
        pass


class _Run:
    """A request on its way: its reader, its task, and the replica that runs it."""

    def __init__(self, request: Request, mailbox: Mailbox) -> None:
        self.request, self.mailbox = request, mailbox
        self.replica = ""
        self.answered = False  # by the replica: to its end
        self.lost = asyncio.Event()  # the replica is, or the request has ended
        self.task: asyncio.Task[None] | None = None


class RemoteLLM(AsyncLLM):
    """The engines behind a handle of Ray Serve.

    `description` is that of a replica (`Replica.describe`); `open_tokenizer` opens the tokenizer of its model.
    """

    def __init__(
        self, handle: Any, description: bytes, open_tokenizer: Callable[[Mistral7B], Tokenizer | None],
        adapters: dict[str, str],
    ) -> None:  # fmt: skip
        model, pool, config = on_meta(description)
        self.engine = Engine(model, pool, dataclasses.replace(config, prefix_cache=None))
        for name, path in adapters.items():
            self.engine.adapters.load(name, path)
        self.inputs = RemoteInputs(self.engine, open_tokenizer(model))
        self._id = uuid.uuid4().hex
        # Not by reference: messages then go from process to process, and not through Ray's object store.
        self._handle = handle.options(stream=True, _by_reference=False)
        self._runs: dict[str, _Run] = {}  # by request
        self._jobs: dict[str, _Run] = {}  # by job: a request has one for each replica that it was on
        self._lines: dict[str, asyncio.Task[None]] = {}  # by replica

    @property
    def broken(self) -> EngineError | None:
        """None: a replica whose engine fails is replaced."""
        return None

    def check_queue(self, client: str = "") -> None:
        """Nothing: replicas have queues of their own."""

    async def call(self, function: Callable[[], Any]) -> Any:
        """Call `function` here, where no step runs."""
        return function()

    async def close(self) -> None:
        """End what is still running."""
        tasks = [*self._lines.values(), *(run.task for run in self._runs.values() if run.task)]
        for task in tasks:
            task.cancel()

    # ------------------------------------------------------------------ requests

    def _submit(self, request: Request, mailbox: Mailbox) -> None:
        run = self._runs[request.id] = _Run(request, mailbox)
        run.task = asyncio.create_task(self._run(run))

    def _abandon(self, request: Request) -> None:
        self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """Abort a request; nothing happens if it has ended."""
        run = self._runs.get(request_id)
        if run is not None and not run.request.finished and run.task is not None:
            run.task.cancel()
            _end(run, None)

    async def _run(self, run: _Run) -> None:
        """Run a request on one replica after another until it has ended."""
        request, args = run.request, self.engine.model.args
        route = route_of(request, args.sliding_window, self.engine.pool.page)
        why: Exception | None = None
        try:
            for attempt in range(ATTEMPTS):
                job = job_of(request, f"{request.id}.{attempt}")
                self._jobs[job.id] = run
                call = self._handle.generate.remote(self._id, job, route)
                try:
                    run.replica = await anext(aiter(call))
                    self._listen(run.replica)
                    await run.lost.wait()
                    why = None
                except (Mistral7BError, asyncio.CancelledError):
                    raise
                except Exception as e:  # of many kinds, by how the replica was lost
                    why = e
                finally:
                    del self._jobs[job.id]
                    if not run.answered:
                        call.cancel()
                if request.finished:
                    return
                run.replica = ""
                run.lost.clear()
                await asyncio.sleep(attempt * RETRY)
                tokens = sum(len(c.token_ids) for c in request.completions)
                logger.warning("request %s lost its replica after %d tokens (%r)", request.id, tokens, why)
            _end(run, EngineError(f"{ATTEMPTS} replicas failed with this request"))
        except Mistral7BError as e:
            _end(run, e)
        finally:
            self._runs.pop(request.id, None)

    def _listen(self, replica: str) -> None:
        if replica not in self._lines:
            self._lines[replica] = asyncio.create_task(self._read(replica))

    async def _read(self, replica: str) -> None:
        """Hand out a replica's news until it is lost, or has no request of this server."""
        try:
            while any(run.replica == replica for run in self._jobs.values()):
                async for several in self._handle.listen.remote(self._id, replica=replica):
                    for news in several:
                        if (run := self._jobs.get(news.id)) is not None:
                            _take(run, news)
        except asyncio.CancelledError:
            raise
        except Exception as e:
            logger.warning("replica %s is lost: %r", replica, e)
        finally:
            del self._lines[replica]
            for run in self._jobs.values():
                if run.replica == replica:
                    run.lost.set()


def _take(run: _Run, news: News) -> None:
    """Give a request its news."""
    request, metrics = run.request, run.request.metrics
    for name, value in (news.facts or {}).items():
        if request.cached is None or name != "cached":  # that of the first replica
            setattr(request, name, value)
    if news.queue_time is not None and metrics.started is None:
        metrics.started = metrics.arrived + news.queue_time
    if news.pieces and metrics.first_token is None:
        metrics.first_token = time.perf_counter()
    for piece in news.pieces:
        c = request.completions[piece.index]
        c.token_ids += piece.token_ids
        c.finish_reason = piece.finish_reason
    if news.ended:
        run.answered = True
        _end(run, news.error)
    elif run.mailbox.deliver(news.pieces, False):
        run.mailbox.notify()


def _end(run: _Run, error: Mistral7BError | None) -> None:
    """End a request and wake its reader."""
    run.request.finished, run.request.error = True, run.request.error or error
    run.request.metrics.finished = time.perf_counter()
    run.lost.set()
    run.mailbox.deliver((), True)
    run.mailbox.notify()
