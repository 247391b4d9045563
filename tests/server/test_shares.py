"""No client starves: limits of each key, equal shares of a full server, probes and connections under load."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving import HELLO, Serving, serving
from waiting import until

from mistral_7b.engine.config import EngineConfig
from mistral_7b.errors import ConfigError
from mistral_7b.server.config import ServerConfig
from mistral_7b.server.http.guard import BODIES
from mistral_7b.server.http.limits import Account, Bucket
from mistral_7b.server.keys import ApiKey
from mistral_7b.server.workers import Workers, current_account

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ASK = {"messages": HELLO, "max_tokens": 2}
LONG = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def code(data: Any) -> str | None:
    return (data if isinstance(data, dict) else json.loads(data))["error"]["code"]


@contextlib.contextmanager
def long_streams(server: Serving, n: int, key: str = "") -> Iterator[list[http.client.HTTPConnection]]:
    """Connections whose streams go on until the block ends."""
    connections = []
    headers = {"content-type": "application/json", **bearer(key)}
    for _ in range(n):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", COMPLETIONS, json.dumps(LONG).encode(), headers)
        connections.append(connection)
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


# ---------------------------------------------------------------------- limits of each key


def test_a_bucket_holds_a_minute_and_fills_continuously() -> None:
    now = 100.0
    bucket = Bucket(60, lambda: now)
    bucket.take(60)
    assert (bucket.left, bucket.seconds_until(1)) == (0, 1)
    bucket.take(30)  # overdrawn
    assert bucket.seconds_until(1) == 31
    now += 45
    assert bucket.left == 15
    now += 1000
    assert bucket.left == 60


def test_each_key_has_its_own_limits_and_headers() -> None:
    keys = (ApiKey("a", requests_per_minute=2), ApiKey("b", tokens_per_minute=30), ApiKey("c"))
    with serving(ServerConfig(port=0, api_keys=keys, requests_per_minute=100)) as server:
        for left in ("1", "0"):
            status, headers, _ = server.ask("POST", CHAT, ASK, bearer("a"))
            assert (status, headers["x-ratelimit-limit-requests"]) == (200, "2")
            assert headers["x-ratelimit-remaining-requests"] == left
            assert headers["x-ratelimit-reset-requests"].endswith("s")
        status, headers, data = server.ask("POST", CHAT, ASK, bearer("a"))
        assert (status, code(data)) == (429, "rate_limit_exceeded")
        assert 0 < int(headers["retry-after"]) <= 31
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert server.ask("GET", "/v1/models", headers=bearer("a"))[0] == 200  # costs no request
        # The limit of tokens lets the request begin that overdraws it.
        assert server.ask("POST", CHAT, {**ASK, "max_tokens": 40, "ignore_eos": True}, bearer("b"))[0] == 200
        status, headers, data = server.ask("POST", CHAT, ASK, bearer("b"))
        assert (status, code(data), headers["x-ratelimit-remaining-tokens"]) == (429, "rate_limit_exceeded", "0")
        status, headers, _ = server.ask("POST", CHAT, ASK, bearer("c"))
        assert (status, headers["x-ratelimit-limit-requests"]) == (200, "100")
        assert "x-ratelimit-limit-tokens" not in headers
        scraped = server.ask("GET", "/metrics", headers=bearer("c"))[2].decode()
        a, b = keys[0].label, keys[1].label
        assert f'mistral_7b_key_limited_total{{key="{a}",limit="requests"}} 1.0' in scraped
        assert f'mistral_7b_key_requests_total{{adapter="",key="{a}"}} 2.0' in scraped
        assert f'mistral_7b_key_tokens_total{{adapter="",key="{b}",kind="generation"}} 40.0' in scraped
        server.idle()


def test_concurrent_requests_of_a_key_are_limited() -> None:
    keys = (ApiKey("a", max_concurrent=1), ApiKey("b"))
    with serving(ServerConfig(port=0, api_keys=keys)) as server:
        with long_streams(server, 1, "a"):
            assert until(lambda: server.state.active == 1)
            status, _, data = server.ask("POST", CHAT, ASK, bearer("a"))
            assert (status, code(data)) == (429, "rate_limit_exceeded")
            assert server.ask("POST", CHAT, ASK, bearer("b"))[0] == 200
        server.idle()
        assert server.ask("POST", CHAT, ASK, bearer("a"))[0] == 200


def test_priority_is_for_keys_that_have_it() -> None:
    keys = (ApiKey("a"), ApiKey("b", priority=True))
    with serving(ServerConfig(port=0, api_keys=keys, admin_keys=("boss",))) as server:
        status, body = server.post(CHAT, {**ASK, "priority": -1}, bearer("a"))
        assert (status, code(body), body["error"]["param"]) == (403, "priority_not_allowed", "priority")
        assert server.post(CHAT, {**ASK, "priority": 0}, bearer("a"))[0] == 200
        for key in ("b", "boss"):
            assert server.post(CHAT, {**ASK, "priority": -1}, bearer(key))[0] == 200
    with serving() as server:  # without keys there is one client, who may order its own requests
        assert server.post(CHAT, {**ASK, "priority": -1})[0] == 200


def test_one_request_has_a_limit_of_tokens() -> None:
    with serving(ServerConfig(port=0, max_request_tokens=100)) as server:
        for path, ask in (
            (CHAT, {**ASK, "max_tokens": 40, "n": 3}),
            (COMPLETIONS, {"prompt": ["a", "b", "c"], "max_tokens": 40}),
            (COMPLETIONS, {"prompt": "a", "max_tokens": 40, "n": 3, "stream": True}),
        ):
            status, body = server.post(path, ask)
            assert (status, code(body), body["error"]["param"]) == (422, "too_large", "max_tokens")
        assert server.post(COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 40})[0] == 200
        server.idle()


# ---------------------------------------------------------------------- equal shares of a full server


def test_a_greedy_key_does_not_turn_another_away() -> None:
    """It holds every seat, the whole queue and all concurrent requests; the other one is served at once."""
    engine = EngineConfig(max_sequences=4, max_batch_tokens=32, page_size=4, max_waiting=4)
    config = ServerConfig(port=0, api_keys=("greedy", "modest"), max_concurrent=8)
    with serving(config, engine) as server:
        scheduler = server.llm.engine.scheduler
        with long_streams(server, 4, "greedy"), contextlib.ExitStack() as more:
            assert until(lambda: len(scheduler.running) == 4)
            for _ in range(4):
                more.enter_context(long_streams(server, 1, "greedy"))
            assert until(lambda: scheduler.waiting == 4)
            status, _, data = server.ask("POST", CHAT, ASK, bearer("greedy"))
            assert (status, code(data)) == (429, "too_many_requests")
            for _ in range(3):
                assert server.ask("POST", CHAT, ASK, bearer("modest"))[0] == 200
        server.idle()


def test_log_lines_name_the_key_and_the_times_and_leave_probes_out(caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(port=0, api_keys=(ApiKey("secret", name="alice"),))
    with serving(config) as server, caplog.at_level("INFO", "mistral_7b.access"):
        server.ask("GET", "/health/live")
        server.ask("GET", "/health/ready")
        assert server.ask("POST", CHAT, ASK, bearer("secret"))[0] == 200
        server.idle()
    (line,) = [r.fields for r in caplog.records if r.name == "mistral_7b.access"]  # type: ignore[attr-defined]
    assert (line["key"], line["model"], line["completion_tokens"]) == ("alice", "tiny", 2)
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert "secret" not in str(line)
    assert "secret" not in repr(server.state.config)


def test_slow_functions_of_one_account_leave_threads_to_another() -> None:
    release = threading.Event()

    async def wait_slowly(workers: Workers, n: int) -> None:
        current_account.set(Account("greedy"))
        await asyncio.gather(*(workers.run(release.wait) for _ in range(n)))

    async def main() -> None:
        workers = Workers(8, accounts=2)
        slow = asyncio.create_task(wait_slowly(workers, 50))
        await asyncio.sleep(0)
        current_account.set(Account("modest"))
        assert [await workers.run(lambda i=i: i) for i in range(20)] == list(range(20))  # type: ignore[misc]
        assert not slow.done()
        with pytest.raises(ZeroDivisionError):
            await workers.run(lambda: 1 // 0)
        release.set()
        await slow
        assert not workers._running
        assert not workers._waiting

    asyncio.run(asyncio.wait_for(main(), 30))


# ---------------------------------------------------------------------- connections and probes


def test_idle_connections_give_way() -> None:
    with serving(ServerConfig(port=0, max_connections=8)) as server, contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5)) for _ in range(7)
        ]
        recent = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        recent.request("GET", "/health/live")
        assert recent.getresponse().read()
        first = recent.sock
        for _ in range(3):
            assert server.ask("POST", CHAT, ASK)[0] == 200
        assert sockets[0].recv(1) == b""  # closed
        recent.request("GET", "/health/live")
        assert recent.getresponse().read()
        assert recent.sock is first, "the connection that was idle for the shortest time was closed"
        assert server.state.evicted >= 1
        assert server.state.rejected == 0


def test_probes_are_answered_when_all_connections_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = 8  # each socket costs 80 ms beside four streams: all share this process
    monkeypatch.setattr("mistral_7b.server.http.connection.RESERVE", reserve)
    config = ServerConfig(port=0, max_connections=4, api_keys=("one",))
    with serving(config) as server, long_streams(server, 4, "one"):
        assert until(lambda: server.state.active == 4)
        for path in ("/health/live", "/health/ready"):
            assert server.ask("GET", path)[0] == 200
        status, headers, data = server.ask("POST", CHAT, ASK, bearer("one"))
        assert (status, code(data), headers["connection"]) == (503, "too_many_connections", "close")
        with contextlib.ExitStack() as stack:
            for _ in range(2 * reserve):  # idle ones cannot fill the reserve
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                assert len(server.state.connections) <= 4 + reserve
            assert server.ask("GET", "/health/ready")[0] == 200
        assert server.state.rejected == 1


def test_both_lengths_of_a_body_are_refused_and_the_connection_closed() -> None:
    with serving() as server:
        smuggled = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
            "0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        said = server.raw(smuggled.encode())
        assert said.startswith(b"HTTP/1.1 400 ")
        assert said.count(b"HTTP/1.1") == 1
        assert b"connection: close" in said.lower()
        server.idle()


def test_a_server_that_drains_closes_its_connections() -> None:
    with serving(ServerConfig(port=0, drain_timeout=5.0)) as server, long_streams(server, 1):
        assert until(lambda: server.state.active == 1)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().read()
        server.server.stop()
        assert until(lambda: server.state.draining)
        connection.request("POST", CHAT, json.dumps(ASK).encode(), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, answer.headers["connection"]) == (503, "close")


def test_one_key_waits_for_no_other_while_a_thousand_sockets_idle() -> None:
    with serving(ServerConfig(port=0)) as server, contextlib.ExitStack() as stack:
        for _ in range(1024):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        assert until(lambda: len(server.state.connections) >= 1000)
        assert server.ask("GET", "/health/live")[0] == 200
        assert server.ask("POST", CHAT, ASK)[0] == 200


def test_threads_that_send_at_once_are_all_answered() -> None:
    """Neither account nor connection is counted twice or lost."""
    with serving(ServerConfig(port=0, api_keys=("a", "b"))) as server:
        statuses: list[int] = []

        def send(key: str) -> None:
            statuses.extend(server.ask("POST", CHAT, ASK, bearer(key))[0] for _ in range(4))

        threads = [threading.Thread(target=send, args=(key,)) for key in "abab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert statuses == [200] * 16
        server.idle()
        assert all(a.active == 0 for a in server.state.accounts.all)
        end = time.monotonic() + 5
        while len(server.state.connections) and time.monotonic() < end:
            time.sleep(0.01)
        assert len(server.state.connections) == 0


def test_requests_without_a_key_hold_neither_seats_nor_connections() -> None:
    """Bodies that never come: of health probes, which need no key, and of requests that were refused."""
    config = ServerConfig(port=0, api_keys=("one",), max_concurrent=2, max_connections=8)
    with serving(config) as server:
        for path, status in (("/health/live", b" 405 "), ("/v1/completions", b" 401 ")):
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n".encode()
            with contextlib.ExitStack() as stack:
                for _ in range(8):
                    sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
                    sock.sendall(head)
                    assert status in sock.recv(1000)
                assert server.state.active == 0
                assert server.ask("POST", CHAT, ASK, bearer("one"))[0] == 200
        server.idle()


def test_bodies_of_one_key_leave_memory_to_another() -> None:
    config = ServerConfig(port=0, api_keys=("greedy", "modest"), max_body_bytes=2000)
    head = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Authorization: Bearer greedy", "Content-Length: 1999"]
    with serving(config) as server, contextlib.ExitStack() as stack:
        for _ in range(BODIES):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            sock.sendall("\r\n".join([*head, "", " " * 1990]).encode())
        assert until(lambda: server.state.held == BODIES * 1990)
        ask = {**ASK, "user": "x" * 1500}
        assert code(server.ask("POST", CHAT, ask, bearer("greedy"))[2]) == "bodies_too_large"
        assert server.ask("POST", CHAT, ask, bearer("modest"))[0] == 200


def test_more_prompts_than_the_queue_holds_are_refused_for_good() -> None:
    with serving(engine=EngineConfig(max_sequences=12, max_batch_tokens=48, page_size=4, max_waiting=8)) as server:
        status, body = server.post(COMPLETIONS, {"prompt": ["a"] * 9, "max_tokens": 1})
        assert (status, body["error"]["param"]) == (422, "prompt")
        assert server.post(COMPLETIONS, {"prompt": ["a"] * 8, "max_tokens": 1})[0] == 200


def test_a_trailing_slash_is_another_route() -> None:
    with serving() as server:
        status, headers, data = server.ask("POST", f"{CHAT}/", ASK)
        assert (status, code(data)) == (404, "no_such_route")
        assert "location" not in headers


def test_keys_with_one_name_are_refused() -> None:
    with pytest.raises(ConfigError):
        ServerConfig(api_keys=(ApiKey("a", "x"), ApiKey("b", "x")))
