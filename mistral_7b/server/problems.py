"""Every error, as a status and {"error": {"message", "type", "param", "code"}}; in streams too.

Under /v1/messages the names are Anthropic's, which asks for {"type": "error", "error": {"type", "message"}}: the
same object with a field more serves both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import (
    AdapterError,
    EngineError,
    GenerationError,
    GrammarError,
    Mistral7BError,
    ProcessError,
    PromptTooLongError,
    QueueFullError,
    SamplingError,
    TokenizerError,
)

CLIENT_GONE = 499  # for the log alone: nobody is there to read it
RETRY_AFTER = 1  # seconds; a place in the queue is free after a step or a few
LONGEST = 500  # characters of a message: it may quote what came, whose length the client chose
OPENAI_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip
ANTHROPIC_TYPES = {**OPENAI_TYPES, 413: "request_too_large", 500: "api_error", 503: "overloaded_error"}


class Refusal(Mistral7BError):  # noqa: N818  an answer, more than an accident
    """A request that is not served, with all that is said about it.

    `param` names the field at fault; `code` is for programs; `retry_after` in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message if len(message) <= LONGEST else message[: LONGEST - 3] + "...")
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    def body(self, path: str = "") -> dict[str, Any]:
        """What is answered on this path."""
        anthropic = path.startswith("/v1/messages")
        kind = (ANTHROPIC_TYPES if anthropic else OPENAI_TYPES).get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"type": "error", "error": error} if anthropic else {"error": error}


class ClientGoneError(Refusal):
    """Whoever asked has hung up."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client has gone")


def refusal(error: Exception) -> Refusal:
    """What an error means to whoever asked. What it was not meant for is told to the log alone."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFullError):
        return Refusal(429, str(error), code="queue_full", retry_after=RETRY_AFTER)
    if isinstance(error, ProcessError):
        return Refusal(503, str(error), code="no_process", retry_after=RETRY_AFTER)
    if isinstance(error, PromptTooLongError):
        return Refusal(422, str(error), code="context_length_exceeded")
    if isinstance(error, AdapterError):
        return Refusal(404, str(error), param="model", code="model_not_found")
    if isinstance(error, (GrammarError, SamplingError, TokenizerError, GenerationError)):
        return Refusal(400, str(error), param=_field_of(str(error)))
    if isinstance(error, EngineError):
        return Refusal(500, "the model could not compute this request; the server's log says why")
    return Refusal(500, "something went wrong in the server; its log says what")


def invalid(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """What pydantic found wrong with a body: the first thing, with its field."""
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    kind, message = first["type"], str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return Refusal(400, f"unknown field {param!r:.200}", param=param[:200], code="unknown_field")
    if kind == "missing":
        message = f"{param} is missing" if param else "the body is missing: send a JSON object"
        return Refusal(400, message, param=param or None, code="missing_field")
    return Refusal(400, f"{param[:200]}: {message}" if param else message, param=param[:200] or None)


FIELDS = (
    "messages", "tools", "tool_choice", "structured_outputs", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop_token_ids", "stop",
    "max_tokens", "min_tokens", "seed", "n", "prompt",
)  # fmt: skip


def _field_of(message: str) -> str | None:
    """The field with whose name a message begins, as the package's messages about fields do."""
    head = message.removeprefix("the conversation: ")
    found = next((name for name in FIELDS if head.startswith(name)), None)
    if found is None:
        return None
    rest = head[len(found) :].split(" ")[0].rstrip(":")
    return found + rest if rest.startswith(("[", ".")) else found
