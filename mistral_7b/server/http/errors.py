"""Error responses: a status and {"error": {"message", "type", "param", "code"}}, in streams as well.

Under /v1/messages the types are Anthropic's. Its shape, {"type": "error", "error": {"type", "message"}}, is the
same object with one more field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import (
    AdapterError,
    EngineError,
    GenerationError,
    Mistral7BError,
    ProcessError,
    PromptTooLongError,
    QueueFullError,
    SamplingError,
    TokenizerError,
)

CLIENT_GONE = 499  # only for the log: the connection is closed
RETRY_AFTER = 1  # seconds; the queue has room again after a few steps
LONGEST = 500  # characters of a message, which may quote client input of any length
OPENAI_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip
ANTHROPIC_TYPES = {**OPENAI_TYPES, 413: "request_too_large", 500: "api_error", 503: "overloaded_error"}


class HttpError(Mistral7BError):
    """An error response, raised as an exception.

    `field` becomes `param` in the body; `code` is machine-readable; `retry_after` is in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        place: str | None = None,
        hint: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        most = LONGEST - sum(len(part) + 2 for part in (place, hint) if part)
        super().__init__(
            message if len(message) <= most else message[: most - 3] + "...", field=field, place=place, hint=hint
        )
        self.status, self.code = status, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON body for a route's path."""
        anthropic = path.startswith("/v1/messages")
        kind = (ANTHROPIC_TYPES if anthropic else OPENAI_TYPES).get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return {"type": "error", "error": error} if anthropic else {"error": error}


class ClientGoneError(HttpError):
    """The client has closed its connection."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client has disconnected")


def too_many_connections() -> HttpError:
    """The error response of a connection beyond the limit."""
    return HttpError(503, "too many connections are open", hint="try again later", retry_after=1,
                     code="too_many_connections", headers={"connection": "close"})  # fmt: skip


def refusal(error: Exception) -> HttpError:
    """The error response for an exception. Details of server faults go to the log only."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, QueueFullError):
        return HttpError.of(error, status=429, code="queue_full", retry_after=RETRY_AFTER)
    if isinstance(error, ProcessError):
        return HttpError.of(error, status=503, code="no_process", retry_after=RETRY_AFTER)
    if isinstance(error, PromptTooLongError):
        return HttpError.of(error, status=422, code="context_length_exceeded")
    if isinstance(error, AdapterError):
        return HttpError.of(error, status=404, field="model", code="model_not_found")
    if isinstance(error, (SamplingError, TokenizerError, GenerationError)):  # GrammarError is a SamplingError
        return HttpError.of(error, status=400)
    if isinstance(error, EngineError):
        return HttpError(500, "the engine failed on this request; see the server's log")
    return HttpError(500, "internal server error; see the server's log")


def invalid(errors: Sequence[Mapping[str, Any]]) -> HttpError:
    """The error response for pydantic's validation errors; it reports the first one, with its field."""
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    kind = first["type"]
    message = str(first["ctx"]["error"] if kind == "value_error" else first["msg"])
    if kind == "extra_forbidden":
        return HttpError(400, f"unknown field {param!r:.200}", field=param[:200], code="unknown_field")
    if kind == "missing":
        message = f"{param} is missing" if param else "the body is missing: send a JSON object"
        return HttpError(400, message, field=param or None, code="missing_field")
    return HttpError(400, f"{param[:200]}: {message}" if param else message, field=param[:200] or None)
