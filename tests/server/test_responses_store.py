"""Stored responses: their bound, their owners, and the routes that read and delete them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Serving, serving

from mistral_7b.server.config import ServerConfig
from mistral_7b.server.openai.responses import routes
from mistral_7b.server.openai.responses.store import Store

ASK = {"input": "Hello", "max_output_tokens": 3, "temperature": 0}
KEYS = ("alice", "bob")


@pytest.fixture(scope="module")
def shared() -> Iterator[Serving]:
    """A server with two keys, which stores three responses."""
    with serving(ServerConfig(port=0, api_keys=KEYS, max_stored=3)) as it:
        yield it
        it.idle()


def ask(server: Serving, method: str, path: str, body: Any = None, key: str = "alice") -> tuple[int, Any]:
    status, _, data = server.ask(method, f"/v1/responses{path}", body, {"authorization": f"Bearer {key}"})
    return status, json.loads(data)


def item(name: str, text: str = "") -> dict[str, Any]:
    return {"id": name, "text": text}


def body(name: str, *output: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "output": list(output)}


def check(store: Store, owner: str, names: list[str]) -> None:
    """Sizes and items are those of the entries."""
    assert len(store) == len(names)
    entries = [store._entries[owner, name] for name in names]
    assert store.size == sum(entry.size for entry in entries)
    assert {name for _, name in store._items} == {name for entry in entries for name, _ in entry.items}


def test_the_least_recently_used_goes_first() -> None:
    store = Store(2, 1 << 20)
    for name in "ab":
        store.add("me", body(name, item(f"out-{name}")), (), [item(f"in-{name}")])
    assert store.get("me", "a") is not None
    store.add("me", body("c", item("out-c")), (), [item("in-c")])
    assert store.get("me", "b") is None
    assert store.item("me", "in-b") is None
    check(store, "me", ["a", "c"])
    assert store.remove("me", "a")
    assert not store.remove("me", "a")
    check(store, "me", ["c"])


def test_the_bytes_are_bounded() -> None:
    store = Store(1000, 10_000)
    for i in range(50):
        store.add("me", body(f"r{i}", item(f"o{i}", "x" * i * 10)), (), [item(f"i{i}", "y" * 100)])
        assert store.size <= 10_000
    assert 0 < len(store) < 50
    assert store.get("me", "r49") is not None
    before = len(store)
    store.add(
        "me", body("large"), (), [item("large-in", "z" * 20_000)]
    )  # alone over the bound: nothing is dropped for it
    assert store.get("me", "large") is None
    assert len(store) == before


def test_the_ids_are_counted() -> None:
    store = Store(1000, 1 << 20)
    store.add("me", body("short"), (), [{"id": "x" * 10}])
    before = store.size
    store.add("me", body("longs"), (), [{"id": "x" * 210}])
    assert store.size - 2 * before == 200 * (1 + 4)  # in the item, and as a key of up to 4 bytes a character


def test_a_conversation_survives_its_older_responses() -> None:
    store = Store(2, 1 << 20)
    items: tuple[Any, ...] = ()
    for i in range(5):
        store.add("me", body(f"r{i}", item(f"o{i}")), items, [item(f"i{i}")])
        found = store.get("me", f"r{i}")
        assert found is not None
        items = found.items
    assert [name for name, _ in items] == [f"{kind}{i}" for i in range(5) for kind in "io"]
    assert store.item("me", "o0") == item("o0")  # its response is gone, and a later one has it
    check(store, "me", ["r3", "r4"])
    for name in ("r3", "r4"):
        store.remove("me", name)
    check(store, "me", [])


def test_owners_are_strangers() -> None:
    store = Store(9, 1 << 20)
    store.add("me", body("a", item("x", "mine")), (), [])
    store.add("you", body("b", item("x", "yours")), (), [])
    assert store.get("you", "a") is None
    assert not store.remove("you", "a")
    assert store.item("you", "x") == item("x", "yours")
    assert store.item("me", "x") == item("x", "mine")


def test_the_key_of_another_reads_nothing(shared: Serving) -> None:
    _, mine = ask(shared, "POST", "", ASK)
    name = mine["id"]
    for method, path in (("GET", ""), ("GET", "/input_items"), ("DELETE", "")):
        status, out = ask(shared, method, f"/{name}{path}", key="bob")
        assert (status, out["error"]["message"]) == (404, f"Response with id '{name}' not found.")
    for more, status in (
        ({"previous_response_id": name}, 400),  # OpenAI's
        ({"input": [{"type": "item_reference", "id": mine["output"][0]["id"]}]}, 404),
    ):
        assert ask(shared, "POST", "", {**ASK, **more}, "bob")[0] == status
    assert ask(shared, "GET", f"/{name}")[1] == mine
    by_header = shared.ask("GET", f"/v1/responses/{name}", headers={"x-api-key": "alice"})  # the same key
    assert by_header[0] == 200


def test_unknown_and_unstored_responses(shared: Serving) -> None:
    _, out = ask(shared, "POST", "", {**ASK, "store": False})
    assert out["store"] is False
    for name in (out["id"], "resp_0"):
        assert ask(shared, "GET", f"/{name}")[0] == 404
        status, refused = ask(shared, "POST", "", {**ASK, "previous_response_id": name})
        assert status == 400
        assert refused["error"] == {
            "message": f"Previous response with id '{name}' not found.", "type": "invalid_request_error",
            "param": "previous_response_id", "code": "previous_response_not_found",
        }  # fmt: skip


def test_a_streamed_response_is_stored_before_its_end_is_sent(shared: Serving) -> None:
    _, _, data = shared.ask("POST", "/v1/responses", {**ASK, "stream": True}, {"authorization": "Bearer bob"})
    last = json.loads(data.decode().split("data: ")[-1])["response"]
    assert ask(shared, "GET", f"/{last['id']}", key="bob") == (200, last)
    status, out = ask(shared, "GET", f"/{last['id']}?stream=true", key="bob")
    assert (status, out["error"]["param"]) == (400, "stream")


def test_the_server_bounds_its_store(shared: Serving) -> None:
    names = [ask(shared, "POST", "", ASK)[1]["id"] for _ in range(4)]
    assert [ask(shared, "GET", f"/{name}")[0] for name in names] == [404, 200, 200, 200]
    assert ask(shared, "DELETE", f"/{names[1]}")[1] == {"id": names[1], "object": "response", "deleted": True}
    assert ask(shared, "DELETE", f"/{names[1]}")[0] == 404


def test_a_conversation_has_at_most_so_many_items(shared: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MOST_MESSAGES", 4)
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    first = ask(shared, "POST", "", {**ASK, "input": two})[1]["id"]  # two items and the response's
    status, out = ask(shared, "POST", "", {**ASK, "input": two, "previous_response_id": first})
    assert (status, out["error"]["param"]) == (400, "input")
    status, second = ask(shared, "POST", "", {**ASK, "previous_response_id": first})
    assert status == 200
    status, out = ask(shared, "POST", "", {**ASK, "previous_response_id": second["id"]})
    assert (status, out["error"]["param"]) == (400, "previous_response_id")
    assert "would have 6 items" in out["error"]["message"]


def test_messages_without_effect_are_not_stored(shared: Serving) -> None:
    empty = [{"role": "assistant", "content": text} for text in ("", [])]
    name = ask(shared, "POST", "", {**ASK, "input": [*empty, {"role": "user", "content": "a"}, *empty]})[1]["id"]
    page = ask(shared, "GET", f"/{name}/input_items")[1]["data"]
    assert [entry["role"] for entry in page] == ["user"]


def test_input_items_in_pages(shared: Serving) -> None:
    items = [{"role": "user", "content": f"number {i}"} for i in range(5)]
    name = ask(shared, "POST", "", {**ASK, "input": items})[1]["id"]
    seen, after = [], ""
    while True:
        page = ask(shared, "GET", f"/{name}/input_items?order=asc&limit=2{after}")[1]
        seen += [entry["content"][0]["text"] for entry in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert seen == [entry["content"] for entry in items]
    newest = ask(shared, "GET", f"/{name}/input_items?limit=1")[1]["data"]
    assert newest[0]["content"][0]["text"] == "number 4"
    for query, param in (("limit=0", "limit"), ("order=up", "order"), ("after=x", "after")):
        status, out = ask(shared, "GET", f"/{name}/input_items?{query}")
        assert (status, out["error"]["param"]) == (400, param)
