"""Server settings. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..errors import ConfigError
from .keys import ApiKey

MIB = 1 << 20


@dataclass(frozen=True)
class ServerConfig:
    """Address, access control, limits and timeouts. ConfigError names a field that is out of range.

    The length of the queue is an engine setting: EngineConfig.max_waiting.

    Attributes:
        host: address to bind; the default is the loopback interface
        port: TCP port; 0 picks a free one
        api_keys: keys that allow requests, with limits of their own where they are ApiKey objects; empty: no key
            is needed
        admin_keys: keys that also allow recording, steering, and loading and unloading adapters; empty: none may
        adapter_folder: folder whose subfolders can be loaded as adapters; None: loading is disabled
        cors_origins: other origins whose pages may send requests, such as "https://example.org"; "*": any
        allowed_hosts: accepted `Host` names; empty: any, or, on a loopback address, only the loopback names,
            which prevents DNS rebinding
        max_body_bytes: size of a request body
        max_prompt_tokens: tokens of one prompt; None: the model's context length
        max_n: completions of one prompt
        max_prompts: prompts, or inputs to embed, in one request
        max_stored: responses of /v1/responses kept in memory for `previous_response_id`
        max_stored_bytes: size of all of them
        max_request_tokens: tokens of all completions that one request asks for
        max_concurrent: requests running or queued at the same time; beyond that, 429 for keys that have an equal
            share of them
        max_concurrent_per_key, requests_per_minute, tokens_per_minute: limits of each key, or of all requests
            together if there are no keys; None: no limit. Beyond them, 429
        max_connections: open connections; beyond that, the one that has been idle longest is closed
        body_timeout: seconds to receive a request's head, and again its body
        idle_timeout: seconds without progress after which a stalled reader is disconnected
        request_timeout: seconds to complete a response
        keep_alive: seconds that an idle connection stays open
        drain_grace: seconds in which requests are still accepted after SIGTERM or SIGHUP, while /health/ready
            already answers 503, so that load balancers stop sending them
        drain_timeout: seconds that running requests have to finish at shutdown
        log_prompts: include prompts in the access log
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str | ApiKey, ...] = ()
    admin_keys: tuple[str | ApiKey, ...] = ()
    adapter_folder: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = MIB
    max_prompt_tokens: int | None = None
    max_n: int = 16
    max_prompts: int = 128
    max_request_tokens: int = 1 << 20
    max_stored: int = 1024
    max_stored_bytes: int = 64 * MIB
    max_concurrent: int = 512
    max_concurrent_per_key: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_connections: int = 1024
    body_timeout: float = 30.0
    idle_timeout: float = 30.0
    request_timeout: float = 600.0
    keep_alive: float = 30.0
    drain_grace: float = 2.0
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
            for key in getattr(self, name):
                try:
                    if not isinstance(key, ApiKey):
                        ApiKey(key)
                except ConfigError as e:
                    raise ConfigError(f"{name}: {e.message}", field=name) from None

        names = [key.name for key in (*self.api_keys, *self.admin_keys) if isinstance(key, ApiKey) and key.name]
        if len(set(names)) < len(names):
            raise ConfigError("two keys have the same name", field="api_keys", hint="give each its own name")

    @property
    def loopback(self) -> bool:
        """Whether `host` is a loopback address."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def traces_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the OTEL_* variables enable traces. ConfigError for a protocol other than http/protobuf."""
    off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    kinds = environ.get("OTEL_TRACES_EXPORTER", "") or "otlp"
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if off or "otlp" not in kinds or not endpoint:
        return False
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        raise ConfigError(
            f"traces are sent as http/protobuf, not as {protocol}",
            field="OTEL_EXPORTER_OTLP_PROTOCOL",
            hint="set it, and the endpoint's port for HTTP, which is 4318 for most collectors",
        )
    return True
