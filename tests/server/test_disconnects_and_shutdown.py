"""Early ends of responses: disconnects, stalled readers, timeouts, shutdown, engine failures."""

from __future__ import annotations

import gc
import http.client
import json
import logging
import signal
import socket
import threading

import pytest
from serving import HELLO, Serving, serving
from waiting import until

from mistral_7b.engine.config import EngineConfig
from mistral_7b.server.config import ServerConfig

CHAT = "/v1/chat/completions"
LONG = {"messages": HELLO, "max_tokens": 100_000, "ignore_eos": True}


def stream(server: Serving, body=LONG):
    """Send a streaming request; return its connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", CHAT, json.dumps({"stream": True, **body}), {"content-type": "application/json"})
    return connection


@pytest.mark.parametrize("streaming", [True, False])
def test_pages_are_free_within_a_step_of_the_client_going(server: Serving, streaming):
    """Counted in engine steps from the call of `abort` to the end of the request."""
    engine, heard, ended = server.llm.engine, [], []
    end = type(engine)._finish

    def finish(request, *args, **more):
        ended.append((engine.counts.steps, engine.pool.held))
        end(engine, request, *args, **more)
        ended.append((engine.counts.steps, engine.pool.held))

    engine._finish = finish
    abort = server.llm.abort

    def told(request_id):
        heard.append(engine.counts.steps)
        abort(request_id)

    server.llm.abort = told
    try:
        for _ in range(5):
            connection = stream(server, {**LONG, "n": 2} if streaming else {**LONG, "stream": False})
            assert until(lambda: engine.pool.held > 4)
            connection.sock.close() if connection.sock else connection.close()
            connection.close()
            server.idle()
            (before, held), (after, left) = ended
            assert held > 0
            assert left == 0
            assert after == before <= heard[0] + 1
            ended.clear()
            heard.clear()
    finally:
        del engine._finish, server.llm.abort


def test_who_reads_nothing_is_hung_up_on():
    """Buffered output stays small, and the request is aborted."""
    with serving(ServerConfig(port=0, idle_timeout=0.5)) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        body = json.dumps({**LONG, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20})
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert until(lambda: not server.llm.engine.idle)
        (held,) = server.llm.engine.requests.values()
        assert until(lambda: server.llm.engine.idle, 15)
        assert held.finished
        assert sum(len(c.token_ids) for c in held.completions) < 20_000
        server.idle()
        assert server.post(CHAT, {"messages": HELLO, "max_tokens": 2})[0] == 200
        sock.close()


def test_an_answer_that_takes_too_long():
    with serving(ServerConfig(port=0, request_timeout=0.3)) as server:
        status, headers, data = server.ask("POST", CHAT, LONG)
        assert (status, json.loads(data)["error"]["code"]) == (504, "timeout")
        assert headers["x-should-retry"] == "false"
        lines = stream(server).getresponse().read().split(b"\n\n")
        assert len(lines) > 3
        assert json.loads(lines[-2].removeprefix(b"data: "))["error"]["code"] == "timeout"
        server.idle()


def test_a_full_queue_is_said_at_once():
    engine = EngineConfig(max_sequences=1, max_batch_tokens=16, page_size=4, max_waiting=2)
    with serving(engine=engine) as server:
        running = stream(server)
        assert until(lambda: server.llm.engine.scheduler.running)
        waiting = [stream(server), stream(server)]
        assert until(lambda: server.llm.engine.scheduler.waiting == 2)
        for body in ({**LONG, "stream": True}, LONG):
            status, headers, data = server.ask("POST", CHAT, body)
            assert (status, json.loads(data)["error"]["code"]) == (429, "queue_full")
            assert int(headers["retry-after"]) > 0
        several = {"prompt": ["a", "b"], "max_tokens": 100_000, "ignore_eos": True}
        waiting.pop().close()
        assert until(lambda: server.llm.engine.scheduler.waiting == 1)
        assert server.post("/v1/completions", several)[0] == 429  # neither of the two keeps running
        running.close()
        waiting.pop().close()
        server.idle()


def test_a_server_that_stops_lets_answers_end_and_says_why_it_cut_others():
    with serving(ServerConfig(port=0, drain_timeout=4.0)) as server:  # enough for the short one on a busy machine
        short = {"messages": HELLO, "max_tokens": 150, "ignore_eos": True}
        got: dict[str, bytes] = {}

        def read(name, body):
            got[name] = stream(server, body).getresponse().read()

        readers = [threading.Thread(target=read, args=each) for each in (("short", short), ("long", LONG))]
        for reader in readers:
            reader.start()
        assert until(lambda: len(server.state.running) == 2)
        server.server.stop()
        assert until(lambda: server.state.draining)
        status, headers, data = server.ask("POST", CHAT, short)
        assert (status, json.loads(data)["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in headers
        assert server.ask("GET", "/health/ready")[0] == 503
        assert server.ask("GET", "/health/live")[0] == 200
        for reader in readers:
            reader.join(10)
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert got["short"].endswith(b"data: [DONE]\n\n")
        last = json.loads(got["long"].split(b"\n\n")[-2].removeprefix(b"data: "))
        assert last["error"]["code"] == "shutting_down"
        assert server.llm.engine.idle


def broke(server: Serving) -> None:
    """Make the engine fail in its next step, outside the handling of a single request."""
    server.llm.engine.step = lambda: 1 / 0


def test_an_engine_that_breaks_ends_the_server():
    """Open requests get errors, new ones are refused, all probes fail, and the server exits."""
    engine = EngineConfig(max_sequences=1, max_batch_tokens=16, page_size=4, max_waiting=8)
    with serving(engine=engine) as server:
        answer = stream(server).getresponse()
        assert answer.status == 200
        waiting = stream(server, {**LONG, "stream": False})
        assert until(lambda: server.llm.engine.scheduler.waiting == 1)
        half = socket.create_connection(("127.0.0.1", server.port))  # an incomplete body delays the exit
        half.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n".encode())
        assert until(lambda: server.state.active == 3)
        broke(server)

        last = json.loads(answer.read().split(b"\n\n")[-2].removeprefix(b"data: "))
        assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "engine_broken")
        failed = waiting.getresponse()  # not 503, which proxies retry: it may have caused the failure
        error = json.loads(failed.read())["error"]
        assert (failed.status, error["type"], error["code"]) == (500, "server_error", "engine_broken")
        assert int(failed.headers["retry-after"]) > 0

        for path in ("/health/live", "/health/ready", "/health"):
            status, _, data = server.ask("GET", path)
            assert (status, json.loads(data)) == (503, {"status": "broken"})
        for path, body in ((CHAT, LONG), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            status, headers, data = server.ask("POST", path, body)
            error = json.loads(data)["error"]
            assert (status, error["type"], error["code"]) == (503, "server_error", "engine_broken")
            assert int(headers["retry-after"]) > 0
        assert b"mistral_7b_engine_broken 1.0" in server.ask("GET", "/metrics")[2]
        half.close()
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert isinstance(server.server.broken.__cause__, ZeroDivisionError)


def test_an_engine_that_breaks_inside_another_server():
    """The application inside another server cannot exit, but reports the failure to every probe."""
    import asyncio

    import httpx

    with serving() as server:

        async def scene() -> None:
            inside = httpx.ASGITransport(server.server.config.app)
            async with httpx.AsyncClient(transport=inside, base_url="http://127.0.0.1") as client:
                assert (await client.get("/health/live")).status_code == 200
                assert "mistral_7b_engine_broken 0.0" in (await client.get("/metrics")).text
                broke(server)
                answer = (await client.post(CHAT, json={"messages": HELLO})).json()
                assert answer["error"]["code"] == "engine_broken"
                for path in ("/health/live", "/health/ready"):
                    assert (await client.get(path)).status_code == 503

        asyncio.run(scene())


def test_a_server_freezes_the_heap_while_it_runs():
    """A full collection over it would block the event loop."""
    gc.unfreeze()  # as in a process of its own; in this suite, conftest.py has frozen it
    try:
        with serving():
            assert gc.get_freeze_count() > 10_000
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_a_server_leaves_frozen_what_the_process_has_frozen():
    gc.freeze()
    before = gc.get_freeze_count()
    with serving():
        pass
    assert gc.get_freeze_count() > 0.9 * before  # some are freed meanwhile


def test_a_second_ctrl_c_logs_no_traceback_of_the_streams_it_cuts(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("uvicorn.error")
    try:
        with serving() as server:
            connection = stream(server)
            connection.getresponse().readline()
            for _ in range(2):
                server.server.handle_exit(signal.SIGINT, None)
            server.thread.join(10)
            connection.close()
        assert [record for record in caplog.records if record.exc_info] == []
    finally:
        log.filters.clear()
