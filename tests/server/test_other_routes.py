"""Routes of other servers: similarity, version, ping; and clear answers where there is nothing."""

from __future__ import annotations

import json
import socket
from typing import Any

import numpy as np
import pytest
from serving import Serving
from waiting import until

from mistral_7b import __version__

DOCUMENTS = ["one", "two two", "three and four"]


def vectors(server: Serving, texts: list[str]) -> Any:
    return np.array([d["embedding"] for d in server.post("/v1/embeddings", {"input": texts})[1]["data"]])


def test_scores_are_cosines(server: Serving) -> None:
    query, *rest = vectors(server, ["two", *DOCUMENTS])
    status, out = server.post("/v1/score", {"text_1": "two", "text_2": DOCUMENTS})
    assert status == 200
    assert [d["score"] for d in out["data"]] == pytest.approx([float(query @ v) for v in rest], abs=1e-5)
    pairs = server.post("/v1/score", {"text_1": DOCUMENTS, "text_2": DOCUMENTS})[1]["data"]
    assert [d["score"] for d in pairs] == pytest.approx([1, 1, 1], abs=1e-5)
    status, out = server.post("/v1/score", {"text_1": DOCUMENTS[:2], "text_2": DOCUMENTS})
    assert (status, out["error"]["param"]) == (400, "text_1")


def test_documents_are_ranked(server: Serving) -> None:
    query, *rest = vectors(server, ["two", *DOCUMENTS])
    scores = [float(query @ v) for v in rest]
    status, out = server.post("/v1/rerank", {"model": "tiny", "query": "two", "documents": DOCUMENTS, "top_n": 2})
    assert status == 200
    best = sorted(range(3), key=lambda i: -scores[i])[:2]
    assert [(r["index"], r["document"]["text"]) for r in out["results"]] == [(i, DOCUMENTS[i]) for i in best]
    assert [r["relevance_score"] for r in out["results"]] == pytest.approx([scores[i] for i in best], abs=1e-5)
    bare = server.post("/v1/rerank", {"query": "two", "documents": DOCUMENTS, "return_documents": False})[1]
    assert all("document" not in result for result in bare["results"])
    status, out = server.post("/v1/rerank", {"query": "two", "documents": []})
    assert (status, out["error"]["param"]) == (400, "documents")


def test_there_is_no_fill_in_the_middle(server: Serving) -> None:
    status, out = server.post("/v1/fim/completions", {"model": "tiny", "prompt": "def", "suffix": "return"})
    assert (status, out["error"]["code"]) == (400, "fim_not_supported")
    assert "fill-in-the-middle" in out["error"]["message"]


def test_version_and_ping(server: Serving) -> None:
    assert json.loads(server.ask("GET", "/version")[2]) == {"version": __version__}
    assert server.ask("GET", "/ping")[0] == server.ask("POST", "/ping")[0] == server.ask("HEAD", "/ping")[0] == 200


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "path", ["/v1/images/generations", "/v1/nothing", "/v1", "/api/pull", "/api/nothing/more"]
)
def test_unknown_routes_are_told_in_json(server: Serving, method: str, path: str) -> None:
    status, headers, data = server.ask(method, path, {} if method == "POST" else None)
    error = json.loads(data)["error"]
    assert (status, headers["content-type"]) == (404, "application/json")
    told = error if path.startswith("/api/") else error["message"]
    assert f"there is no route {path}" in told
    if not path.startswith("/api/"):
        assert (error["type"], error["code"]) == ("not_found_error", "no_such_route")


def test_a_wrong_method_is_told_in_json(server: Serving) -> None:
    status, headers, data = server.ask("GET", "/v1/chat/completions")
    assert (status, json.loads(data)["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in headers["allow"]


def test_no_packet_of_an_answer_waits_for_an_acknowledgement(server: Serving) -> None:
    """Nagle's algorithm is off: it would delay the body of each answer on a kept connection by 40 ms."""
    opened: Any = server.server.server_state.connections
    with socket.create_connection(("127.0.0.1", server.port)):
        assert until(lambda: opened)
        for connection in list(opened):
            accepted = connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
