"""Structured logging: JSON lines on stderr, written by a thread."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from typing import TextIO


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object; `extra={"fields": ...}` adds members to it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(),
            "event": record.getMessage(), **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class LogThread(logging.Handler):
    """Writes records on a thread of its own, so that a stream that is not read blocks no other.

    At most `size` lines wait; further ones are dropped and counted, and a line tells how many. `close` waits for
    them, but at most `LAST` seconds.
    """

    LAST = 1.0

    def __init__(self, stream: TextIO, size: int = 10_000) -> None:
        super().__init__()
        self.stream, self.dropped = stream, 0
        self._lines: queue.Queue[logging.LogRecord | str | None] = queue.Queue(size)
        self._told = 0  # dropped lines that were reported
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record, or drop it."""
        self.write(record)

    def write(self, line: logging.LogRecord | str) -> None:
        """Queue a record or a text, or drop it."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, as far as it is read in time."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=self.LAST)
        self._thread.join(self.LAST)
        super().close()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                text = line if isinstance(line, str) else self.format(line)
            except Exception as e:  # such as arguments that do not fit the message
                text = json.dumps({"level": "error", "event": f"a log line could not be formatted: {e!r:.200}"})
            if (lost := self.dropped - self._told) > 0:
                self._told += lost
                text += "\n" + json.dumps({"level": "warning", "event": "log lines were dropped", "lines": lost})
            try:
                self.stream.write(text + "\n")
                self.stream.flush()
            except (OSError, ValueError):  # closed at the other end, or here
                self.dropped += 1


def log_to_stderr(access: bool = True) -> LogThread:
    """Log this package's records, uvicorn's errors and OpenTelemetry's warnings to stderr.

    `access`: also one line per request.
    """
    handler = LogThread(sys.stderr)
    handler.setFormatter(JsonLines())
    ours = logging.getLogger("mistral_7b")
    ours.setLevel(logging.INFO)
    for name in ("mistral_7b", "uvicorn.error", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("mistral_7b.access").disabled = not access
    return handler
