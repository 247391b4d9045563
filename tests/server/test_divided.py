"""`serve --tensor-parallel 2`: the answers of one process, and the end of one of the two."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from tiny import tiny_args

from mistral_7b.engine.followers import lead
from mistral_7b.engine.watching import watching_of
from mistral_7b.errors import DistributedError, InterpretError

ASKED = (
    {"prompt": "import os\n", "n": 2, "logprobs": 2, "temperature": 1, "frequency_penalty": 0.5},
    {"prompt": "def add(", "structured_outputs": {"regex": "[a-z]{3}, [a-z]{4}\\):"}},
)


def answer(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps({"max_tokens": 40, "seed": 3, **body}).encode()
    asked = urllib.request.Request(f"{url}/v1/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as got:
        return json.load(got)["choices"]


def followers_of(pid: int) -> list[int]:
    """The children of a process that follow it."""
    found = []
    for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"followers" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def exists(pid: int) -> bool:
    return pathlib.Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, Any, pathlib.Path]]]:
    """The URLs, processes and logs of servers with one process and with two, which start together."""
    found = []
    for size in (1, 2):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        log = tmp_path_factory.mktemp("log") / f"{size}"
        command = [
            sys.executable, "-m", "mistral_7b", "serve", "demo", "--quantization", "int8", "--threads", "1",
            "--port", str(port), "--kv-cache-bytes", "100000000", "--tensor-parallel", str(size),
        ]  # fmt: skip
        with log.open("wb") as out:
            found.append((f"http://127.0.0.1:{port}", subprocess.Popen(command, stdout=out, stderr=out), log))
    try:
        end = time.monotonic() + 120
        for url, process, log in found:
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health/ready"):
                    break
                time.sleep(0.1)
        yield found
    finally:
        for _, process, _ in found:
            process.kill()
            process.wait()


def test_answers_have_the_bits_of_one_process_until_a_rank_ends(servers: list[Any]) -> None:
    (one, *_), (two, process, log) = servers
    for body in ASKED:
        assert answer(two, body) == answer(one, body)
    (follower,) = followers_of(process.pid)
    os.kill(follower, signal.SIGKILL)
    assert process.wait(60) == 1
    assert "ended with status -9" in log.read_text()


def test_recording_is_refused_as_a_bad_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InterpretError, match="record cannot be used with a model that is divided") as e:
        watching_of(["residual.0"], None, tiny_args(), 1)
    assert e.value.hint is None  # that of adapters


def test_the_end_of_a_follower_is_told_also_during_the_start() -> None:
    for _ in range(5):  # a race
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", os.environ.copy())
            patch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(DistributedError, match="of a rank ended with status 1"):
                lead(2, dict)  # type: ignore[arg-type]


def test_closing_ends_a_follower_that_hangs() -> None:
    program = (
        "import asyncio, os, signal\nfrom functools import partial\n"
        "from mistral_7b.engine import followers\nfrom mistral_7b.engine import async_llm\n"
        "from mistral_7b.engine.llm import open_engine\nfrom mistral_7b.engine.config import EngineConfig\n"
        "followers.PATIENCE = 0.5\nconfig = EngineConfig(kv_cache_bytes=10**8)\n"
        "more = {'quantization': 'int8', 'tensor_parallel': 2}\n"
        "opened = partial(open_engine, 'demo', config, None, None, **more)\n"
        "async def main():\n"
        "    llm = async_llm.AsyncLLM(followers.lead(2, opened))\n"
        "    os.kill(llm._followers.processes[0].pid, signal.SIGSTOP)\n"
        "    task = asyncio.create_task(llm.embed('a'))\n    await asyncio.sleep(0.5)\n"
        "    await llm.close()\n    print(await asyncio.gather(task, return_exceptions=True))\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=90, capture_output=True, text=True)
    assert "rank ended with status -9" in done.stdout, done


def test_followers_end_with_the_server() -> None:
    program = (
        "from functools import partial\nfrom mistral_7b.engine.followers import lead\n"
        "from mistral_7b.engine.llm import open_engine\nfrom mistral_7b.engine.config import EngineConfig\n"
        "config = EngineConfig(kv_cache_bytes=10**8)\n"
        "lead(2, partial(open_engine, 'demo', config, None, None, quantization='int8'))\n"
        "print('open', flush=True)\ninput()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    (follower,) = followers_of(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while exists(follower):
        assert time.monotonic() < end
        time.sleep(0.05)
