"""The guard and the connection: keys, hosts, origins, limits, and one shape for all errors."""

from __future__ import annotations

import base64
import gc
import json
import logging
import socket
import time

import pytest
from serving import HELLO, Serving, serving
from waiting import soon, until

from mistral_7b.errors import ConfigError
from mistral_7b.server.config import ServerConfig
from mistral_7b.server.keys import ApiKey, read_keys

CHAT = "/v1/chat/completions"
ASK = {"messages": HELLO, "max_tokens": 2}
ROUTES = [
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"),
    ("GET", "/openapi.json"), ("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"),
    ("POST", "/v1/messages"), ("GET", "/"), ("GET", "/nowhere"), ("PUT", CHAT), ("OPTIONS", CHAT),
]  # fmt: skip


@pytest.fixture(scope="module")
def closed():
    """A server with keys and low limits."""
    config = ServerConfig(
        port=0, api_keys=("one", "two"), admin_keys=("boss",), cors_origins=("https://page.example",),
        max_body_bytes=2000, max_prompt_tokens=40, max_prompts=2, max_concurrent=2, body_timeout=0.4,
        keep_alive=0.3,
    )  # fmt: skip
    with serving(config) as it:
        yield it


def error_of(data: bytes) -> dict:
    """The error of a body, after a check that it has exactly the expected fields."""
    body = json.loads(data)
    assert list(body) in (["error"], ["type", "error"])  # OpenAI's and Anthropic's
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    assert "Traceback" not in body["error"]["message"]
    return body["error"]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_route_opens_without_a_key(closed: Serving, method, path):
    for headers in ({}, bearer("three"), bearer("onex"), {"authorization": "Basic !!"}, {"x-api-key": ""}):
        status, answered, data = closed.ask(method, path, ASK if method == "POST" else None, headers)
        assert status == 401
        assert error_of(data)["code"] == "invalid_api_key"
        assert answered["www-authenticate"].startswith("Bearer")


def test_live_is_open_and_every_kind_of_key_opens(closed: Serving):
    assert closed.ask("GET", "/health/live")[0] == 200
    basic = base64.b64encode(b"anyone:two").decode()
    for headers in (bearer("one"), bearer("two"), {"x-api-key": "two"}, bearer("boss"),
                    {"authorization": f"Basic {basic}"}):  # fmt: skip
        assert closed.ask("GET", "/v1/models", headers=headers)[0] == 200
    page = closed.ask("GET", "/", headers={"accept": "text/html"})
    assert page[0] == 401
    assert page[1]["www-authenticate"].startswith("Basic")


def test_keys_come_from_files_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha  # mine\n\nbeta\n")
    monkeypatch.setenv("SOME_KEY", "gamma")
    assert read_keys(("zero",), str(file), "SOME_KEY") == tuple(map(ApiKey, ("zero", "alpha", "beta", "gamma")))
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError) as refused:
        read_keys((), str(file), "SOME_KEY")
    assert refused.value.place == str(file)
    for bad in ({"api_keys": ("ü",)}, {"api_keys": ("",)}, {"port": 70000}, {"max_n": 0}, {"idle_timeout": -1.0}):
        with pytest.raises(ConfigError) as refused:
            ServerConfig(**bad)
        assert [refused.value.field] == list(bad)


def test_pages_of_others_may_not_ask(closed: Serving):
    key = bearer("one")
    assert closed.ask("GET", "/v1/models", headers={**key, "origin": "https://evil.example"})[0] == 403
    assert closed.ask("GET", "/v1/models", headers={**key, "origin": "null"})[0] == 403
    own = f"http://127.0.0.1:{closed.port}"
    assert closed.ask("GET", "/v1/models", headers={**key, "origin": own})[0] == 200
    friend = {"origin": "https://page.example"}
    status, headers, _ = closed.ask("GET", "/v1/models", headers={**key, **friend})
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example")
    preflight = {
        **friend,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    status, headers, _ = closed.ask("OPTIONS", CHAT, headers=preflight)
    assert (status, headers["access-control-allow-headers"]) == (204, "authorization")
    assert closed.ask("OPTIONS", CHAT, headers={**preflight, "origin": "https://evil.example"})[0] == 403
    assert closed.ask("GET", "/v1/models", headers={**key, "host": "evil.example:80"})[0] == 403  # DNS rebinding


def test_every_answer_has_its_id_and_the_headers_of_safety(closed: Serving):
    for method, path in ROUTES:
        headers = closed.ask(method, path, headers=bearer("one"))[1]
        assert "unsafe-inline" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert len(headers["x-request-id"]) == 32
        assert "server" not in headers
        assert ("request-id" in headers) == path.startswith("/v1/messages")
    assert (
        closed.ask("GET", "/", headers={**bearer("one"), "x-request-id": "mine-1"})[1]["x-request-id"] == "mine-1"
    )
    assert closed.ask("GET", "/", headers={"x-request-id": 'a"b'})[1]["x-request-id"] != 'a"b'


def test_limits_have_their_own_status(closed: Serving):
    key = bearer("one")
    long = [{"role": "user", "content": "x " * 200}]
    status, _, data = closed.ask("POST", CHAT, {**ASK, "messages": long}, key)
    assert (status, error_of(data)["code"]) == (400, "context_length_exceeded")
    assert closed.ask("POST", CHAT, {**ASK, "n": 17}, key)[0] == 422
    assert closed.ask("POST", "/v1/completions", {"prompt": ["a", "b", "c"]}, key)[0] == 422
    status, _, data = closed.ask("POST", CHAT, b"x" * 2001, key)
    assert (status, error_of(data)["code"]) == (413, "body_too_large")
    chunked = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer one\r\nConnection: close\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode() + b"5dc\r\n" + b"x" * 1500 + b"\r\n5dc\r\n" + b"x" * 1500 + b"\r\n0\r\n\r\n"  # fmt: skip
    assert b" 413 " in closed.raw(chunked)
    assert closed.ask("POST", CHAT, ASK, key)[0] == 200
    closed.idle()


def test_a_body_or_a_head_that_does_not_come(closed: Serving):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer one\r\nContent-Length: 50\r\n"

    def refused_twice() -> None:
        for sent, code in ((f"{head}\r\n{{", "body_timeout"), (head, "head_timeout")):
            said = closed.raw(sent.encode())
            assert b" 408 " in said
            assert error_of(said.partition(b"\r\n\r\n")[2])["code"] == code

    soon(3, refused_twice, clock=time.monotonic)
    closed.idle()


def test_who_was_refused_by_its_head_is_told_once_however_slow_its_body(closed: Serving):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"
    said = b""
    with socket.create_connection(("127.0.0.1", closed.port), timeout=5) as sock:
        sock.sendall(head.encode())
        sock.settimeout(0.05)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                sock.sendall(b"x")
                if not (more := sock.recv(1 << 16)):
                    break
                said += more
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("the connection stays open")
    assert said.startswith(b"HTTP/1.1 401 ")
    assert said.count(b"HTTP/1.1") == 1


def test_connections_that_were_refused_are_forgotten_when_they_close(closed: Serving):
    def transports() -> int:
        gc.collect()
        return sum(type(o).__name__ == "_SelectorSocketTransport" for o in gc.get_objects())

    before = transports()
    for _ in range(20):
        assert b" 400 " in closed.raw(b"nothing\r\n\r\n")
    closed.idle()
    assert until(lambda: transports() <= before + 2)


def test_too_many_at_once(closed: Serving):
    """Two unfinished bodies reach the limit of two concurrent requests."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer one\r\nContent-Length: 50\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", closed.port)) as a,
        socket.create_connection(("127.0.0.1", closed.port)) as b,
    ):
        for sock in (a, b):
            sock.sendall(head.encode())
        assert until(lambda: closed.state.active == 2)
        status, headers, data = closed.ask("POST", CHAT, ASK, bearer("one"))
        assert (status, error_of(data)["code"]) == (429, "too_many_requests")
        assert int(headers["retry-after"]) > 0
        assert closed.ask("GET", "/health/ready", headers=bearer("one"))[0] == 200
    closed.idle()


BROKEN = {
    "truncated": b'{"messages": [{"role": "user"',
    "no JSON": b"hello",
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "wrong type": b'{"messages": 7}',
    "text for a number": b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    "true for a number": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": true}',
    "huge": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}',
    "huge whole": b'{"messages": [{"role": "user", "content": "x"}], "seed": %s}' % (b"9" * 500),
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "no UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "unknown field": b'{"messages": [{"role": "user", "content": "x"}], "foo": 1}',
    "deep": b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "unknown role": b'{"messages": [{"role": "king", "content": "x"}]}',
    "no content": b'{"messages": [{"role": "user"}]}',
    "bad tool": b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}',
    "bad tool name": b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "a b"}}]}',
    "bad parameters": b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required",'
    b' "tools": [{"function": {"name": "a", "parameters": {"type": 5}}}]}',
    "bad call": b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]}',
    "bad regex": b'{"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "("}}',
    "two structures": b'{"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "a"},'
    b' "response_format": {"type": "json_object"}}',
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bodies_are_refused_by_name(server: Serving, name):
    status, _, data = server.ask("POST", CHAT, BROKEN[name])
    assert status == 400
    error = error_of(data)
    assert error["type"] == "invalid_request_error"
    assert len(data) < 1000


def test_other_broken_requests(server: Serving):
    for path, body, status in (
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400), ("/v1/completions", {"prompt": []}, 400),
        ("/v1/completions", {"prompt": [[]]}, 400), ("/v1/completions", {"prompt": [1, "a"]}, 400),
        ("/v1/completions", {"prompt": [1, 99999]}, 400), ("/v1/completions", {"prompt": [-1]}, 400),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, 400),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400), ("/v1/embeddings", {}, 400),
        ("/v1/chat/nothing", {}, 404),
    ):  # fmt: skip
        got, _, data = server.ask("POST", path, body)
        assert (got, path, body) == (status, path, body)
        error_of(data)
    status, headers, data = server.ask("GET", CHAT)
    assert (status, headers["allow"]) == (405, "POST")
    error_of(data)
    assert server.ask("POST", CHAT, ASK, {"content-type": "text/plain"})[0] == 400


def test_what_is_no_http(server: Serving):
    for data in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -4\r\n\r\n",
                 b"\x16\x03\x01\x02\x00\x01\x00"):  # fmt: skip
        said = server.raw(data + b"\r\n\r\n", 2)
        assert said.startswith(b"HTTP/1.1 400 ")
        error_of(said.partition(b"\r\n\r\n")[2])


def test_the_log_has_ids_and_numbers_and_no_prompt(server: Serving, caplog):
    with caplog.at_level(logging.INFO, "mistral_7b.access"):
        secret = [{"role": "user", "content": "Xyzzy is the secret"}]
        server.ask("POST", CHAT, {**ASK, "messages": secret}, {"x-request-id": "seen-1"})
        server.idle()
        assert until(lambda: any(r.fields["id"] == "seen-1" for r in caplog.records))
    (record,) = [r for r in caplog.records if r.fields["id"] == "seen-1"]
    assert record.fields["status"] == 200
    assert record.fields["completion_tokens"] == 2
    assert record.fields["reason"] == "length"
    assert "zzy" not in str(record.fields)
