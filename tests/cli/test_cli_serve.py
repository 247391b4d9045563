"""`serve`: the real command, with requests over HTTP."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from command import start, write_model
from waiting import until

from mistral_7b.server.operations.json_log import LogThread

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")


def url_of(process) -> str:
    """Return the URL that it prints."""
    for line in process.stderr:
        if found := re.search(rb"http://[0-9.:]+", line):
            return found[0].decode()
    raise AssertionError(f"it ended with {process.wait()}")


def get(url: str, data: bytes | None = None, key: str = "") -> dict:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as answer:
        return json.load(answer)


def wait_ready(url: str, key: str) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            assert get(f"{url}/health/ready", key=key) == {"status": "ready"}
            return
        except urllib.error.URLError:
            assert time.monotonic() < end
            time.sleep(0.02)


def check_end(process, url: str, key: str, number: int) -> None:
    """Not ready at once, but requests are still taken until the grace is over; then the process ends well."""
    process.send_signal(number)
    assert until(lambda: not is_ready(url, key), 10)
    assert get(f"{url}/v1/models", key=key)["data"]
    assert process.wait(20) == 0


def test_the_bundled_model_is_served_and_ends_quietly(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    flags = ("--api-key-file", str(keys), "--quantization", "int8", "--drain-grace", "3")
    process = start("serve", "--port", "0", *flags)
    try:
        url = url_of(process)
        wait_ready(url, "secret")
        assert [m["id"] for m in get(f"{url}/v1/models", key="secret")["data"]] == ["demo"]
        ask = {"model": "demo", "prompt": "import ", "max_tokens": 5, "temperature": 0}
        out = get(f"{url}/v1/completions", json.dumps(ask).encode(), "secret")
        assert out["usage"]["completion_tokens"] == 5
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{url}/v1/models", key="other")
        check_end(process, url, "secret", signal.SIGTERM)
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        paths = [line["path"] for line in lines if line["event"] == "request"]
        assert "/v1/completions" in paths
        assert not any("secret" in str(line) for line in lines)
        assert not any("traceback" in line for line in lines)
    finally:
        process.kill()
        process.wait()


def test_a_stderr_that_is_not_read_blocks_nothing():
    """More log lines than a pipe holds: requests are answered, and the process ends."""
    process = start("serve", "--port", "0", "--drain-grace", "0")
    try:
        holds = fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096) if hasattr(fcntl, "F_SETPIPE_SZ") else 65536
        url = url_of(process)
        wait_ready(url, "")
        for _ in range(holds // 100):  # a line is longer than 200 bytes
            get(f"{url}/v1/models")
        with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
            assert b"mistral_7b_log_lines_dropped_total 0.0" in answer.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_a_log_that_is_full_drops_lines_and_says_how_many():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream, os.fdopen(read) as reader:
        log = LogThread(stream, size=10)
        for i in range(3000):
            log.write(f"{i:0100d}")  # some fill the pipe, and 10 wait
        dropped = log.dropped
        assert 1000 < dropped <= 2990
        said: list[str] = []
        thread = threading.Thread(target=lambda: said.extend(reader))
        thread.start()
        while log._lines.qsize():
            time.sleep(0.01)
        log.write("after")
        log.close()
        stream.close()
        thread.join(10)
    lost = [json.loads(line)["lines"] for line in said if line.startswith("{")]
    assert sum(lost) == dropped
    assert len(said) - len(lost) == 3001 - dropped


def is_ready(url: str, key: str = "") -> bool:
    try:
        return get(f"{url}/health/ready", key=key) == {"status": "ready"}
    except urllib.error.HTTPError as e:
        if json.load(e) != {"status": "draining"}:
            raise
        return False


def test_a_record_that_cannot_be_formatted_does_not_end_the_log(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        log = LogThread(stream)
        log.emit(logging.LogRecord("x", logging.INFO, "", 0, "a %d", ("text",), None))
        log.write("after")
        log.close()
    first, second = (tmp_path / "log").read_text().splitlines()
    assert "could not be formatted" in first
    assert second == "after"


def test_a_hangup_leaves_load_balancers_a_moment_as_well():
    process = start("serve", "--port", "0", "--drain-grace", "3")
    try:
        url = url_of(process)
        wait_ready(url, "")
        check_end(process, url, "", signal.SIGHUP)
    finally:
        process.kill()
        process.wait()


BREAKS = """
from mistral_7b.engine.engine import Engine
def step(self, ordinary=Engine.step):
    if any(request.priority == 13 for request in self.requests.values()):
        raise RuntimeError("injected")
    ordinary(self)
Engine.step = step
"""  # a request with this priority breaks the engine


def test_an_engine_that_breaks_ends_the_process(tmp_path):
    """Within seconds, with an exit code that triggers a restart; open streams get the error."""
    folder = write_model(tmp_path / "model", sliding_window=64)
    process = start("serve", str(folder), "--port", "0", before=BREAKS)
    try:
        url = url_of(process)
        wait_ready(url, "")
        ask = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(ask).encode(),
                                         {"content-type": "application/json"})  # fmt: skip
        with urllib.request.urlopen(request, timeout=20) as open_stream:
            assert open_stream.readline().startswith(b"data: {")
            with pytest.raises(urllib.error.HTTPError, match="500"):
                get(f"{url}/v1/completions", json.dumps({"prompt": "b", "priority": 13}).encode())
            began = time.monotonic()
            last = open_stream.read().rstrip().rpartition(b"data: ")[2]
        assert json.loads(last)["error"]["code"] == "engine_broken"
        assert process.wait(10) == 1
        assert time.monotonic() - began < 8
        said = process.stderr.read().decode()
        assert said.splitlines()[-1].startswith("mistral-7b: the engine failed")
        assert said.count("Traceback") == 1  # in a line of the log
    finally:
        process.kill()
        process.wait()


def test_a_prefix_outlives_a_server_that_is_killed(tmp_path):
    ask = {"model": "demo", "prompt": "import os\n" * 40, "max_tokens": 5, "temperature": 0}
    answers = []
    for _ in range(2):
        process = start(
            "serve", "--port", "0", "--quantization", "int8", "--prefix-cache", str(tmp_path / "cache")
        )
        try:
            url = url_of(process)
            wait_ready(url, "")
            answers.append(get(f"{url}/v1/completions", json.dumps(ask).encode()))
            wanted, end = answers[0]["usage"]["prompt_tokens"] // 16, time.monotonic() + 20
            while len(list(tmp_path.glob("cache/*/*.kv"))) < wanted:
                assert time.monotonic() < end
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, (answers[0]["usage"]["prompt_tokens"] - 1) // 16 * 16]
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]


def test_a_prefix_cache_that_cannot_be_is_refused_before_the_model_is_opened(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("serve", "no/such-model", "--port", "0", "--prefix-cache", str(tmp_path / "file" / "cache"))
    assert result.code == 1
    assert str(tmp_path / "file" / "cache") in result.err
    result = run("serve", "no/such-model", "--prefix-cache", str(tmp_path), "--prefix-cache-size", "much")
    assert result.code == 2
    assert "--prefix-cache-size" in result.err
    assert run("serve", "no/such-model", "--prefix-cache", str(tmp_path), "--no-prefix-caching").code == 2


@pytest.mark.wording
def test_what_cannot_be_served_is_said_in_a_line(run, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", "--port", str(taken.getsockname()[1]))
    assert result.code == 2
    assert "cannot listen at 127.0.0.1:" in result.err
    assert run("serve", "--adapter", "nonsense").err == "mistral-7b: --adapter nonsense is not NAME=PATH\n"
    assert run("serve", "--api-key-file", str(tmp_path / "none")).code == 2
    assert "max_n must be" in run("serve", "--max-n", "0").err
    result = run("serve", "--host", "0.0.0.0", "--adapter", "nonsense")
    assert "access is open" in result.err
    monkeypatch.setenv("MISTRAL_7B_API_KEY", "key")
    assert "access is open" not in run("serve", "--host", "0.0.0.0", "--adapter", "nonsense").err


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--workers", "2"), "--workers"),
        (("--replicas", "2"), "--replicas"),
        (("--ray", "--tensor-parallel", "0"), "--tensor-parallel"),
        (("--ray", "--adapter-folder", "adapters"), "--adapter-folder"),
    ],
)
def test_more_processes_than_there_can_be_are_refused_with_the_reason(run, flags, field):
    result = run("serve", "no/such-model", *flags)
    assert result.code == 2
    assert result.err.startswith(f"mistral-7b: {field}")
