"""How a server is set up. Imports no torch, so that the command line can show it."""

from __future__ import annotations

import logging
import math
import os
import pathlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class ServerConfig:
    """What a server may use and whom it lets in. A value out of its range raises ConfigError naming the field.

    How many requests may wait is the engine's matter: EngineConfig.max_waiting.

    Attributes:
        host: address to listen at; the default is this machine alone
        port: 0 takes a free one
        api_keys: whoever has one of these may ask; none: everybody
        admin_keys: whoever has one of these may ask, and load and unload adapters; none: nobody may do that
        adapter_folder: folder in which adapters may be loaded, each a folder in it; none: no request loads any
        cors_origins: pages of other origins that may ask, such as "https://example.org"; "*": all
        allowed_hosts: names by which the server may be called; none: any, or only this machine's own where it
            listens at no other, so that no web page reaches it under a name of its own
        max_body_bytes: of a request
        max_prompt_tokens: of one prompt; None: as many as the context holds
        max_n: completions for one prompt
        max_prompts: prompts, or texts to be embedded, in one request
        max_concurrent: requests that are served or wait at once; one more is answered 429
        max_connections: sockets that are open at once
        body_timeout: seconds in which a request's head, and then its body, must have come
        idle_timeout: seconds for which a reader may take nothing of what lies ready for it
        request_timeout: seconds in which an answer must be complete
        keep_alive: seconds for which a connection waits for its next request
        drain_timeout: seconds that running answers get to end when the server is told to stop
        log_prompts: write prompts into the log
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    adapter_folder: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = MIB
    max_prompt_tokens: int | None = None
    max_n: int = 16
    max_prompts: int = 128
    max_concurrent: int = 512
    max_connections: int = 1024
    body_timeout: float = 30.0
    idle_timeout: float = 30.0
    request_timeout: float = 600.0
    keep_alive: float = 30.0
    drain_timeout: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low = 0 if field.name in ("port", "drain_timeout") else 1
            if field.type in ("int", "int | None") and value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < low:
                    raise ConfigError(
                        f"{field.name} must be a whole number of at least {low}, not {value!r}", field=field.name
                    )
            elif field.type == "float" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ConfigError(f"{field.name} must be a number of seconds, not {value!r}", field=field.name)
        if self.port > 65535:
            raise ConfigError(f"port must be at most 65535, not {self.port}", field="port")
        for name in ("api_keys", "admin_keys"):
            if not all(isinstance(k, str) and k.isascii() and k.isprintable() and k.strip() == k and k
                       for k in getattr(self, name)):  # fmt: skip
                raise ConfigError(
                    f"{name}: a key is a text of printable ASCII characters without blanks around it",
                    field=name,
                )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def traces_wanted(environ: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's variables say where traces go. ConfigError where they ask for another protocol."""
    off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    kinds = environ.get("OTEL_TRACES_EXPORTER", "") or "otlp"
    place = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if off or "otlp" not in kinds or not place:
        return False
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        raise ConfigError(
            f"traces are sent as http/protobuf, not as {protocol}",
            field="OTEL_EXPORTER_OTLP_PROTOCOL",
            hint="set it, and the endpoint's port for HTTP, which is 4318 for most collectors",
        )
    return True


def read_keys(given: tuple[str, ...], file: str, variable: str) -> tuple[str, ...]:
    """Keys as they are given, and those of a file (one a line, # begins a comment) and a variable.

    OSError for a file that cannot be read; ConfigError for one that holds no key: it was meant to close a door.
    """
    keys = list(given)
    if file:
        keys += _keys_in(pathlib.Path(file))
    if value := os.environ.get(variable, "").strip():
        keys.append(value)
    return tuple(dict.fromkeys(keys))


def _keys_in(file: pathlib.Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError("is no text", place=file, hint="write a key on each line") from e
    keys = [key for line in text.splitlines() if (key := line.split("#")[0].strip())]
    if not keys:
        raise ConfigError("holds no key", place=file, hint="write one on each line")
    if os.name == "posix" and file.stat().st_mode & stat.S_IROTH:
        logging.getLogger("mistral_7b.server").warning("every user of this machine may read %s: chmod 600", file)
    return keys
