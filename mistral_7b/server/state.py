"""State that all routes share, and the functions that prepare and run one engine request.

    request = await prepare(state, partial(state.llm.inputs.chat, messages, params, options), "messages")
    async for piece in answer(state, http_request, request):

`prepare` encodes on a worker thread; `answer` streams. No task is cancelled: on a disconnect, a timeout or
shutdown the engine aborts the request, its stream ends, and `answer` raises the reason.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from prometheus_client import Metric
from starlette.requests import Request as HttpRequest
from starlette.types import Scope

from ..engine.async_llm import AsyncLLM
from ..engine.completion import TextPiece
from ..engine.request import Request
from ..errors import AbandonedError, EngineError, ProcessError, PromptTooLongError, QueueFullError
from ..sampling.params import SamplingParams
from .config import ServerConfig
from .http.access import Accounts
from .http.errors import ClientGoneError, ContextLengthError, HttpError
from .http.limits import Account
from .workers import Workers, current_account

# Keys of the ASGI scope, set by the guard and the routes.
DISCONNECT_FUTURE = "mistral_7b.disconnect_future"  # asyncio.Future[None], done when the client has disconnected
DISCONNECT_EVENT = "mistral_7b.disconnect_event"  # threading.Event, set at the same time: for worker threads
ACCOUNT = "mistral_7b.account"  # Account: of the request's key
RESERVED = "mistral_7b.reserved"  # bool, in the scope's "state": the connection is beyond max_connections
NOTES = "mistral_7b.notes"  # dict[str, Any]: fields of the access log
REQUESTS = "mistral_7b.requests"  # list[Request]: the engine requests

READERS = 64  # worker threads that encode prompts and compile grammars
WRITES = 400  # writes per second, over all streams; LONGEST_INTERVAL takes precedence
LONGEST_INTERVAL = 0.1  # seconds between two writes of a stream: longer intervals would be visible as stutter


class Observer(Protocol):
    """Receives request events on the event loop's thread; all times are in seconds."""

    def arrived(self, request: Request) -> None: ...
    def first_token(self, request: Request, seconds: float) -> None: ...
    def inter_token(self, seconds: float, tokens: int) -> None: ...  # the mean of so many tokens
    def ended(self, request: Request, reason: str, seconds: float) -> None:
        """`reason`: stop, length, abort (client disconnected), timeout, shutdown, refused (queue full), error."""
        ...

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """An HTTP response has ended. `route`: the path template, "" if no route matched."""
        ...

    def lagged(self, late: float, blocked: float) -> None:
        """Lag of the event loop, and the part of it that this process caused; see lag.watch."""
        ...


class Dropping(Protocol):
    """A log that drops lines rather than wait."""

    dropped: int


class Silent:
    """An Observer that ignores all events."""

    def arrived(self, request: Request) -> None: ...
    def first_token(self, request: Request, seconds: float) -> None: ...
    def inter_token(self, seconds: float, tokens: int) -> None: ...
    def ended(self, request: Request, reason: str, seconds: float) -> None: ...
    def answered(self, route: str, method: str, status: int, seconds: float) -> None: ...
    def lagged(self, late: float, blocked: float) -> None: ...


@dataclass(frozen=True)
class Answered:
    """A finished HTTP request, as State.trace receives it.

    `route`: see Observer.answered. `began`: value of `time.perf_counter`. `seconds`: duration.
    """

    scope: Scope
    id: str
    route: str
    status: int
    began: float
    seconds: float


@dataclass
class State:
    """The served model, the configuration, and the requests in progress. For the event loop's thread only."""

    llm: AsyncLLM
    config: ServerConfig
    model_name: str
    started: float = field(default_factory=time.time)
    stopping: bool = False  # a signal came: not ready for load balancers, but requests are still accepted
    draining: bool = False  # new requests are refused
    metrics: Observer = field(default_factory=Silent)
    trace: Callable[[Answered], None] | None = None
    # A large pool, because a thread may wait seconds for a grammar that other processes compile, and a separate
    # one, so that users of the default executor never queue behind it.
    workers: Workers = field(init=False)
    running: set[Running] = field(default_factory=set)
    active: int = 0  # HTTP requests that the guard has admitted
    held: int = 0  # bytes of their bodies
    connections: Collection[object] = ()  # that are open
    evicted: int = 0  # idle connections that were closed for new ones
    rejected: int = 0  # connections that were refused
    log: Dropping | None = None
    # The names of the engines in other processes, and their metrics; None: the engine is that of `llm`.
    replicas: Callable[[], Iterable[tuple[str, list[Metric]]]] | None = None
    accounts: Accounts = field(init=False)

    def __post_init__(self) -> None:
        self.accounts = Accounts(self.config)
        self.workers = Workers(READERS, len(self.accounts.all))

    @property
    def models(self) -> tuple[str, ...]:
        """Accepted values of a request's `model`: the base model first, then the loaded adapters."""
        return (self.model_name, *self.llm.engine.adapters.names)

    def adapter(self, model: str | None) -> str | None:
        """The adapter that `model` names, or None for the base model. HttpError (404) for an unknown name."""
        if not model or model == self.model_name:
            return None
        if model not in self.models:
            known = ", ".join(map(repr, self.models))
            raise HttpError(404, f"there is no model {model!r:.100}; available: {known}", field="model",
                          code="model_not_found")  # fmt: skip
        return model

    @property
    def closed(self) -> HttpError | None:
        """The reason why new requests are refused (503), or None."""
        if self.llm.broken is not None:
            return engine_broke(503)
        if self.draining:
            return HttpError(503, "the server is shutting down", hint="retry in a moment", code="shutting_down",
                           retry_after=5)  # fmt: skip
        return None

    def write_interval(self) -> float:
        """Seconds that a stream waits after a write, so that several tokens share the next one.

        Each write runs through many layers and holds the GIL, which the engine's thread needs. The rate over all
        streams is therefore limited to WRITES per second.
        """
        return min(len(self.running) / WRITES, LONGEST_INTERVAL)

    def abort_all(self, why: HttpError) -> int:
        """Abort all running requests for the reason `why`; return their number."""
        for running in list(self.running):
            running.end("shutdown", why)
        return len(self.running)


class Running:
    """A running request, which other tasks can abort with a reason."""

    def __init__(self, llm: AsyncLLM, request: Request) -> None:
        self.llm, self.request = llm, request
        self.why: HttpError | None = None
        self.reason = "abort"

    def end(self, reason: str, why: HttpError) -> None:
        """Abort the request within one engine step. Only the first call's reason is kept."""
        if self.why is None:
            self.why, self.reason = why, reason
            self.llm.abort(self.request.id)


def engine_broke(status: int) -> HttpError:
    """The error after an engine failure, whose cause is in the log.

    503 for a request that arrived later: a proxy may retry it on another server. 500 for one that the engine was
    running, which a proxy must not retry: it may have caused the failure and would break the next server, too.
    """
    return HttpError(status, "the server's engine failed", hint="retry in a moment", code="engine_broken",
                   retry_after=5)  # fmt: skip


def is_admin(http_request: HttpRequest) -> bool:
    """Whether the request has an admin key."""
    return account_of(http_request).admin


def account_of(http_request: HttpRequest) -> Account:
    """The account that the request is counted in."""
    found: Account = http_request.scope[ACCOUNT]
    return found


def note(http_request: HttpRequest, **notes: Any) -> None:
    """Add fields to the request's line of the access log."""
    http_request.scope.setdefault(NOTES, {}).update(notes)


def disconnect_event(http_request: HttpRequest) -> threading.Event | None:
    """An event, set when the client has disconnected; for RequestOptions.disconnected."""
    event: threading.Event | None = http_request.scope.get(DISCONNECT_EVENT)
    return event


async def prepare(state: State, make: Callable[[], Request], field: str) -> Request:
    """Run `make`, which makes a request, on a worker thread, because tokenizing and grammars are slow.

    Raises the input processor's errors for an invalid request; HttpError naming `field` if it needs more than all
    memory (422) or its prompt is over the limit (400); QueueFullError; ClientGoneError if the client has
    disconnected and `make` was given the `disconnect_event`.
    """
    try:
        state.llm.check_queue(current_account.get().name)  # before the work, which a refused request would waste
    except QueueFullError:
        current_account.get().count_refusal("queue")
        raise
    try:
        request = await state.workers.run(make)
    except AbandonedError as e:
        raise ClientGoneError from e
    except (QueueFullError, PromptTooLongError, ProcessError):
        raise
    except EngineError as e:  # larger than the engine's memory, even alone
        raise HttpError.of(e, status=422, code="too_large") from e
    most = state.config.max_prompt_tokens or state.llm.engine.model.args.max_seq_len
    if len(request.ids) > most:
        raise ContextLengthError(most, len(request.ids), request.params.max_tokens, field)
    check_size(state, [request])
    return request


def check_size(state: State, requests: Sequence[Request]) -> None:
    """HttpError (422) for more generated tokens than one HTTP request may ask for."""
    size = sum(c.max_tokens for r in requests if r.pooling is None for c in r.completions)
    if size > state.config.max_request_tokens:
        raise HttpError(422, f"up to {size} tokens would be generated; the server's limit for one request is "
                        f"{state.config.max_request_tokens}", field="max_tokens", code="too_large",
                        hint="lower max_tokens or n, or send fewer prompts")  # fmt: skip


def with_capped_max_tokens(make: Callable[[SamplingParams], Request], params: SamplingParams) -> Request:
    """Make a request; if `max_tokens` do not fit the context or the memory, it gets all that fit.

    For clients such as Claude Code, which always asks for 32,000.
    """
    try:
        return make(params)
    except (PromptTooLongError, EngineError) as e:
        if params.max_tokens is None or isinstance(e, (AbandonedError, ProcessError, QueueFullError)):
            raise
        return make(replace(params, max_tokens=None))


async def answer(state: State, http_request: HttpRequest, request: Request) -> AsyncGenerator[TextPiece, None]:
    """Run a request on the engine and yield its pieces.

    Closing the generator early aborts the request: wrap it in contextlib.aclosing. Raises QueueFullError, the
    request's own error, ClientGoneError, or HttpError on a timeout or shutdown.
    """
    began = time.perf_counter()
    running, metrics, limit = Running(state.llm, request), state.metrics, state.config.request_timeout
    disconnected: asyncio.Future[None] | None = http_request.scope.get(DISCONNECT_FUTURE)
    if disconnected is not None and disconnected.done():
        raise ClientGoneError
    account = account_of(http_request)
    if request.priority and not account.priority:
        raise HttpError(403, "this key may not set priority", field="priority", code="priority_not_allowed",
                        hint="leave it out")  # fmt: skip
    request.client = account.name
    metrics.arrived(request)

    def abort(_: object) -> None:
        running.end("abort", ClientGoneError())

    if disconnected is not None:
        disconnected.add_done_callback(abort)
    timeout = HttpError(504, f"the response was not complete after {limit:g} seconds", code="timeout",
                      headers={"x-should-retry": "false"})  # fmt: skip
    timer = asyncio.get_running_loop().call_later(limit, running.end, "timeout", timeout)
    state.running.add(running)
    reason, tokens = "abort", 0
    newest: dict[int, float] = {}  # time of each completion's latest piece
    try:
        async with aclosing(state.llm.follow(request, state.write_interval)) as pieces:
            async for piece in pieces:
                now = time.perf_counter()
                if not newest:
                    metrics.first_token(request, now - began)
                elif piece.token_ids and piece.index in newest:
                    new = len(piece.token_ids)
                    metrics.inter_token((now - newest[piece.index]) / new, new)
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
        if disconnected is not None:
            disconnected.remove_done_callback(abort)
        timer.cancel()
        state.running.discard(running)
        running.why = None  # the traceback of what was raised has this frame: a cycle
        metrics.ended(request, reason, time.perf_counter() - began)
        if reason != "refused":
            account.spend(len(request.ids) + tokens)
        _note(state, http_request, request, reason, tokens)


def _note(state: State, http_request: HttpRequest, request: Request, reason: str, tokens: int) -> None:
    """Add an engine request to the access log fields of its HTTP request."""
    notes = http_request.scope.setdefault(NOTES, {})
    notes["prompt_tokens"] = notes.get("prompt_tokens", 0) + len(request.ids)
    notes["completion_tokens"] = notes.get("completion_tokens", 0) + tokens
    notes["reason"], notes["model"] = reason, request.adapter or state.model_name
    times = request.metrics
    for name, seconds in (("queue_seconds", times.queue_time), ("first_token_seconds", times.time_to_first_token)):
        if seconds is not None and name not in notes:  # of the first, where there are several
            notes[name] = round(seconds, 4)
    http_request.scope.setdefault(REQUESTS, []).append(request)
    if state.config.log_prompts:
        tokenizer = state.llm.tokenizer
        text = request.prompt if request.prompt is not None or tokenizer is None else tokenizer.decode(request.ids)
        notes.setdefault("prompts", []).append(text)
