"""Limits per key: requests and tokens a minute, concurrent requests.

    limit        counted                                            refused
    requests     a POST, when it is admitted                        when less than one is left
    tokens       prompt and completion, when a request has ended    when none is left: a long answer may overdraw
    concurrent   requests in progress                               when so many are in progress

Requests and tokens are token buckets: they hold a minute's worth at most and fill continuously. Responses carry
OpenAI's x-ratelimit-* headers. Without keys, all requests belong to one account.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..config import ServerConfig
from ..keys import ApiKey
from .errors import HttpError

Headers = list[tuple[bytes, bytes]]


class Bucket:
    """A token bucket: `limit` a minute, and `limit` at most."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self._left, self._at = float(limit), clock()

    @property
    def left(self) -> float:
        """What is left now; below 0 if overdrawn."""
        now = self.clock()
        self._left = min(self.limit, self._left + (now - self._at) * self.limit / 60)
        self._at = now
        return self._left

    def take(self, n: float) -> None:
        """Take n, though less may be left."""
        self._left = self.left - n

    def seconds_until(self, n: float) -> float:
        """Seconds until n are left, if none is taken."""
        return max(0.0, n - self.left) * 60 / self.limit


@dataclass
class Account:
    """The limits of one key and what it uses of them. For the event loop's thread only."""

    name: str = ""
    admin: bool = False
    priority: bool = False
    requests: Bucket | None = None
    tokens: Bucket | None = None
    max_concurrent: int | None = None
    active: int = 0  # admitted HTTP requests
    held: int = 0  # bytes of their bodies
    refused: dict[str, int] = field(default_factory=dict)  # by limit

    def admit(self, counted: bool) -> None:
        """HttpError (429) if a limit is reached; else, if `counted`, one request less is left."""
        if self.max_concurrent is not None and self.active >= self.max_concurrent:
            raise self._limited("concurrent", f"{self.active} requests of this key are in progress", 1)
        if not counted:
            return
        if self.tokens is not None and self.tokens.left <= 0:
            what = f"the limit of {self.tokens.limit} tokens a minute is reached"
            raise self._limited("tokens", what, self.tokens.seconds_until(1))
        if self.requests is not None:
            if self.requests.left < 1:
                what = f"the limit of {self.requests.limit} requests a minute is reached"
                raise self._limited("requests", what, self.requests.seconds_until(1))
            self.requests.take(1)

    def spend(self, tokens: int) -> None:
        """Count the tokens of an ended request."""
        if self.tokens is not None:
            self.tokens.take(tokens)

    def count_refusal(self, limit: str) -> None:
        """Count a request that a limit has refused."""
        self.refused[limit] = self.refused.get(limit, 0) + 1

    def headers(self) -> Headers:
        """OpenAI's headers: limit, what is left, and the time until the bucket is full again."""
        out: Headers = []
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                values = (bucket.limit, max(0, int(bucket.left)), f"{bucket.seconds_until(bucket.limit):.3f}s")
                for name, value in zip(("limit", "remaining", "reset"), values, strict=True):
                    out.append((f"x-ratelimit-{name}-{kind}".encode(), str(value).encode()))
        return out

    def _limited(self, kind: str, what: str, seconds: float) -> HttpError:
        self.count_refusal(kind)
        retry = max(1, math.ceil(seconds))
        return HttpError(429, what, hint=f"retry in {retry} s", code="rate_limit_exceeded", retry_after=retry)


def account_of(key: ApiKey | None, config: ServerConfig, admin: bool = False) -> Account:
    """The account of a key, with the server's limits where it has none of its own.

    None: the account of all requests of a server without keys, which may set `priority`.
    """
    own = key or ApiKey("none", priority=True)
    requests = own.requests_per_minute or config.requests_per_minute
    tokens = own.tokens_per_minute or config.tokens_per_minute
    return Account(
        key.label if key else "", admin, admin or own.priority, Bucket(requests) if requests else None,
        Bucket(tokens) if tokens else None, own.max_concurrent or config.max_concurrent_per_key,
    )  # fmt: skip
