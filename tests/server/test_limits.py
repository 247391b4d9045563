"""Limits of memory, context, bodies and connections, and logging of prompts."""

from __future__ import annotations

import json
import logging

from serving import ENGINE, HELLO, Serving, serving

from mistral_7b.engine.config import EngineConfig
from mistral_7b.server.config import ServerConfig
from mistral_7b.server.http.guard import BODIES

CHAT = "/v1/chat/completions"


def test_an_answer_without_a_limit_fits_what_memory_there_is():
    """The context has 1024 tokens, the KV pages hold about 200."""
    engine = EngineConfig(max_sequences=2, max_batch_tokens=64, page_size=4, kv_cache_bytes=100_000)
    with serving(engine=engine, sliding_window=None) as server:
        room = server.llm.engine.pool.n_pages * 4
        assert room < 500
        status, out = server.post(CHAT, {"messages": HELLO, "ignore_eos": True})
        assert status == 200
        assert out["choices"][0]["finish_reason"] == "length"
        assert out["usage"]["total_tokens"] == room
        status, out = server.post(CHAT, {"messages": HELLO, "max_tokens": 600})
        assert (status, out["error"]["code"]) == (422, "too_large")
        status, out = server.post(CHAT, {"messages": HELLO, "max_tokens": 2000})
        assert (status, out["error"]["code"]) == (400, "context_length_exceeded")
        server.idle()


def test_a_whole_context_is_the_limit_where_there_is_room():
    with serving(sliding_window=None, max_seq_len=128) as server:
        status, out = server.post(CHAT, {"messages": HELLO, "ignore_eos": True})
        assert (status, out["usage"]["total_tokens"]) == (200, 128)


def test_bodies_that_are_too_much_together(server: Serving):
    much = BODIES * server.state.config.max_body_bytes
    (account,) = server.state.accounts.all
    server.state.held += much
    account.held += much
    try:
        status, headers, data = server.ask("POST", CHAT, {"messages": HELLO, "max_tokens": 1})
        assert (status, json.loads(data)["error"]["code"]) == (503, "bodies_too_large")
        assert "retry-after" in headers
    finally:
        server.state.held -= much
        account.held -= much
    server.idle()


def test_prompts_are_logged_where_that_was_asked_for(caplog):
    with serving(ServerConfig(port=0, log_prompts=True), ENGINE) as server:
        with caplog.at_level(logging.INFO, "mistral_7b.access"):
            server.post(CHAT, {"messages": HELLO, "max_tokens": 1})
            server.post("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 1})
            server.idle()
        chat, two = [r.fields for r in caplog.records if r.fields["status"] == 200]
        assert HELLO[0]["content"] in chat["prompts"][0]
        assert two["prompts"] == ["one", "two"]
        assert two["completion_tokens"] == 2
