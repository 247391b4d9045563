"""Access control: every route of the application requires the key, and CORS allows only the listed origins."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from serving import HELLO, Serving, serving

from mistral_7b.errors import ConfigError
from mistral_7b.server.config import ServerConfig
from mistral_7b.server.http.guard import PROBES
from mistral_7b.server.keys import ApiKey, read_keys

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
OPEN = "/health/live"
FRIEND, STRANGER = "https://page.example", "https://evil.example"
KEY = {"authorization": "Bearer key"}


@pytest.fixture(scope="module")
def closed() -> Iterator[Serving]:
    config = ServerConfig(port=0, api_keys=("key",), admin_keys=("boss",), cors_origins=(FRIEND,))
    with serving(config) as server:
        yield server


def paths_of(app: FastAPI) -> set[str]:
    """The paths of all routes, including those that are not in the OpenAPI schema."""
    found, routes = set(app.openapi()["paths"]), list(app.routes)
    while routes:
        route = routes.pop()
        inner = getattr(route, "original_router", None)
        routes += inner.routes if inner is not None else ()
        found |= {route.path} if hasattr(route, "path") else set()
    return {path.replace("{name:path}", "index.html").replace("{name}", "x") for path in found}


def test_each_route_by_each_method_wants_the_key(closed: Serving) -> None:
    paths = paths_of(closed.server.config.app)
    assert paths > {"/", "/web/index.html", "/openapi.json", "/metrics", "/v1/adapters/x", "/v1/messages", *PROBES}
    odd = {"/docs", "/redoc", "/nowhere", "//", "/%2e%2e/etc/passwd", "/health/live/", "/HEALTH/LIVE", "*"}
    odd |= {"/health/live%2f..%2f..%2fv1/models", "/v1/models?x=/health/live", "http://localhost/v1/models"}
    connection = http.client.HTTPConnection("127.0.0.1", closed.port, timeout=20)
    for path in paths - set(PROBES) | odd:
        for method in METHODS:
            connection.request(method, path, headers={"host": "localhost"})
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status == 401, (method, path)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            if method == "HEAD":
                continue
            error = json.loads(data)["error"]
            if path.startswith("/api/"):
                assert "key" in error  # Ollama's errors are a sentence
            else:
                assert error["code"] == "invalid_api_key"
    connection.close()


def test_live_tells_nothing_but_that_it_lives(closed: Serving) -> None:
    status, _, data = closed.ask("GET", OPEN)
    assert (status, json.loads(data)) == (200, {"status": "live"})
    for method in METHODS[1:]:
        assert closed.ask(method, OPEN)[0] == (200 if method == "HEAD" else 405)


def test_a_browser_is_asked_for_the_key_and_then_has_the_page(closed: Serving) -> None:
    browser = {"accept": "text/html,application/xhtml+xml"}
    status, headers, _ = closed.ask("GET", "/", headers=browser)
    assert status == 401
    assert headers["www-authenticate"].startswith("Basic realm=")
    for path in ("/", "/web/main.js", "/web/style.css", "/v1/models"):  # sent by the browser from then on
        assert closed.ask("GET", path, headers={"authorization": "Basic OmtleQ=="})[0] == 200, path


def test_preflights_of_strangers_are_refused_and_those_of_friends_are_not_asked_for_a_key(closed: Serving) -> None:
    wants = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    status, headers, data = closed.ask("OPTIONS", "/v1/chat/completions", headers={"origin": FRIEND, **wants})
    assert (status, data, headers["access-control-allow-origin"]) == (204, b"", FRIEND)
    assert "access-control-allow-credentials" not in headers
    for origin in (
        STRANGER,
        "null",
        FRIEND + ".evil.example",
        FRIEND.upper(),
        "http://page.example",
        FRIEND + ":80",
    ):
        status, headers, _ = closed.ask("OPTIONS", "/v1/chat/completions", headers={"origin": origin, **wants})
        assert status == 403, origin
        assert not any(name.startswith("access-control") for name in headers)
        status, headers, _ = closed.ask("GET", "/v1/models", headers={"origin": origin, **KEY})
        assert status == 403
        assert "access-control-allow-origin" not in headers
    # a page of an allowed origin still needs the key, and can read the error
    status, headers, _ = closed.ask("GET", "/v1/models", headers={"origin": FRIEND})
    assert (status, headers["access-control-allow-origin"]) == (401, FRIEND)
    # an OPTIONS request that is not a preflight is handled like any other
    assert closed.ask("OPTIONS", "/v1/models", headers={"origin": FRIEND})[0] == 401


def test_no_origin_may_ask_where_none_is_named(server: Serving) -> None:
    """Requests of other origins that need no preflight are refused, too, and reach no engine."""
    before = server.llm.engine.counts.steps
    for headers in ({"content-type": "text/plain"}, {}, {"access-control-request-method": "POST"}):
        for method in ("POST", "OPTIONS"):
            status, answered, _ = server.ask(
                method,
                "/v1/chat/completions",
                {"messages": HELLO, "max_tokens": 2},
                {"origin": STRANGER, **headers},
            )
            assert status == 403
            assert not any(name.startswith("access-control") for name in answered)
    assert server.llm.engine.counts.steps == before


def test_key_files_that_close_nothing_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    file = tmp_path / "keys"
    with pytest.raises(OSError, match="keys"):
        read_keys((), str(file), "SOME_KEY")
    for nothing in ("", "\n \n", "# one\n"):
        file.write_text(nothing)
        with pytest.raises(ConfigError) as refused:
            read_keys((), str(file), "SOME_KEY")
        assert refused.value.place == str(file)
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError) as refused:
        read_keys((), str(file), "SOME_KEY")
    assert isinstance(refused.value.__cause__, UnicodeDecodeError)
    file.write_text("\ufeffalpha\r\nbeta\r\n")  # as an editor on Windows may leave it
    assert read_keys((), str(file), "SOME_KEY") == (ApiKey("alpha"), ApiKey("beta"))
    assert read_keys((), "", "SOME_KEY") == ()
    monkeypatch.setenv("SOME_KEY", "  ")  # as `SOME_KEY=$UNSET` leaves it
    with pytest.raises(ConfigError) as refused:
        read_keys((), "", "SOME_KEY")
    assert refused.value.field == "SOME_KEY"


def test_a_key_file_gives_keys_names_and_limits(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("# all of them\na#1 name=alice priority\t# the boss\nb requests=60 tokens=1000 concurrent=2\n")
    alice, b = read_keys((), str(file), "NOT_SET")
    assert alice == ApiKey("a#1", "alice", True)
    assert b == ApiKey("b", "", False, 60, 1000, 2)
    assert b.label.startswith("key-")
    for bad in ("a tokens=0", "a tokens=x", "a token=1", "a b", "a name=", "a priority=1"):
        file.write_text(f"one\n{bad}\n")
        with pytest.raises(ConfigError) as refused:
            read_keys((), str(file), "NOT_SET")
        assert refused.value.place == f"{file}, line 2"


def test_a_key_file_that_others_may_read_is_told_of(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("alpha\n")
    for mode, told in ((0o600, False), (0o640, False), (0o644, True), (0o666, True)):
        file.chmod(mode)
        caplog.clear()
        assert read_keys((), str(file), "SOME_KEY") == (ApiKey("alpha"),)
        assert bool(caplog.records) == told, oct(mode)
