"""Who may come in: keys, and the places from which web pages may ask."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from .config import ServerConfig
from .problems import Refusal

Headers = Mapping[bytes, bytes]
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Keys:
    """Keys, compared in a time that says nothing about them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, key: bytes) -> bool:
        digest, found = hashlib.sha256(key).digest(), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def key_of(headers: Headers) -> bytes:
    """The key that a request brings: as a bearer, in Anthropic's header, or as a browser's password."""
    kind, _, value = headers.get(b"authorization", b"").strip().partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return headers.get(b"x-api-key", b"")


class Door:
    """Lets a request in or refuses it, by what its headers say."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._admins, self._users = Keys(config.admin_keys), Keys(config.api_keys)

    def check_key(self, headers: Headers, page: bool) -> bool:
        """Whether it has an admin key. Refusal (401) without a key, where one is needed.

        `page`: a person opens the page, and their browser is told to ask for the key, as a password.
        """
        key = key_of(headers)
        admin, user = key in self._admins, key in self._users
        if self._users and not (admin or user):
            how = 'Basic realm="mistral-7b: the key is the password"' if page else 'Bearer realm="mistral-7b"'
            what = "this key is not known" if key else "a key is needed"
            raise Refusal(401, what, hint="send one as `Authorization: Bearer KEY`", code="invalid_api_key",
                          headers={"www-authenticate": how})  # fmt: skip
        return admin

    def check_host(self, headers: Headers) -> None:
        """Refusal (403) where the server is called by a name that is not its own."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        allowed = self.config.allowed_hosts or (OWN_NAMES if self.config.loopback else ())
        if host and allowed and name not in allowed and host not in allowed:
            raise Refusal(403, f"{name!r:.100} is no name of this server", hint="name it with --allowed-host",
                          code="host_not_allowed")  # fmt: skip

    def origin_of(self, headers: Headers) -> str | None:
        """The origin of the page that asks, where it is to be told that it may. Refusal (403) if it may not."""
        origin = headers.get(b"origin")
        if origin is None:
            return None
        text, host = origin.decode("latin-1"), headers.get(b"host", b"").decode("latin-1").lower()
        if text in self.config.cors_origins or "*" in self.config.cors_origins:
            return text
        if host and _place(text) == host:
            return None
        raise Refusal(403, f"requests from pages of {text!r:.100} are not allowed", code="origin_not_allowed",
                      hint="name the origin with --cors-origin")  # fmt: skip


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
