"""Grammars that take seconds to compile: clients that hang up meanwhile, and what is said where no more fit."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from serving import HELLO, Serving, serving
from waiting import until

from mistral_7b.engine.grammar import client, compile_queue
from mistral_7b.engine.grammar.client import Grammars

CHAT = "/v1/chat/completions"
SLOW = "start: s\ns: " + " | ".join(f'"{i}" s' for i in range(60_000))  # seconds, and not yet a MiB as JSON


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        yield running


def asking(server: Serving, path: str = CHAT, grammar: str = SLOW) -> socket.socket:
    """A client that asks, and waits."""
    body: dict[str, Any] = {"max_tokens": 4, "structured_outputs": {"grammar": grammar}}
    body |= {"prompt": "a"} if path == "/v1/completions" else {"messages": HELLO}
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def compiling(grammars: Grammars) -> list[client.GrammarProcess]:
    with grammars.compile_queue.changed:
        return [
            process
            for process in grammars._alive
            if grammars.compile_queue.is_compiling(process) and process.waiting_states
        ]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_who_hangs_up_ends_what_is_compiled_for_him_alone(server: Serving, path: str) -> None:
    grammars = server.llm.inputs.grammars
    first, second = asking(server, path), asking(server, path)
    assert until(lambda: any(len(process.waiting_states) == 2 for process in compiling(grammars)), 10)
    (process,) = compiling(grammars)
    first.close()
    assert until(lambda: len(process.waiting_states) == 1, 2)
    assert until(lambda: server.state.active == 1, 2)
    assert os.path.exists(f"/proc/{process._pid}")
    assert not process.terminated
    second.close()
    assert until(lambda: process.terminated, 1)
    assert until(lambda: ended(process._pid), 1)
    assert compiling(grammars) == []
    server.idle()


def test_who_hangs_up_leaves_the_queue(server: Serving) -> None:
    grammars = server.llm.inputs.grammars
    usual, grammars.compile_queue.max_quick = grammars.compile_queue.max_quick, 0
    try:
        sock = asking(server, grammar='start: "a"')
        assert until(lambda: len(grammars.compile_queue._waiting) == 1, 10)
        sock.close()
        assert until(lambda: not grammars.compile_queue._waiting, 2)
        server.idle()
    finally:
        grammars.compile_queue.max_quick = usual


def test_what_no_turn_is_left_for_is_told_to_come_again(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_queue, "MAX_WAITING", 0)
    status, headers, data = server.ask("POST", CHAT, {"messages": HELLO, "structured_outputs": {"regex": "abc?"}})
    error = json.loads(data)["error"]
    assert (status, error["code"]) == (429, "queue_full")
    assert "0 grammars wait to be compiled" in error["message"]
    assert "retry-after" in headers


def test_a_process_that_cannot_be_started_is_the_servers_fault(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork(self: client.ForkServer) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(client.ForkServer, "fork", fork)
        asked = {"messages": HELLO, "structured_outputs": {"regex": "abcd?"}}
        status, headers, data = server.ask("POST", CHAT, asked)
    error = json.loads(data)["error"]
    assert (status, error["code"], error["param"]) == (503, "no_process", None)
    assert "Too many open files" in error["message"]
    assert "retry-after" in headers
    assert server.ask("POST", CHAT, asked)[0] == 200


def ended(pid: int) -> bool:
    """Whether a process runs no more; its parent may not have looked yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
