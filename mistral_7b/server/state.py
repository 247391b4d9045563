"""What all routes share, and the one way in which a request is followed to its end.

    request = await read(state, partial(state.llm.reader.chat, messages, params, asked), "messages")    in a thread
    async for piece in answer(state, http_request, request):                                 as it comes

Nothing is cancelled in here: a client that has gone, a time limit and a server that stops each have the engine end
the request, whose stream then ends, and `answer` raises why.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.types import Scope

from ..completion import TextPiece
from ..engine.async_llm import AsyncLLM
from ..engine.request import Request
from ..errors import AbandonedError, EngineError, ProcessError, PromptTooLongError, QueueFullError
from .config import ServerConfig
from .problems import ClientGoneError, Refusal

# What the guard leaves in a request's scope.
GONE = "mistral_7b.gone"  # asyncio.Future[None], done when the client has hung up
LEFT = "mistral_7b.left"  # threading.Event, set when it has: what is done for it in a thread looks at that
ADMIN = "mistral_7b.admin"  # bool: whether it came with an admin key
NOTES = "mistral_7b.notes"  # dict[str, Any]: what goes into the access log
REQUESTS = "mistral_7b.requests"  # list[Request]: what the engine was asked

READERS = 64  # requests that are read at once
WRITES = 400  # a second, of all answers together, as far as
LONGEST_REST = 0.1  # seconds: a text that grows in steps of this length looks even


class Observer(Protocol):
    """Is told what happens, in the event loop's thread; times in seconds."""

    def arrived(self, request: Request) -> None: ...
    def first_token(self, request: Request, seconds: float) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def ended(self, request: Request, reason: str, seconds: float) -> None:
        """`reason`: "stop", "length", "abort" (the client has gone), "timeout", "shutdown", "refused" (the queue
        was full) or "error"."""
        ...

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request has been answered. `route`: the template of its path, "" where it came to none."""
        ...

    def lagged(self, late: float, blocked: float) -> None:
        """How late the event loop came round, and for how much of it the process itself is to blame."""
        ...


class Silent:
    """An observer that nobody asks."""

    def arrived(self, request: Request) -> None: ...
    def first_token(self, request: Request, seconds: float) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def ended(self, request: Request, reason: str, seconds: float) -> None: ...
    def answered(self, route: str, method: str, status: int, seconds: float) -> None: ...
    def lagged(self, late: float, blocked: float) -> None: ...


@dataclass(frozen=True)
class Answered:
    """An HTTP request that has been answered, or whose client has gone, for whoever traces such.

    `route` as in Observer.answered; `began` in seconds of `time.perf_counter`, `seconds` from then on.
    """

    scope: Scope
    id: str
    route: str
    status: int
    began: float
    seconds: float


@dataclass
class State:
    """A server's model and what is known of its requests. Belongs to the event loop's thread."""

    llm: AsyncLLM
    config: ServerConfig
    model_name: str
    started: float = field(default_factory=time.time)
    draining: bool = False
    metrics: Observer = field(default_factory=Silent)
    trace: Callable[[Answered], None] | None = None
    # Threads that wait for tokens and grammars: many, as a grammar may take seconds of other processes' time, and
    # apart from the event loop's own, so that these never wait for one.
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READERS, "read"))
    running: set[Running] = field(default_factory=set)
    active: int = 0  # HTTP requests inside the guard
    held: int = 0  # bytes of their bodies

    @property
    def models(self) -> tuple[str, ...]:
        """Names that a request's `model` may have: the model itself first, then its adapters."""
        return (self.model_name, *self.llm.engine.adapters.names)

    def adapter(self, model: str | None) -> str | None:
        """The adapter that `model` names; None: the model itself. Refusal (404) for a name that is neither."""
        if not model or model == self.model_name:
            return None
        if model not in self.models:
            known = ", ".join(map(repr, self.models))
            raise Refusal(404, f"there is no model {model!r:.100} here: there is {known}", field="model",
                          code="model_not_found")  # fmt: skip
        return model

    @property
    def closed(self) -> Refusal | None:
        """Why no request is taken any more; None: they are."""
        if self.llm.broken is not None:
            return engine_broke(503)
        if self.draining:
            return Refusal(503, "the server is shutting down", hint="ask again in a moment", code="shutting_down",
                           retry_after=5)  # fmt: skip
        return None

    def rest(self) -> float:
        """Seconds that an answer waits, after some of it was written, for more to come together.

        A write goes through many layers and keeps Python's lock from the engine's thread: all answers together
        get so many a second, but none looks as if it stuttered.
        """
        return min(len(self.running) / WRITES, LONGEST_REST)

    def cut(self, why: Refusal) -> int:
        """End whatever is running; how many that were."""
        for running in list(self.running):
            running.end("shutdown", why)
        return len(self.running)


class Running:
    """A request that is being answered, and how it is ended from outside."""

    def __init__(self, llm: AsyncLLM, request: Request) -> None:
        self.llm, self.request = llm, request
        self.why: Refusal | None = None
        self.reason = "abort"

    def end(self, reason: str, why: Refusal) -> None:
        """Have the engine end it within one step; the first reason is the one that counts."""
        if self.why is None:
            self.why, self.reason = why, reason
            self.llm.abort(self.request.id)


def engine_broke(status: int) -> Refusal:
    """What is said when the engine broke; its log says why.

    503 to a request that came after: a proxy may send it to another server at once. 500 to one that was with the
    engine, which a proxy leaves to its client: it may be what broke the engine, and would break the next.
    """
    return Refusal(status, "the engine of this server broke", hint="ask again in a moment", code="engine_broken",
                   retry_after=5)  # fmt: skip


def is_admin(http_request: HttpRequest) -> bool:
    """Whether the request came with an admin key."""
    return bool(http_request.scope.get(ADMIN, False))


def note(http_request: HttpRequest, **notes: Any) -> None:
    """Put something into the request's line of the access log."""
    http_request.scope.setdefault(NOTES, {}).update(notes)


def left(http_request: HttpRequest) -> threading.Event | None:
    """Is set when the client has hung up; for Asked.gone."""
    event: threading.Event | None = http_request.scope.get(LEFT)
    return event


async def read(state: State, make: Callable[[], Request], field: str) -> Request:
    """What `make`, a call of the engine's reader, returns; in a thread, as tokens and grammars take their time.

    Raises what is wrong with the request; Refusal (422) for one whose `field` is larger than this server takes;
    ClientGoneError where the client has hung up and `make` was told so (`left`).
    """
    try:
        request = await asyncio.get_running_loop().run_in_executor(state.readers, make)
    except AbandonedError as e:
        raise ClientGoneError from e
    except (QueueFullError, PromptTooLongError, ProcessError):
        raise
    except EngineError as e:  # it could never be computed
        raise Refusal.of(e, status=422, code="too_large") from e
    most = state.config.max_prompt_tokens or state.llm.engine.model.args.max_seq_len
    if len(request.ids) > most:
        raise Refusal(422, f"the prompt has {len(request.ids)} tokens, and this server takes {most}",
                      field=field, hint="shorten it", code="context_length_exceeded")  # fmt: skip
    return request


async def answer(state: State, http_request: HttpRequest, request: Request) -> AsyncGenerator[TextPiece, None]:
    """Have a request computed, and give out its pieces as they come.

    Ended early it ends the request; close it (contextlib.aclosing) rather than leave it. Raises QueueFullError,
    what the request ended with, ClientGoneError, or a Refusal when time is up or the server stops.
    """
    began = time.perf_counter()
    running, metrics, limit = Running(state.llm, request), state.metrics, state.config.request_timeout
    gone: asyncio.Future[None] | None = http_request.scope.get(GONE)
    if gone is not None and gone.done():
        raise ClientGoneError
    metrics.arrived(request)

    def leave(_: object) -> None:
        running.end("abort", ClientGoneError())

    if gone is not None:
        gone.add_done_callback(leave)
    late = Refusal(504, f"the answer was not complete after {limit:g} seconds", code="timeout",
                   headers={"x-should-retry": "false"})  # fmt: skip
    timer = asyncio.get_running_loop().call_later(limit, running.end, "timeout", late)
    state.running.add(running)
    reason, tokens = "abort", 0
    newest: dict[int, float] = {}  # when each completion's last piece came
    try:
        async with aclosing(state.llm.follow(request, state.rest)) as pieces:
            async for piece in pieces:
                now = time.perf_counter()
                if not newest:
                    metrics.first_token(request, now - began)
                elif piece.token_ids and piece.index in newest:
                    metrics.inter_token((now - newest[piece.index]) / len(piece.token_ids))
                newest[piece.index] = now
                tokens += len(piece.token_ids)
                reason = piece.finish_reason or reason
                yield piece
        if running.why is not None:
            reason = running.reason
            raise running.why
        reason = "stop" if request.pooling else reason
    except QueueFullError:
        reason = "refused"
        raise
    except Exception as e:
        reason = running.reason if running.why is e else "error"
        if isinstance(e, EngineError) and state.llm.broken is not None:
            raise engine_broke(503 if request.error is None else 500) from e
        raise
    finally:
        if gone is not None:
            gone.remove_done_callback(leave)
        timer.cancel()
        state.running.discard(running)
        metrics.ended(request, reason, time.perf_counter() - began)
        _note(state, http_request, request, reason, tokens)


def _note(state: State, http_request: HttpRequest, request: Request, reason: str, tokens: int) -> None:
    """Add a request to what the access log says of the HTTP request that it belongs to."""
    notes = http_request.scope.setdefault(NOTES, {})
    notes["prompt_tokens"] = notes.get("prompt_tokens", 0) + len(request.ids)
    notes["completion_tokens"] = notes.get("completion_tokens", 0) + tokens
    notes["reason"] = reason
    http_request.scope.setdefault(REQUESTS, []).append(request)
    if state.config.log_prompts:
        tokenizer = state.llm.tokenizer
        text = request.prompt if request.prompt is not None or tokenizer is None else tokenizer.decode(request.ids)
        notes.setdefault("prompts", []).append(text)
