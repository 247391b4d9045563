"""ASGI middleware around every route: access control, limits, security headers, the access log.

    admit    host, origin, key, draining, concurrency     from the headers alone
    read     the whole body, limited in size and time     before the route runs
    serve    the route                                    with a future that is done on disconnect

Pure ASGI rather than BaseHTTPMiddleware, which would copy every streamed chunk.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
import time
import uuid
from typing import Any

from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import ServerConfig
from ..state import ACCOUNT, DISCONNECT_EVENT, DISCONNECT_FUTURE, NOTES, RESERVED, Answered, State
from ..workers import current_account
from .access import AccessControl
from .errors import CLIENT_GONE, ClientGoneError, HttpError, refusal, too_many_connections
from .limits import Account
from .pace import Pace

logger = logging.getLogger("mistral_7b.server")
access = logging.getLogger("mistral_7b.access")

PROBES = ("/health", "/health/live", "/health/ready")  # skip all checks, and the log
ALWAYS_SERVED = ("/", "/metrics")  # served under full load and while draining
PAGE_FILES = ("/web/",)  # likewise: small files from memory, so that the page loads and can report a full server
STARTED = 8  # requests started per event loop iteration: some 3 ms
BODIES = 64  # all bodies together may use this many times max_body_bytes
COLLECT_AFTER = 1 << 26  # bytes of finished bodies after which the garbage collector runs
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
EXPOSED = b"x-request-id, request-id, retry-after, " + b", ".join(
    b"x-ratelimit-%s-%s" % (name, kind)
    for kind in (b"requests", b"tokens") for name in (b"limit", b"remaining", b"reset")
)  # fmt: skip
HEADERS = [
    (b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
]  # fmt: skip


class Guard:
    """The middleware. It keeps `state.active` and `state.held`."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state
        self.config: ServerConfig = state.config
        self.access = AccessControl(state.config, state.accounts)
        self.pace = Pace(STARTED)
        self.finished_bytes = 0  # of bodies, since the last garbage collection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"] not in PROBES:
                await self.pace.turn()
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003, "reason": "websockets are not supported"})
        else:
            await self.app(scope, receive, send)

    def body_done(self, size: int) -> None:
        """Account for a finished body, and collect garbage now and then.

        An error's traceback is in a reference cycle and keeps the body alive until a collection.
        """
        self.state.held -= size
        self.finished_bytes += size
        if self.finished_bytes > COLLECT_AFTER:
            self.finished_bytes = 0
            gc.collect(1)


class _Exchange:
    """One HTTP request and its response."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.state, self.config = guard.state, guard.config
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        self.path: str = scope["path"]
        self.status, self.began, self.size = 0, time.perf_counter(), 0
        self.cors: list[tuple[bytes, bytes]] = []
        self.disconnected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.disconnect_event = threading.Event()
        self.body: bytes | None = b""
        self.account: Account | None = None  # that the request is counted in

    async def run(self) -> None:
        try:
            self.admit()
        except HttpError as e:
            await self.refuse(e)
            self.end()
            return
        if self.account is not None:
            self.state.active += 1
            self.account.active += 1
        try:
            await self.serve()
        finally:
            self.end()  # first, so that no request is active whose line is not in the log
            if self.account is not None:
                self.state.active -= 1
                self.account.active -= 1
                self.account.held -= self.size
                self.guard.body_done(self.size)

    # ------------------------------------------------------------------ by the headers

    def admit(self) -> None:
        """Check headers and load. HttpError if the request is not allowed, or not now."""
        if b"transfer-encoding" in self.headers and b"content-length" in self.headers:  # request smuggling
            raise HttpError(400, "the request has both Transfer-Encoding and Content-Length", code="bad_http",
                            headers={"connection": "close"})  # fmt: skip
        if self.path in PROBES:
            return
        if self.scope.get("state", {}).get(RESERVED):
            self.state.rejected += 1
            raise too_many_connections()
        control = self.guard.access
        always_served = self.path in ALWAYS_SERVED or self.path.startswith(PAGE_FILES)
        control.check_host(self.headers)
        self.allow(control.origin_of(self.headers))
        if self.preflight:
            return
        page = self.scope["method"] == "GET" and b"text/html" in self.headers.get(b"accept", b"")
        self.scope[ACCOUNT] = account = control.check_key(self.headers, page)
        if always_served:
            return
        if (closed := self.state.closed) is not None:
            raise closed
        self.check_share(account)
        self.account = account
        current_account.set(account)
        account.admit(counted=self.scope["method"] == "POST")

    def check_share(self, account: Account) -> None:
        """HttpError (429) under full load, unless the account has less than an equal share of the load."""
        most = self.config.max_concurrent
        if self.state.active < most:
            return
        sharing = sum(a.active > 0 or a is account for a in self.state.accounts.all)
        if sharing == 1 or account.active >= most // sharing:
            raise HttpError(429, f"{self.state.active} requests are being served", hint="try again later",
                            code="too_many_requests", retry_after=1)  # fmt: skip

    @property
    def preflight(self) -> bool:
        """Whether this is a CORS preflight from an allowed origin."""
        asks = b"access-control-request-method" in self.headers
        return self.scope["method"] == "OPTIONS" and asks and bool(self.cors)

    def allow(self, origin: str | None) -> None:
        if origin is not None:
            self.cors = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin"),
                         (b"access-control-expose-headers", EXPOSED)]  # fmt: skip

    # ------------------------------------------------------------------ body and route

    async def serve(self) -> None:
        """Read the body and run the route."""
        try:
            if self.preflight:
                await self.answer_preflight()
                return
            if self.account is not None:  # other routes have no body: what is sent is not kept
                async with asyncio.timeout(self.config.body_timeout):
                    self.body = await self.read(self.account)
        except TimeoutError:
            late = f"the body was not complete after {self.config.body_timeout:g} seconds"
            await self.refuse(HttpError(408, late, code="body_timeout", headers={"connection": "close"}))
            return
        except HttpError as e:
            await self.refuse(e)
            return
        self.scope[DISCONNECT_FUTURE], self.scope[DISCONNECT_EVENT] = self.disconnected, self.disconnect_event
        watcher = asyncio.create_task(self.watch())
        try:
            await self.guard.app(self.scope, self.receive, self.send)
        except Exception as e:
            if self.status:
                raise  # the response has started: uvicorn closes the connection
            if (why := refusal(e)).status >= 500:
                logger.exception("request %s failed", self.id.decode())
            await self.refuse(why)
        finally:
            watcher.cancel()
            self.disconnected.cancel()

    async def read(self, account: Account) -> bytes:
        """The body. HttpError (413) if it is too large; 503 if all bodies together exceed the limit, and those of
        the account its share."""
        most, parts = self.config.max_body_bytes, []
        length = self.headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            raise self.large()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            self.size += len(part)
            self.state.held += len(part)
            account.held += len(part)
            if self.size > most:
                raise self.large()
            if self.state.held > BODIES * most and self.exceeds_share(account):
                raise HttpError(503, "request bodies in progress exceed the memory limit", hint="try again later",
                              code="bodies_too_large", retry_after=1)  # fmt: skip
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def exceeds_share(self, account: Account) -> bool:
        """Whether the account's bodies have more than an equal share of their memory."""
        sharing = sum(a.held > 0 for a in self.state.accounts.all)
        return account.held > BODIES * self.config.max_body_bytes // sharing

    def large(self) -> HttpError:
        """The 413 error. A method, so that no local variable of `read` holds it: frame and error would keep the
        received bytes alive in a reference cycle."""
        return HttpError(413, f"the body is larger than {self.config.max_body_bytes} bytes", code="body_too_large")

    async def receive(self) -> Message:
        """The route's `receive`: the whole body once, then `http.disconnect` when the client disconnects."""
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.wait([self.disconnected])
        return {"type": "http.disconnect"}

    async def watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.disconnect_event.set()
        if not self.disconnected.done():
            self.disconnected.set_result(None)

    # ------------------------------------------------------------------ response

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.id), *HEADERS, *self.cors]
            if self.account is not None:
                headers += self.account.headers()
            if self.state.draining and not any(name == b"connection" for name, _ in headers):
                headers.append((b"connection", b"close"))
            if self.path.startswith("/v1/messages"):
                headers.append((b"request-id", self.id))  # where Anthropic's clients look for it
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, why: HttpError) -> None:
        """Send an error response."""
        if why.status == CLIENT_GONE:
            self.status = CLIENT_GONE
            return
        headers = {"content-type": "application/json", **why.headers}
        await self.respond(why.status, headers, to_json(why.body(self.path)))

    async def answer_preflight(self) -> None:
        wanted = self.headers.get(b"access-control-request-headers", b"")
        await self.respond(204, {
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": wanted.decode("latin-1"), "access-control-max-age": "600",
        }, b"")  # fmt: skip

    async def respond(self, status: int, headers: dict[str, str], body: bytes) -> None:
        raw = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        if status != 204:
            raw.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    # ------------------------------------------------------------------ metrics, trace, log

    def end(self) -> None:
        """Record the finished request in metrics, trace and access log."""
        seconds = time.perf_counter() - self.began
        status = CLIENT_GONE if self.disconnected.done() and not self.disconnected.cancelled() else self.status
        route: str = getattr(self.scope.get("route"), "path_format", "")
        self.state.metrics.answered(route, self.scope["method"], status, seconds)
        if self.state.trace is not None:
            self.state.trace(Answered(self.scope, self.id.decode(), route, status, self.began, seconds))
        self.log(status, seconds)

    def log(self, status: int, seconds: float) -> None:
        """Write a line of the access log. It holds no prompt unless `log_prompts` is set. Probes are left out."""
        if self.path in PROBES:
            return
        client = self.scope.get("client")
        notes: dict[str, Any] = self.scope.get(NOTES, {})
        access.info("request", extra={"fields": {
            "id": self.id.decode(), "client": client[0] if client else None, "method": self.scope["method"],
            "path": self.path[:200], "status": status, "seconds": round(seconds, 4), "received": self.size,
            **({"key": self.account.name} if self.account is not None and self.account.name else {}),
            **notes,
        }})  # fmt: skip
