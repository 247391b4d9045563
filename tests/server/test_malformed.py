"""Ten kinds of malformed HTTP, a few requests of each; experiments/serving_malformed.py sends a thousand."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h11
import pytest
from serving import HELLO, Serving, serving

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from serving_clients import post
from serving_malformed import BODIES, KINDS, bombard

from mistral_7b.server.config import ServerConfig
from mistral_7b.server.http.errors import ClientGoneError, HttpError
from mistral_7b.server.http.guard import _Exchange
from mistral_7b.server.serve import COLLECT_IDLE


@pytest.fixture(scope="module")
def patient() -> Iterator[Serving]:
    """A server with a short timeout for bodies."""
    for body in BODIES.values():
        if "model" in body:
            body["model"] = "tiny"
    with serving(ServerConfig(port=0, body_timeout=1.0)) as it:
        yield it


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_refused_and_leaves_nothing_behind(patient: Serving, name: str) -> None:
    count = 6 if name == "100 MB body" else 40
    files = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else None
    outcome = asyncio.run(bombard(patient.port, KINDS[name], count, count if name == "slow body" else 4))
    assert not outcome.wrong, outcome.wrong[:3]
    assert sum(outcome.statuses.values()) == count
    patient.idle()
    while files is not None and len(os.listdir("/proc/self/fd")) > files + 2 and outcome.slowest < 5:
        time.sleep(0.05)  # the server closes sockets a moment later
        outcome.slowest += 0.05
    assert files is None or len(os.listdir("/proc/self/fd")) <= files + 2
    assert patient.llm.engine.pool.held == 0


@pytest.mark.parametrize("size", [90_000, 130_000, 260_000])
def test_a_head_is_held_to_its_limit_however_fast_it_comes(patient: Serving, size: int) -> None:
    for head in (
        b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n",
    ):
        said = patient.raw(head % (b"a" * size), 2)
        assert said.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        error = json.loads(said.partition(b"\r\n\r\n")[2])["error"]
        assert (error["code"], list(error)) == ("head_too_large", ["message", "type", "param", "code"])


def test_a_body_that_is_too_large_is_free_without_the_collector(patient: Serving) -> None:
    gc.collect()
    gc.disable()
    try:
        asyncio.run(bombard(patient.port, KINDS["100 MB body"], 12, 2))
        patient.idle()
        time.sleep(0.1)
        left = [o for o in gc.get_objects() if isinstance(o, (HttpError, _Exchange))]
    finally:
        gc.enable()
    assert not left, gc.get_referrers(left[0])


def test_connections_that_sent_garbage_are_free_without_the_collector(patient: Serving) -> None:
    def held() -> set[int]:
        return {id(o) for o in gc.get_objects() if isinstance(o, (h11.RemoteProtocolError, h11.Connection))}

    gc.collect()
    gc.disable()
    try:
        before = len(held())  # of tests before this one, whose connections may still be closing
        for _ in range(20):
            assert patient.raw(b"\x00 bad \x01\r\n\r\n", 2).startswith(b"HTTP/1.1 400 ")
        time.sleep(0.3)
        left = len(held()) - before
    finally:
        gc.enable()
    assert left <= 2


def test_streams_that_clients_left_are_free_without_the_collector(patient: Serving) -> None:
    body = {"messages": HELLO, "max_tokens": 400, "stream": True, "ignore_eos": True}
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", patient.port))
            client.sendall(post("/v1/chat/completions", body))
            client.recv(200)
            client.close()
        patient.idle()
        time.sleep(0.1)
        left = [o for o in gc.get_objects() if isinstance(o, (ClientGoneError, _Exchange))]
    finally:
        gc.enable()
    assert not left


def test_full_collections_run_while_the_server_is_idle(patient: Serving) -> None:
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    patient.idle()
    gc.callbacks.append(note)
    try:
        for _ in range(COLLECT_IDLE + 1):
            gc.collect(1)
        for _ in range(100):
            if 2 in generations:
                break
            time.sleep(0.02)
    finally:
        gc.callbacks.remove(note)
    assert 2 in generations


def test_the_collector_looks_for_large_bodies_that_errors_keep(patient: Serving) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(90):
            assert patient.ask("POST", "/v1/completions", b'["' + b"a" * 1_000_000)[0] == 400
        left = [o for o in gc.get_objects() if isinstance(o, _Exchange)]
    finally:
        gc.enable()
    assert len(left) < 68


def test_what_is_quoted_is_cut(patient: Serving) -> None:
    for body in ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, {"prompt": [int("9" * 400)]}):
        status, answer = patient.post("/v1/completions", body)
        assert status == 400
        assert len(answer["error"]["message"]) <= 500
