"""Access control by headers: API keys, host names, origins."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from ..config import ServerConfig
from ..keys import ApiKey
from .errors import HttpError
from .limits import Account, account_of

Headers = Mapping[bytes, bytes]
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Accounts:
    """The accounts of a server's keys. Looking one up takes the same time whichever key is given."""

    def __init__(self, config: ServerConfig) -> None:
        self.open = None if config.api_keys else account_of(None, config)
        self._of: dict[bytes, Account] = {}
        for admin, keys in ((False, config.api_keys), (True, config.admin_keys)):
            for key in keys:
                key = key if isinstance(key, ApiKey) else ApiKey(key)
                self._of[hashlib.sha256(key.key.encode()).digest()] = account_of(key, config, admin)

    def find(self, key: bytes) -> Account | None:
        """The account of a key; without api_keys, the open one for any other."""
        digest, found = hashlib.sha256(key).digest(), None
        for known, account in self._of.items():
            if hmac.compare_digest(digest, known):
                found = account
        return found or self.open

    @property
    def all(self) -> list[Account]:
        """Every account."""
        return [*self._of.values(), *([self.open] if self.open else [])]


def key_of(headers: Headers) -> bytes:
    """The key of a request: a bearer token, a basic-auth password, or `x-api-key`; b"" if there is none."""
    kind, _, value = headers.get(b"authorization", b"").strip().partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return headers.get(b"x-api-key", b"")


class AccessControl:
    """Checks a request's key, host and origin against the configuration."""

    def __init__(self, config: ServerConfig, accounts: Accounts) -> None:
        self.config, self.accounts = config, accounts

    def check_key(self, headers: Headers, page: bool) -> Account:
        """The account of a request's key. HttpError (401) if a valid key is required and missing.

        `page`: a browser loads a page; the 401 then asks for basic auth, with the key as the password.
        """
        key = key_of(headers)
        account = self.accounts.find(key)
        if account is None:
            how = 'Basic realm="mistral-7b: the key is the password"' if page else 'Bearer realm="mistral-7b"'
            what = "the API key is invalid" if key else "an API key is required"
            raise HttpError(401, what, hint="send one as `Authorization: Bearer KEY`", code="invalid_api_key",
                          headers={"www-authenticate": how})  # fmt: skip
        return account

    def check_host(self, headers: Headers) -> None:
        """HttpError (403) for a `Host` that is not allowed, which prevents DNS rebinding."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        allowed = self.config.allowed_hosts or (OWN_NAMES if self.config.loopback else ())
        if host and allowed and name not in allowed and host not in allowed:
            raise HttpError(403, f"the host {name!r:.100} is not allowed", hint="allow it with --allowed-host",
                          code="host_not_allowed")  # fmt: skip

    def origin_of(self, headers: Headers) -> str | None:
        """The origin to allow in CORS headers; None for same-origin requests. HttpError (403) if not allowed."""
        origin = headers.get(b"origin")
        if origin is None:
            return None
        text, host = origin.decode("latin-1"), headers.get(b"host", b"").decode("latin-1").lower()
        if text in self.config.cors_origins or "*" in self.config.cors_origins:
            return text
        if host and _authority(text) == host:
            return None
        raise HttpError(403, f"the origin {text!r:.100} is not allowed", code="origin_not_allowed",
                      hint="allow it with --cors-origin")  # fmt: skip


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
