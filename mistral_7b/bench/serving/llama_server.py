"""llama.cpp's server under load: start, send requests over HTTP, stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import IO, Any

from ...errors import BenchmarkError
from ...machine import cores, features, peak_memory
from ..run import PEER_VARIABLES
from .client import Served, Trace, drive, warm_up
from .traffic import ServingJob

HOST = "127.0.0.1"
START = 600.0  # time limit in seconds for loading the model
SLOT = 256  # llama.cpp rounds the context of a sequence up to a multiple of this


def serve(job: ServingJob, server: str) -> Served:
    """Start the server on the job's file, and send it the job's traffic."""
    traffic, threads = job.traffic, job.threads or cores()
    slots = min(job.max_sequences, traffic.requests)
    context = -(-(traffic.prompt[1] + traffic.output[1]) // SLOT) * SLOT
    flags = ["--parallel", slots, "-c", slots * context, "-t", threads, "-tb", threads, "--cache-ram", 0]
    arrivals = traffic.draw(job.args["vocab_size"])
    with running(server, str(job.source), flags) as (port, process, build_info):
        target = Llama(port)

        async def send() -> tuple[float, list[Trace]]:
            alone = await warm_up(target, arrivals, job.args["vocab_size"])
            target.cached = 0
            return alone, await drive(target, arrivals)

        alone, traces = asyncio.run(send())
        peak = peak_memory(process.pid)
    path = f"{features(build_info)}; {' '.join(map(str, flags))}"
    return Served(traces, alone, threads, peak, path, version(server), target.cached)


@contextlib.contextmanager
def running(server: str, file: str, flags: list[Any]) -> Iterator[tuple[int, subprocess.Popen, str]]:
    """Yield port, process and build information of a ready server. BenchmarkError on failure."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [server, "-m", file, "--host", HOST, "--port", str(port), "-lv", "4", *map(str, flags)]
    with tempfile.TemporaryFile("w+") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**PEER_VARIABLES, **os.environ}
            )
        except OSError as error:
            raise BenchmarkError(
                f"--llama-server {server} cannot be run: {error.strerror}", field="--llama-server"
            ) from error
        try:
            until = time.monotonic() + START
            while not asyncio.run(healthy(port)):
                if process.poll() is not None or time.monotonic() > until:
                    output = lines_of(log) or ["no output"]
                    raise BenchmarkError(f"{pathlib.Path(server).name} did not start: {output[-1]}")
                time.sleep(0.05)
            yield port, process, next((line for line in lines_of(log) if "system_info" in line), "")
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def lines_of(log: IO[str]) -> list[str]:
    """Return the lines written so far by a process, without moving its file position."""
    log.flush()
    return os.pread(log.fileno(), 1 << 24, 0).decode(errors="replace").strip().splitlines()


class Llama:
    """A server's `/v1/completions` as a Target: one streaming connection per request."""

    def __init__(self, port: int) -> None:
        self.port, self.cached = port, 0

    async def stream(self, prompt: list[int], output: int) -> AsyncIterator[int]:
        body = {
            "prompt": prompt, "max_tokens": output, "stream": True, "ignore_eos": True,
            "temperature": 0, "top_k": 1, "stream_options": {"include_usage": True},
        }  # fmt: skip
        streamed, usage = 0, None
        async with contextlib.aclosing(events(self.port, "/v1/completions", body)) as stream:
            async for event in stream:
                if "error" in event:
                    raise BenchmarkError(event["error"].get("message", "the server failed"))
                usage = event.get("usage") or usage
                if event["choices"] and event["choices"][0]["text"]:
                    streamed += 1
                    yield 1
        if usage is not None:
            self.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            if usage["completion_tokens"] > streamed:  # tokens without text send no event
                yield usage["completion_tokens"] - streamed


async def events(port: int, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """Yield the events of a streamed response. BenchmarkError for an error response."""
    async with contextlib.aclosing(exchange(port, "POST", path, json.dumps(body).encode())) as parts:
        try:
            status, buffered = await anext(parts), b""
            async for part in parts:
                buffered += part
                while status == b"200" and b"\n" in buffered:
                    line, buffered = buffered.split(b"\n", 1)
                    if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                        yield json.loads(line[6:])
        except (OSError, EOFError) as error:
            raise BenchmarkError(f"the connection broke: {error}") from error
        if status != b"200":
            raise BenchmarkError(
                f"the server returned {status.decode()}: {buffered.decode(errors='replace')[:200]}"
            )


async def healthy(port: int) -> bool:
    """Return whether the server has loaded its model."""
    try:
        async with contextlib.aclosing(exchange(port, "GET", "/health")) as parts:
            return await anext(parts) == b"200"
    except (OSError, EOFError):
        return False


async def exchange(port: int, method: str, path: str, body: bytes = b"") -> AsyncGenerator[bytes]:
    """Send an HTTP/1.1 request; yield the status, then the body in parts. EOFError if cut off."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        facts = ("Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}")
        lines = (f"{method} {path} HTTP/1.1", f"Host: {HOST}", *facts, "", "")
        writer.write("\r\n".join(lines).encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        yield head.split(None, 2)[1]
        if b"transfer-encoding: chunked" not in head.lower():
            yield await reader.read()
            return
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
    finally:
        writer.close()


def version(server: str) -> dict[str, str]:
    """Return the version of the server."""
    try:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return {}
    found = re.search(r"^version: (.+)$", said.stdout + said.stderr, re.MULTILINE)
    return {"llama-server": found[1]} if found else {}
