"""Shared by the server's measurements: a server in a separate process, and lightweight clients.

The clients run on the same cores as the server. They therefore speak HTTP over plain sockets and parse only the
head, the end and the number of events of a response.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_7b import machine

END = b"\r\n0\r\n\r\n"  # of a body in chunks; JSON has no bare line ends


class Server:
    """`mistral-7b serve` in a separate process with its log in a file; a context manager that kills it.

    `key`: an API key for the requests of `get`.
    """

    def __init__(self, *options: str, key: str = "none") -> None:
        self.key = key
        self.log = tempfile.NamedTemporaryFile("w+", prefix="serve", suffix=".log")  # noqa: SIM115
        began = time.perf_counter()
        command = [sys.executable, "-m", "mistral_7b", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=self.log)
        self.pid = self.process.pid
        while not (found := re.search(r"at http://127\.0\.0\.1:(\d+) ", self.log_text())):
            self._alive(began)
        self.port = int(found[1])
        while not self._ready():
            self._alive(began)
        self.seconds = time.perf_counter() - began  # until it was ready

    def _alive(self, began: float) -> None:
        if self.process.poll() is not None or time.perf_counter() - began > 120:
            raise RuntimeError(f"the server did not start: {self.log_text()[-2000:]}")
        time.sleep(0.01)

    def _ready(self) -> bool:
        try:
            return self.get("/health/ready")[0] == 200
        except OSError:
            return False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self, how: int = signal.SIGKILL) -> None:
        """End the process with this signal."""
        self.process.send_signal(how)
        self.process.wait(60)

    def log_text(self) -> str:
        """Return the log so far."""
        return Path(self.log.name).read_text(errors="replace")

    def mishaps(self) -> list[str]:
        """Return the lines of the log that report errors of the server."""
        return [line for line in self.log_text().splitlines() if '"level": "error"' in line or "Traceback" in line]

    def get(self, path: str) -> tuple[int, bytes]:
        """Return status and body."""
        headers = {"authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()

    @property
    def rss(self) -> float:
        """Resident memory in MB."""
        (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(kilobytes) / 1024

    @property
    def sockets(self) -> int:
        """Number of open sockets."""
        folder = f"/proc/{self.pid}/fd"
        count = 0
        for name in os.listdir(folder):
            try:
                count += os.readlink(f"{folder}/{name}").startswith("socket:")
            except FileNotFoundError:
                continue
        return count

    def metrics(self) -> dict[str, float]:
        """Read /metrics by name and labels, without the package's prefix."""
        return read_metrics(self.get("/metrics")[1])

    def idle(self, seconds: float = 60) -> dict[str, float]:
        """Return the metrics once no request runs and no page is held, or after `seconds`."""
        end = time.perf_counter() + seconds
        while True:
            now = self.metrics()
            busy = now["requests_running"] + now["requests_waiting"] + now["kv_cache_pages_held"]
            if not busy or time.perf_counter() > end:
                return now
            time.sleep(0.05)


def read_metrics(text: bytes) -> dict[str, float]:
    """Parse Prometheus' text format by name and labels."""
    lines = (line.rpartition(" ") for line in text.decode().splitlines() if line and line[0] != "#")
    return {name.removeprefix("mistral_7b_"): float(value) for name, _, value in lines}


@dataclass
class Answer:
    """The response to a request. `status` 0: none was received; `whole`: it is complete."""

    status: int = 0
    whole: bool = False
    events: int = 0
    failed: bool = False  # an error event in the stream
    body: bytes = b""  # the first 64 kB


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer = Answer()
        self.done: asyncio.Future[Answer] | None = None
        self.leave_after: int | None = None  # events after which the client disconnects
        self._head = b""
        self._left: int | None = None

    @classmethod
    async def connect(cls, port: int) -> Client:
        """Connect to a server on this machine."""
        _, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return client

    def ask(self, data: bytes, leave_after: int | None = None) -> asyncio.Future[Answer]:
        """Send a request. The future is done when the response is complete or the connection is closed."""
        assert self.transport is not None
        self.answer, self.leave_after, self._head, self._left = Answer(), leave_after, b"", None
        self.done = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            self._end()
        else:
            self.transport.write(data)
        return self.done

    def leave(self) -> None:
        """Disconnect."""
        if self.transport is not None:
            self.transport.abort()

    @property
    def closed(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if not answer.status:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            answer.status = int(head[9:12])
            length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
            self._left = int(length[1]) if length else None
            data = data if length else b"\r\n" + data
        answer.events += data.count(b"data: {")
        answer.failed |= b'data: {"error"' in data or b"event: error" in data
        if len(answer.body) < 1 << 16:
            answer.body += data
        if self._left is not None:
            self._left -= len(data)
            answer.whole = self._left <= 0
        else:
            self._head = (self._head + data)[-len(END) :]
            answer.whole = self._head == END
        if answer.whole:
            self._end()
        elif self.leave_after is not None and answer.events >= self.leave_after:
            self.leave()

    def _end(self) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(self.answer)


def post(path: str, body: Any, headers: Sequence[str] = ()) -> bytes:
    """Return a POST request as bytes; a body of bytes is not encoded."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = "".join(f"{line}\r\n" for line in headers)
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{lines}"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of the least-squares line."""
    t, v = sum(times) / len(times), sum(values) / len(values)
    above = sum((a - t) * (b - v) for a, b in zip(times, values, strict=True))
    return above / max(sum((a - t) ** 2 for a in times), 1e-12)


def place() -> dict[str, Any]:
    """Return date, commit, CPU and load of the measurement."""
    return {
        "date": datetime.date.today().isoformat(), "commit": machine.commit(), "cpu": machine.cpu_name(),
        "cores": machine.cores(), "load": os.getloadavg()[0],
    }  # fmt: skip
