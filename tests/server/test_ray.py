"""Serving on Ray, on two nodes of one machine: as the command starts it, and as `serve run` does."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from mistral_7b.engine.pages import first_key, next_key
from mistral_7b.errors import ConfigError
from mistral_7b.server import ray_app
from mistral_7b.server.ray_app.router import FRESH, PrefixRouter
from mistral_7b.server.ray_app.wire import NAME, Route

STREAMS = 50
ENGINE = ("--kv-cache-bytes", "200000000", "--max-sequences", "32")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two nodes on loopback, of four CPUs each."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(dir="/tmp")  # short: sockets are in it
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    node = {"num_cpus": 4, "object_store_memory": 100 << 20, "include_dashboard": False}
    both = Cluster(initialize_head=True, head_node_args={**node, "node_ip_address": "127.0.0.2"})
    try:
        both.add_node(**node, node_ip_address="127.0.0.3")
        yield both.address
    finally:
        both.shutdown()
        os.environ.pop("RAY_TMPDIR") if before is None else os.environ.update(RAY_TMPDIR=before)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


def wait_for(url: str, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            get(url)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def stream(url: str, number: int) -> tuple[str, list[float], str | None]:
    """Text, log-probabilities and finish reason of a sampled stream."""
    body = {
        "prompt": f"import os\nclass A{number}:\n", "max_tokens": 100, "ignore_eos": True, "temperature": 1,
        "seed": number, "stream": True, "logprobs": 1, "frequency_penalty": number % 3 / 4,
    }  # fmt: skip
    asked = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    text, logprobs, reason = "", [], None
    with urllib.request.urlopen(asked, timeout=180) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                choice = event["choices"][0]
                text += choice["text"]
                logprobs += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
                reason = choice["finish_reason"] or reason
    return text, logprobs, reason


def all_streams(url: str) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(stream, [url] * STREAMS, range(STREAMS)))


def processes_of(temporary: str) -> dict[int, str]:
    """The processes whose RAY_TMPDIR is `temporary`, and their titles."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if temporary.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
    return found


def replicas_of() -> list[int]:
    """The processes of this cluster's engines."""
    every = processes_of(os.environ["RAY_TMPDIR"])
    return [pid for pid, title in every.items() if title.startswith("ray::ServeReplica") and ":engine" in title]


@pytest.mark.slow
def test_streams_continue_to_the_bit_when_a_replica_is_killed(cluster: str, tmp_path: pathlib.Path) -> None:
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mistral_7b", "serve", "demo", "--quantization", "int8", "--ray", *ENGINE]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--replicas", "2", "--threads", "1", "--port", str(port)], stdout=out, stderr=out,
            env={**os.environ, "RAY_ADDRESS": cluster},
        )  # fmt: skip
    try:
        wait_for(f"{url}/health/ready", process, log)
        replicas = replicas_of()
        assert len(replicas) == 2
        undisturbed = all_streams(url)
        assert {reason for *_, reason in undisturbed} == {"length"}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            again = pool.submit(all_streams, url)
            time.sleep(random.uniform(0.3, 1.2))
            os.kill(random.choice(replicas), signal.SIGKILL)
            assert again.result() == undisturbed
        lost = log.read_text().count("lost its replica")
        assert lost > 0, "nothing ran on the replica that was killed"
        end = time.monotonic() + 90
        while len({line.partition('replica="')[2][:8] for line in get(f"{url}/metrics").splitlines()
                   if "mistral_7b_steps_total{" in line}) < 2:  # fmt: skip
            assert time.monotonic() < end, "the second replica did not come back"
            time.sleep(0.2)
        process.terminate()
        assert process.wait(120) == 0
        assert replicas_of() == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_serve_run_builds_the_application(cluster: str, tmp_path: pathlib.Path) -> None:
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    env = {**os.environ, "RAY_ADDRESS": cluster}
    serve = str(pathlib.Path(sys.executable).with_name("serve"))
    begin = [serve, "start", "--http-host", "127.0.0.1", "--http-port", str(port)]
    subprocess.run(begin, env=env, check=True, capture_output=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [serve, "run", "mistral_7b.server.ray_app:build", "model=demo", "quantization=int8", "name=small",
             "replicas=1:2", "threads=1"], stdout=out, stderr=out, env=env,
        )  # fmt: skip
    try:
        wait_for(f"{url}/health/ready", process, log)
        assert json.loads(get(f"{url}/v1/models"))["data"][0]["id"] == "small"
        text, logprobs, reason = stream(url, 1)
        assert reason == "length"
        assert len(logprobs) == 100
        assert stream(url, 1) == (text, logprobs, reason)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
        subprocess.run([serve, "shutdown", "-y"], env=env, check=False, capture_output=True)


def private(*flags: str) -> tuple[list[str], dict[str, str], str]:
    """The command of a server with its own cluster, its environment, and the folder that names its processes."""
    command = [
        sys.executable,
        "-m",
        "mistral_7b",
        "serve",
        "demo",
        "--quantization",
        "int8",
        "--ray",
        "--threads",
        "1",
    ]
    folder = tempfile.mkdtemp(dir="/tmp")  # short: sockets are in it
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return [*command, "--port", str(free_port()), *flags], env | {"RAY_TMPDIR": folder}, folder


@pytest.mark.slow
def test_a_replica_that_cannot_start_says_why(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "missing"
    command, env, folder = private("--adapter", f"a={missing}")
    try:
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
        assert ended.returncode == 2
        assert f"the replicas did not start: {missing}: no such file or folder" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert processes_of(folder) == {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_start_that_is_interrupted_leaves_no_process(tmp_path: pathlib.Path) -> None:
    command, env, folder = private("--replicas", "30")
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 60
        while not any("ray::" in title for title in processes_of(folder).values()):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        process.terminate()
        process.wait(120)
        assert "Traceback" not in log.read_text()
        assert processes_of(folder) == {}
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------- without a cluster


def pages(tokens: str, salt: str | None = None) -> tuple[bytes, ...]:
    """The keys of pages of one letter each."""
    keys = [first_key(salt, "0")]
    for letter in tokens:
        keys.append(next_key(keys[-1], [ord(letter)]))
    return tuple(key[:NAME] for key in keys[1:])


def replica(name: str, held: tuple[bytes, ...] = (), load: int = 0) -> Any:
    return SimpleNamespace(replica_id=name, routing_stats={"pages": b"".join(held), "requests": load})


@pytest.fixture
def router() -> PrefixRouter:
    made = object.__new__(PrefixRouter)
    made._replica_queue_len_cache = SimpleNamespace(get=lambda _: None)
    made.initialize_state()
    return made


def best(router: PrefixRouter, replicas: list[Any], route: Route) -> str:
    return str(router.ranked(replicas, route)[0].replica_id)


def test_the_longest_chain_wins_until_its_replica_is_too_busy(router: PrefixRouter) -> None:
    route = Route(pages("abcd"), None, 1)
    few, many = replica("few", pages("ab"), 0), replica("many", pages("abc"), 8)
    assert best(router, [few, many], route) == "many"
    many.routing_stats = {**many.routing_stats, "requests": 9}
    assert best(router, [few, many], route) == "few"


def test_without_a_prefix_the_least_loaded_wins(router: PrefixRouter) -> None:
    replicas = [replica("a", pages("xyz"), 3), replica("b", (), 2)]
    assert best(router, replicas, Route(pages("abc"), None, 1)) == "b"
    assert best(router, replicas, Route((), None, 1)) == "b"
    assert best(router, replicas, Route(pages("xyz", salt="mine"), None, 1)) == "b"
    assert best(router, replicas, Route(pages("xyz"), None, 1)) == "a"


def test_a_window_needs_only_its_last_pages(router: PrefixRouter) -> None:
    chain = pages("abcdef")
    late = replica("late", chain[3:])
    assert router.held(late, Route(chain, None, 1)) == 0
    assert router.held(late, Route(chain, 3, 1)) == 6


def test_what_was_routed_counts_as_held_for_a_while(router: PrefixRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    route, replicas = Route(pages("abc"), None, 1), [replica("a", (), 1), replica("b")]
    router.on_request_routed(SimpleNamespace(args=("server", None, route)), "a", None)
    assert best(router, replicas, route) == "a"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + FRESH + 1)
    assert best(router, replicas, route) == "b"


def test_replicas_are_a_number_or_bounds() -> None:
    assert ray_app.read_replicas("3") == (3, 3)
    assert ray_app.read_replicas("1:4") == (1, 4)
    for text in ("", "0", "4:1", "1:", ":2", "x", "-1", "1:2:3"):
        with pytest.raises(ConfigError) as caught:
            ray_app.read_replicas(text)
        assert caught.value.field == "replicas"


def test_arguments_of_build_are_checked() -> None:
    for given, field in (
        ({"modle": "demo"}, "modle"),
        ({"threads": "many"}, "threads"),
        ({"replicas": "x"}, "replicas"),
    ):
        with pytest.raises(ConfigError) as caught:
            ray_app.build(given)
        assert caught.value.field == field


def test_replicas_follow_the_queues() -> None:
    config = SimpleNamespace(target_ongoing_requests=10)
    for queues, wanted in (({"a": 5.0}, 0.5), ({"a": 30.0, "b": 12.0}, 4.2), ({}, 0.0)):
        context: Any = SimpleNamespace(aggregated_metrics={"requests": queues}, config=config)
        assert ray_app.by_queue(context)[0] == pytest.approx(wanted)


def test_a_model_without_data_keeps_its_shape() -> None:
    from tiny import tiny_model

    from mistral_7b.server.ray_app.wire import on_meta, without_data

    model = tiny_model()
    empty = on_meta(without_data(model))
    assert {(n, t.shape, t.dtype) for n, t in model.state_dict().items()} == {
        (n, t.shape, t.dtype) for n, t in empty.state_dict().items()
    }
    assert all(t.is_meta for t in empty.state_dict().values())
