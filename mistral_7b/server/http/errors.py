"""Error responses: a status and {"error": {"message", "type", "param", "code"}}, in streams as well.

Under /v1/messages the types are Anthropic's. Its shape, {"type": "error", "error": {"type", "message"}}, is the
same object with one more field. Under /api the body is Ollama's, {"error": message}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import (
    AdapterError,
    EngineError,
    GenerationError,
    InterpretError,
    Mistral7BError,
    ProcessError,
    PromptTooLongError,
    QueueFullError,
    SamplingError,
    TokenizerError,
)

ANTHROPIC = "/v1/messages"  # begins the paths of Anthropic's API
OLLAMA = "/api/"  # and of Ollama's
TOO_LONG = "context_length_exceeded"
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
        if path.startswith(OLLAMA):
            return {"error": str(self)}
        anthropic = path.startswith(ANTHROPIC)
        kind = (ANTHROPIC_TYPES if anthropic else OPENAI_TYPES).get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return {"type": "error", "error": error} if anthropic else {"error": error}


class ContextLengthError(HttpError):
    """A prompt that exceeds the context (400), in the words of each API, by which its clients recognize it.

    `limit`, `prompt` and `completion` are tokens, as in PromptTooLongError; `field` held the prompt.
    """

    def __init__(self, limit: int, prompt: int, completion: int | None, field: str) -> None:
        self.limit, self.prompt = limit, prompt
        requested = prompt + (completion or 0)
        most = f"This model's maximum context length is {limit} tokens"
        if field != "messages":
            told = (
                f"{most}, however you requested {requested} tokens ({prompt} in your prompt; {completion or 0} "
                "for the completion). Please reduce your prompt; or completion length."
            )
        elif completion is None:
            told = f"{most}. However, your messages resulted in {prompt} tokens. Please reduce the length of the "
            told += "messages."
        else:
            told = (
                f"{most}. However, you requested {requested} tokens ({prompt} in the messages, {completion} in "
                "the completion). Please reduce the length of the messages or completion."
            )
        # The code is in the text too: OpenAI's client shows its users the message alone, and LangChain reads it.
        super().__init__(400, f"{told} ({TOO_LONG})", field=field, code=TOO_LONG)

    def body(self, path: str = "") -> dict[str, Any]:
        if not path.startswith(ANTHROPIC):
            return super().body(path)
        told = f"prompt is too long: {self.prompt} tokens > {self.limit} maximum"
        return HttpError(400, told, field=self.field, code=self.code).body(path)


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
        if error.limit is None or error.prompt is None:
            return HttpError.of(error, status=400, code=TOO_LONG)
        return ContextLengthError(error.limit, error.prompt, error.completion, error.field or "prompt")
    if isinstance(error, AdapterError):
        return HttpError.of(error, status=404, field="model", code="model_not_found")
    if isinstance(error, (SamplingError, TokenizerError, GenerationError, InterpretError)):  # and GrammarError
        return HttpError.of(error, status=400, place=None)  # the model's files are no client's business
    if isinstance(error, EngineError):
        return HttpError(500, "the engine failed on this request; see the server's log")
    return HttpError(500, "internal server error; see the server's log")
