"""AsyncLLM: requests are added and aborted while the engine's loop runs in its own thread.

    coroutine            thread
    generate ----add---> commands ---> engine.step()
        ^                                 |
        +--- mailbox <---- pieces --------+       one wake-up of the event loop a step

Only the thread calls the engine. Other threads queue `commands`, which it runs between two steps, so the pages of
an aborted request are freed within one step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..errors import EngineError
from ..model import Mistral7B
from ..sampling.params import SamplingParams
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import ToolCall
from .completion import CompletionOutput, RequestOutput, TextPiece, cumulative
from .config import EngineConfig
from .containment import request_error
from .followers import LostRank, followers_of
from .inputs import InputProcessor, Messages, RequestOptions, ToolChoice, Tools
from .keywords import read_fields
from .llm import EmbeddingOutput, open_engine
from .mailbox import Mailbox, wake
from .prompts import Prompt
from .queues import queue_full
from .request import Request
from .threads import release_openmp_threads

logger = logging.getLogger("mistral_7b.engine")

Command = Callable[[], None]


class AsyncLLM:
    """A model that serves requests from any number of coroutines, each read with `async for`.

        llm = AsyncLLM("demo")
        async for piece in llm.stream("def add(", SamplingParams(max_tokens=32)):
            print(piece, end="", flush=True)
        await llm.close()

    The arguments are LLM's; `model` may also be an InputProcessor with its engine (followers.lead).
    QueueFullError refuses a request when `max_waiting` of the configuration are waiting. Leaving an `async for`
    early, or cancelling its task, aborts the request.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Mistral7B | InputProcessor = "demo",
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
        **unknown: Any,
    ) -> None:
        self.inputs = model if isinstance(model, InputProcessor) else open_engine(
            model, config, tokenizer, adapters, dtype=dtype, device=device, quantization=quantization, **unknown
        )  # fmt: skip
        self.engine = self.inputs.engine
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._updated: dict[Mailbox, None] = {}  # mailboxes to wake after the step
        self._submitted: Counter[str] = Counter()  # requests not yet in the engine's queue, by client
        self._lock = threading.Lock()
        self._error: EngineError | None = None  # set when the engine is closed or has failed
        self._threads = torch.get_num_threads()
        release_openmp_threads()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()
        self._followers = followers_of(self.engine.forward)
        if self._followers is not None:
            self._followers.watched(lambda: self._commands.put(self._lose))

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.inputs.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that give none: SamplingParams() with the model's own defaults."""
        return self.inputs.default_params

    @property
    def broken(self) -> EngineError | None:
        """The error that new requests raise after the engine was closed or has failed; None while it runs."""
        return self._error

    # ------------------------------------------------------------------ requests

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any
    ) -> AsyncIterator[TextPiece]:
        """Complete a prompt; yield its text in pieces. `fields` as in LLM.generate."""
        sampling, options = read_fields("AsyncLLM.stream", params, fields, self.inputs.default_params)
        request = await asyncio.to_thread(self.inputs.text, prompt, sampling, RequestOptions(**options))
        async with aclosing(self.follow(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any
    ) -> AsyncIterator[RequestOutput]:
        """Complete a prompt; yield the whole output so far after each new piece. The last one is `finished`."""
        sampling, options = read_fields("AsyncLLM.generate", params, fields, self.inputs.default_params)
        request = await asyncio.to_thread(self.inputs.text, prompt, sampling, RequestOptions(**options))
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self, messages: Messages, params: SamplingParams | None = None,
        tools: Tools = None, tool_choice: ToolChoice = "auto", **fields: Any,
    ) -> AsyncIterator[RequestOutput]:  # fmt: skip
        """Answer a conversation; yield outputs as `generate` does."""
        read = partial(self.inputs.chat, tools=tools, tool_choice=tool_choice)
        sampling, options = read_fields("AsyncLLM.chat", params, fields, self.inputs.default_params)
        request = await asyncio.to_thread(read, messages, sampling, RequestOptions(**options))
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self, prompt: Prompt, *, pooling: str = "mean", normalize: bool = True, **options: Any
    ) -> EmbeddingOutput:
        """Embed a prompt: the mean or the last of its final hidden states, of length 1 if `normalize`."""
        request = await asyncio.to_thread(self.inputs.embedding, prompt, pooling, RequestOptions(**options))
        async for _ in self.follow(request):
            pass
        return EmbeddingOutput(request.embedding(normalize), request.ids)

    async def follow(
        self, request: Request, interval: Callable[[], float] | None = None
    ) -> AsyncGenerator[TextPiece, None]:
        """Compute a request made by `inputs` and yield its pieces. Raises the error of a request that fails.

        Pieces that wait to be read are joined. `interval` is called after each read and returns an interval in
        seconds: the next read is at its next multiple, and only the end of the request interrupts the wait. With a
        fast model, waking up costs more than reading.
        """
        mailbox = Mailbox()
        request.sink = lambda request, pieces: self._deliver(mailbox, request, pieces)
        self._submit(request, mailbox)
        try:
            while not (mailbox.ended and not mailbox.pieces):
                taken = mailbox.take()
                for piece in taken:
                    yield piece
                await mailbox.wait(interval() if taken and interval is not None else 0)
            if request.error is not None:
                raise request.error
        finally:
            if not request.finished:
                self._abandon(request)

    async def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Outputs built from the pieces alone, because the engine's thread changes the completions meanwhile."""
        built = [_OutputBuilder(i, request.params.logprobs is not None) for i in range(request.params.n)]
        async with aclosing(self.follow(request)) as pieces:
            async for piece in pieces:
                built[piece.index].add(piece)
                finished = all(b.reason for b in built)
                yield replace(request.output([b.output() for b in built]), finished=finished)

    def _abandon(self, request: Request) -> None:
        """Abort a request that is followed no longer."""
        self._commands.put(lambda: self.engine.abort_request(request))

    def abort(self, request_id: str) -> None:
        """Abort a request within one step; nothing happens if it has ended."""
        self._commands.put(lambda: self.engine.abort(request_id))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Call `function` in the engine's thread, between two steps; return its result."""
        future: Future[Any] = Future()

        def command() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as e:
                    future.set_exception(e)

        with self._lock:
            self._check_open()
            self._commands.put(command)
        return await asyncio.wrap_future(future)

    async def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load a LoRA adapter. AdapterError or CheckpointError if it does not fit or its files are wrong."""
        await self.call(lambda: self.engine.load_adapter(name, path))

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter. AdapterError while requests use it."""
        await self.call(lambda: self.engine.unload_adapter(name))

    async def close(self) -> None:
        """Stop the thread. Requests that have not ended raise EngineError."""
        with self._lock:
            self._error = self._error or EngineError("the engine is closed")
            self._commands.put(None)
        if self._followers is not None:
            await asyncio.to_thread(self._followers.close, self._thread)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.engine.scheduler.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_open(self) -> None:
        """EngineError if the thread runs no more commands. Hold the lock until the command is queued."""
        if self._error is not None:
            raise EngineError.of(self._error) from self._error.__cause__

    def _submit(self, request: Request, mailbox: Mailbox) -> None:
        """Queue a request for the engine. QueueFullError if `max_waiting` are waiting."""

        def command() -> None:
            with self._lock:
                self._submitted[request.client] -= 1
                self._submitted += Counter()  # removes clients with 0
            try:
                self.engine.add(request)
            except Exception as e:
                request.error, request.finished = request_error(request, "queueing it", e), True
                self._deliver(mailbox, request, [])

        with self._lock:
            self._check_open()
            self._check_queue(request.client)
            self._submitted[request.client] += 1
            self._commands.put(command)

    def check_queue(self, client: str = "") -> None:
        """QueueFullError if no further request of a client may wait."""
        with self._lock:
            self._check_queue(client)

    def _check_queue(self, client: str) -> None:
        limit, queues, submitted = self.engine.config.max_waiting, self.engine.scheduler.queues, self._submitted
        total = submitted.total()
        if limit is not None and not queues.has_room(client, limit, total, submitted[client]):
            raise queue_full(queues.waiting + total)

    # ------------------------------------------------------------------ in the engine's thread

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._run_commands(wait=self.engine.idle and not self._updated):
                if not self.engine.idle:
                    self.engine.step()
                self._wake()
        except BaseException as e:  # a bug in the engine; a panic in Rust is a BaseException
            logger.critical("the engine failed", exc_info=e)
            error = EngineError(f"the engine failed and computes no more requests: {e!r}")
            error.__cause__ = e
            with self._lock:
                self._error = error
        assert self._error is not None
        self._fail_all(self._error)
        while not self._commands.empty():  # requests queued meanwhile fail too
            if (command := self._commands.get()) is not None:
                command()
        self._fail_all(self._error)
        self._wake()

    def _lose(self) -> None:
        if self._error is None and self._followers is not None:
            raise LostRank(self._followers.told)

    def _fail_all(self, error: EngineError) -> None:
        """End all requests with an error, and tell their coroutines even if the engine raises."""
        for request in list(self.engine.requests.values()):
            try:
                self.engine.fail(request, error)
            except Exception:
                request.error, request.finished = error, True
                if request.sink is not None:
                    request.sink(request, [])

    def _run_commands(self, wait: bool) -> bool:
        """Run the queued commands, waiting for the first if `wait`; False if the thread is to end."""
        while wait or not self._commands.empty():
            command = self._commands.get()
            wait = False
            if command is None:
                return False
            command()
        return True

    def _deliver(self, mailbox: Mailbox, request: Request, pieces: Sequence[TextPiece]) -> None:
        if mailbox.deliver(pieces, request.finished):
            self._updated[mailbox] = None

    def _wake(self) -> None:
        wake(self._updated)
        self._updated.clear()


class _OutputBuilder:
    """Builds a CompletionOutput from the pieces of a completion."""

    def __init__(self, index: int, logprobs: bool) -> None:
        self.index, self.with_logprobs = index, logprobs
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.calls: list[ToolCall] = []
        self.reason: str | None = None
        self.stop: int | str | None = None

    def add(self, piece: TextPiece) -> None:
        self.texts.append(piece.text)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.reason, self.stop = piece.finish_reason, piece.stop_reason
        for delta in piece.tool_calls:
            if delta.name is not None:
                self.calls.append(ToolCall(delta.index, delta.id or "", delta.name))
            self.calls[delta.index].arguments += delta.arguments

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            self.index, "".join(self.texts), list(self.token_ids),
            cumulative(self.token_ids, self.logprobs) if self.with_logprobs else None,
            list(self.logprobs) if self.with_logprobs else None, self.reason, self.stop,
            [replace(call) for call in self.calls],
        )  # fmt: skip
