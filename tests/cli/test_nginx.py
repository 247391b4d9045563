"""deploy/nginx.conf in a real nginx: keys move away from a server that is full, broken or dead."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import pathlib
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from command import start, write_model
from test_cli_serve import BREAKS, url_of, wait_ready

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="there is no nginx")
CONF = (pathlib.Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text()
KEYS = [f"key-{i}" for i in range(40)]
MAIN = """
daemon off; master_process off; pid {folder}/pid; error_log stderr error; events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/mistral.conf;
}}
"""
# Of a broken engine: the process stays while a client is sending, so that it can be observed.
LINGERS = "import mistral_7b.server.serve as serve\nserve.FINAL_ERRORS_TIMEOUT = 30\n"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def nginx(folder: pathlib.Path, *ports: int) -> Iterator[int]:
    """Run the shipped file as proxy of two local servers; return its port."""
    listens, conf = free_port(), CONF
    for shipped, port in zip(("10.0.0.5:8000", "10.0.0.6:8000"), ports, strict=True):
        assert conf.count(shipped) == 2
        conf = conf.replace(shipped, f"127.0.0.1:{port}")
    (folder / "mistral.conf").write_text(conf.replace("listen 80;", f"listen 127.0.0.1:{listens};"))
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder))
    process = subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", listens)):
                break
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        yield listens
    finally:
        process.terminate()
        process.wait(10)


def post(port: int, key: str, session: str = "", **body: object) -> tuple[int, dict[str, str], dict]:
    """Request a completion with this key; return status, headers and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = json.dumps({"prompt": "a", "max_tokens": 1, "ignore_eos": True, **body})
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    headers |= {"x-session-id": session} if session else {}
    try:
        connection.request("POST", "/v1/completions", data, headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, dict(answer.getheaders()), json.loads(text) if text.startswith(b"{") else {}
    finally:
        connection.close()


def servers_of(port: int) -> dict[str, str]:
    """Return the server that answers each key; every request must succeed."""
    found = {}
    for key in KEYS:
        status, _, answer = post(port, key)
        assert status == 200, (key, answer)
        found[key] = answer["model"]
    return found


def test_two_servers_one_of_which_breaks_and_ends(tmp_path: pathlib.Path) -> None:
    folder = write_model(tmp_path / "model", sliding_window=64)
    processes = [start("serve", str(folder), "--port", "0", "--name", name, before=BREAKS + LINGERS)
                 for name in ("first", "second")]  # fmt: skip
    try:
        urls = [url_of(process) for process in processes]
        for url in urls:
            wait_ready(url, "")
        ports = [int(url.rpartition(":")[2]) for url in urls]
        with nginx(tmp_path, *ports) as port:
            home = servers_of(port)
            assert min(Counter(home.values())[name] for name in ("first", "second")) >= 5
            assert servers_of(port) == home

            key = next(key for key in KEYS if home[key] == "first")
            half = socket.create_connection(("127.0.0.1", ports[0]))  # a client that is sending keeps it alive
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.2)
            status, _, answer = post(port, key, priority=13)
            assert (status, answer["error"]["code"]) == (500, "engine_broken")
            assert processes[0].poll() is None
            assert set(servers_of(port).values()) == {"second"}  # what broke the first has not reached it

            half.close()
            assert processes[0].wait(10) == 1
            assert set(servers_of(port).values()) == {"second"}
            assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Upstream:
    """A server that answers each POST with `behave`, and counts requests."""

    def __init__(self, behave: Callable[[http.server.BaseHTTPRequestHandler], None]) -> None:
        self.asked = 0
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                upstream.asked += 1
                behave(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def says(status: int, name: str = "") -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        body = json.dumps({"model": name}).encode()
        handler.send_response(status)
        handler.send_header("content-length", str(len(body)))
        handler.send_header("retry-after", "7")
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def dies(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer, as a process that exits."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def upstreams(folder: pathlib.Path, *behave: Callable[..., None]) -> Iterator[tuple[int, list[Upstream]]]:
    both = [Upstream(each) for each in behave]
    try:
        with nginx(folder, *(each.port for each in both)) as port:
            yield port, both
    finally:
        for each in both:
            each.server.shutdown()
            each.server.server_close()


@pytest.mark.parametrize("status", [429, 503])
def test_what_was_refused_is_sent_elsewhere_and_whom_it_was_refused_by_is_asked_again(
    tmp_path: pathlib.Path, status: int
) -> None:
    with upstreams(tmp_path, says(status), says(200, "second")) as (port, (first, second)):
        assert set(servers_of(port).values()) == {"second"}
        assert first.asked >= 5  # it is not taken for dead: a place may be free by now
        assert second.asked == len(KEYS)


@pytest.mark.parametrize("status", [429, 503])
def test_where_all_refuse_the_client_hears_when_to_ask_again(tmp_path: pathlib.Path, status: int) -> None:
    with upstreams(tmp_path, says(status), says(status)) as (port, _):
        for key in KEYS[:10]:
            found, headers, _ = post(port, key)
            assert (found, headers["retry-after"]) == (status, "7")


@pytest.mark.parametrize(("behave", "status"), [(dies, 502), (says(500), 500)])
def test_what_ends_a_server_is_not_sent_to_the_next(
    tmp_path: pathlib.Path, behave: Callable[..., None], status: int
) -> None:
    with upstreams(tmp_path, behave, behave) as (port, both):
        assert post(port, KEYS[0])[0] == status
        assert sum(each.asked for each in both) == 1


def test_a_session_stays_on_one_server_and_sessions_spread(tmp_path: pathlib.Path) -> None:
    with upstreams(tmp_path, says(200, "first"), says(200, "second")) as (port, _):
        homes = {}
        for session in KEYS:
            found = {post(port, "shared", session)[2]["model"] for _ in range(3)}
            assert len(found) == 1
            homes[session] = found.pop()
        assert min(Counter(homes.values())[name] for name in ("first", "second")) >= 5
        assert len({post(port, "shared")[2]["model"] for _ in range(10)}) == 1
