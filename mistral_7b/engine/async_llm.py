"""AsyncLLM: requests come and go while the engine's loop runs in a thread of its own.

    coroutine            thread
    generate ----add---> commands ---> engine.step()
        ^                                 |
        +--- mailbox <---- pieces --------+       one wake-up of the event loop a step

Only the thread touches the engine; everything else is left in `commands` and done between two steps, so that a
request that is given up has its pages back within one step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..errors import EngineError, QueueFullError
from ..model import Mistral7B
from ..sampling.params import SamplingParams
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import ToolCall
from .completion import CompletionOutput, RequestOutput, TextPiece, cumulative
from .config import EngineConfig
from .containment import because
from .inputs import Messages, Prompt, RequestOptions, ToolChoice, Tools
from .llm import EmbeddingOutput, open_engine
from .request import Request
from .threads import release

logger = logging.getLogger("mistral_7b.engine")

Command = Callable[[], None]


class _Mailbox:
    """What has come for one request and was not yet taken by its coroutine."""

    def __init__(self) -> None:
        self.pieces: deque[TextPiece] = deque()
        self.news = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.resting = False  # until a time is up, only the end is news
        self.ended = False

    def take(self) -> list[TextPiece]:
        """What has come, as one piece of each completion."""
        come: dict[int, list[TextPiece]] = {}
        for _ in range(len(self.pieces)):  # the engine's thread adds more meanwhile
            piece = self.pieces.popleft()
            come.setdefault(piece.index, []).append(piece)
        return [TextPiece.joined(pieces) for pieces in come.values()]

    def announce(self) -> None:
        """There is something new, or there may be."""
        if self.ended or not self.resting:
            self.news.set()

    def rested(self) -> None:
        """The time is up."""
        self.resting = False
        if self.pieces:
            self.news.set()

    async def wait(self, rest: float) -> None:
        """For news: the end at once, and others when `rest` seconds are over."""
        self.news.clear()
        if self.ended:
            return
        if rest > 0:
            self.resting = True
            timer = self.loop.call_at((self.loop.time() // rest + 1) * rest, self.rested)
        elif self.pieces:
            return
        try:
            await self.news.wait()
        finally:
            if rest > 0:
                timer.cancel()
                self.resting = False


class AsyncLLM:
    """An engine for servers: `async for` its pieces or outputs, from any number of coroutines.

        llm = AsyncLLM("demo")
        async for piece in llm.stream("def add(", SamplingParams(max_tokens=32)):
            print(piece, end="", flush=True)
        await llm.close()

    Arguments as LLM's. With `max_waiting` in the configuration a request too many is refused with QueueFullError
    at once. Leaving an `async for` early, or cancelling its task, ends the request.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Mistral7B = "demo",
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
    ) -> None:
        self.inputs = open_engine(
            model, config, tokenizer, adapters, dtype=dtype, device=device, quantization=quantization
        )
        self.engine = self.inputs.engine
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._touched: dict[_Mailbox, None] = {}
        self._coming = 0  # requests that are on their way to the engine
        self._lock = threading.Lock()
        self._why: EngineError | None = None  # nothing more can be asked
        self._threads = torch.get_num_threads()
        release()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.inputs.tokenizer

    @property
    def broken(self) -> EngineError | None:
        """Why nothing more can be asked; None: all is well."""
        return self._why

    # ------------------------------------------------------------------ requests

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **asked: Any
    ) -> AsyncIterator[TextPiece]:
        """Complete a prompt; yield its text in pieces. `asked`: RequestOptions. Errors come first."""
        request = await asyncio.to_thread(
            self.inputs.text, prompt, params or SamplingParams(), RequestOptions(**asked)
        )
        async with aclosing(self.follow(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **asked: Any
    ) -> AsyncIterator[RequestOutput]:
        """The same, giving out all that has come so far, each time that something has; the last is `finished`."""
        request = await asyncio.to_thread(
            self.inputs.text, prompt, params or SamplingParams(), RequestOptions(**asked)
        )
        async with aclosing(self._growing(request)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self, messages: Messages, params: SamplingParams | None = None,
        tools: Tools = None, tool_choice: ToolChoice = "auto", **asked: Any,
    ) -> AsyncIterator[RequestOutput]:  # fmt: skip
        """Answer a conversation, as `generate` continues a prompt."""
        read = partial(self.inputs.chat, tools=tools, tool_choice=tool_choice)
        request = await asyncio.to_thread(read, messages, params or SamplingParams(), RequestOptions(**asked))
        async with aclosing(self._growing(request)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self, prompt: Prompt, *, pooling: str = "mean", normalize: bool = True, **asked: Any
    ) -> EmbeddingOutput:
        """A text's "mean" or "last" final hidden state, of length 1 if `normalize`."""
        request = await asyncio.to_thread(self.inputs.embedding, prompt, pooling, RequestOptions(**asked))
        async for _ in self.follow(request):
            pass
        return EmbeddingOutput(request.embedding(normalize), request.ids)

    async def follow(
        self, request: Request, rest: Callable[[], float] | None = None
    ) -> AsyncGenerator[TextPiece, None]:
        """Have a request of `inputs` computed, and give out its pieces. Raises what it ends with, if not well.

        What comes before it is taken comes as one piece. `rest`, asked after each, says for how many seconds no
        more is wanted, unless it is the end: to be woken costs a fast model's reader more than to read.
        """
        mailbox = _Mailbox()
        request.sink = lambda request, pieces: self._deliver(mailbox, request, pieces)
        self._submit(request, mailbox)
        try:
            while not (mailbox.ended and not mailbox.pieces):
                taken = mailbox.take()
                for piece in taken:
                    yield piece
                await mailbox.wait(rest() if taken and rest is not None else 0)
            if request.error is not None:
                raise request.error
        finally:
            if not request.finished:
                self._commands.put(lambda: self.engine.abort_request(request))

    async def _growing(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """What has come of a request so far, made of its pieces alone: the engine's thread goes on meanwhile."""
        grown = [_Grown(i, request.params.logprobs is not None) for i in range(request.params.n)]
        async with aclosing(self.follow(request)) as pieces:
            async for piece in pieces:
                grown[piece.index].add(piece)
                finished = all(g.reason for g in grown)
                yield replace(request.output([g.output() for g in grown]), finished=finished)

    def abort(self, request_id: str) -> None:
        """End a request as it stands, within one step; nothing happens if it has ended."""
        self._commands.put(lambda: self.engine.abort(request_id))

    async def call(self, function: Callable[[], Any]) -> Any:
        """What `function` returns when the engine's thread calls it, between two steps."""
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
        """Make a LoRA adapter known; raises what is wrong with it."""
        await self.call(lambda: self.engine.load_adapter(name, path))

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter. AdapterError while requests use it."""
        await self.call(lambda: self.engine.unload_adapter(name))

    async def close(self) -> None:
        """End all requests and the thread. Those still waited for raise EngineError."""
        with self._lock:
            self._why = self._why or EngineError("the engine is closed")
            self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.engine.scheduler.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_open(self) -> None:
        """With the lock held until the command is there: or the thread might end before, and nobody hear of it."""
        if self._why is not None:
            raise EngineError.of(self._why) from self._why.__cause__

    def _submit(self, request: Request, mailbox: _Mailbox) -> None:
        """Hand a request to the thread. QueueFullError if too many wait already."""
        most = self.engine.config.max_waiting

        def command() -> None:
            with self._lock:
                self._coming -= 1
            try:
                self.engine.add(request)
            except Exception as e:
                request.error, request.finished = because(request, "queueing it", e), True
                self._deliver(mailbox, request, [])

        with self._lock:
            self._check_open()
            waiting = self.engine.scheduler.waiting + self._coming
            if most is not None and waiting >= most:
                raise QueueFullError(f"{waiting} requests are waiting, and no more may", hint="try again later")
            self._coming += 1
            self._commands.put(command)

    # ------------------------------------------------------------------ in the engine's thread

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._obey(wait=self.engine.idle and not self._touched):
                if not self.engine.idle:
                    self.engine.step()
                self._wake()
        except BaseException as e:  # a mistake in the engine; a panic of a library in Rust is no Exception
            logger.critical("the engine broke", exc_info=e)
            error = EngineError(f"the engine broke, and computes nothing any more: {e!r}")
            error.__cause__ = e
            with self._lock:
                self._why = error
        assert self._why is not None
        self._dismiss(self._why)
        while not self._commands.empty():  # who came too late hears of it
            if (command := self._commands.get()) is not None:
                command()
        self._dismiss(self._why)
        self._wake()

    def _dismiss(self, why: EngineError) -> None:
        """End all requests. Whoever waits must hear of it, even if the engine is broken."""
        for request in list(self.engine.requests.values()):
            try:
                self.engine.fail(request, why)
            except Exception:
                request.error, request.finished = why, True
                if request.sink is not None:
                    request.sink(request, [])

    def _obey(self, wait: bool) -> bool:
        """Do what was asked since the last step; False: it is time to end."""
        while wait or not self._commands.empty():
            command = self._commands.get()
            wait = False
            if command is None:
                return False
            command()
        return True

    def _deliver(self, mailbox: _Mailbox, request: Request, pieces: Sequence[TextPiece]) -> None:
        mailbox.pieces.extend(pieces)
        mailbox.ended = request.finished
        if mailbox.ended or not mailbox.resting:  # else it looks for itself when it has rested
            self._touched[mailbox] = None

    def _wake(self) -> None:
        """Tell every event loop once about all its mailboxes with news."""
        loops: dict[asyncio.AbstractEventLoop, list[_Mailbox]] = {}
        for mailbox in self._touched:
            loops.setdefault(mailbox.loop, []).append(mailbox)
        self._touched.clear()
        for loop, mailboxes in loops.items():
            with suppress(RuntimeError):  # it is closed: nobody there waits any more
                loop.call_soon_threadsafe(_announce, mailboxes)


def _announce(mailboxes: Sequence[_Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.announce()


class _Grown:
    """A completion put together from its pieces."""

    def __init__(self, index: int, logprobs: bool) -> None:
        self.index, self.wanted = index, logprobs
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
            cumulative(self.token_ids, self.logprobs) if self.wanted else None,
            list(self.logprobs) if self.wanted else None, self.reason, self.stop,
            [replace(call) for call in self.calls],
        )  # fmt: skip
