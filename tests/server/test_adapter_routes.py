"""/v1/adapters: loading requires an admin key and stays inside one folder; requests use adapters by name."""

from __future__ import annotations

import os
import pathlib
import pickle
from collections.abc import Iterator

import httpx
import pytest
import torch
from serving import serving
from tiny import tiny_args

from mistral_7b.lora.files import Adapter, Factors, save_adapter
from mistral_7b.server.config import ServerConfig

ARGS = tiny_args(vocab_size=32768, sliding_window=64, max_seq_len=1024)  # those of the server's model
KEY, ADMIN = "key-of-the-tests", "admin-of-the-tests"


def adapter(seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(2, ARGS.dim, generator=draw)
    b = torch.randn(ARGS.n_heads * ARGS.head_dim, 2, generator=draw)
    return Adapter({"layers.1.attention.wq": Factors(a, b, 2.0)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with two adapters, a pickle, an invalid adapter, and links to targets outside."""
    root = tmp_path_factory.mktemp("all")
    inside, outside = root / "adapters", root / "outside"
    save_adapter(adapter(1), inside / "sql", ARGS)
    save_adapter(adapter(2), inside / "poems.v2", ARGS)
    save_adapter(adapter(3), outside / "secret", ARGS)
    (inside / "broken").mkdir()
    (inside / "broken" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    (inside / "pickled").mkdir()
    (inside / "pickled" / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    (inside / "linked").symlink_to(outside / "secret")
    (inside / "half-linked").mkdir()
    for name in os.listdir(outside / "secret"):
        (inside / "half-linked" / name).symlink_to(outside / "secret" / name)
    (inside / ".hidden").symlink_to(inside / "sql")
    return inside


@pytest.fixture(scope="module")
def url(folder: pathlib.Path) -> Iterator[str]:
    config = ServerConfig(port=0, api_keys=(KEY,), admin_keys=(ADMIN,), adapter_folder=str(folder))
    with serving(config) as it:
        yield it.url


@pytest.fixture
def admin(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {ADMIN}"}, timeout=30) as client:
        yield client


@pytest.fixture
def user(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


def text_of(client: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": "Once", "max_tokens": 12, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_an_adapter_comes_and_goes(admin: httpx.Client, user: httpx.Client) -> None:
    plain = text_of(user, "tiny")
    listed = admin.get("/v1/adapters").json()
    assert listed["data"] == []
    assert listed["available"] == ["broken", "poems.v2", "sql"]
    answer = admin.post("/v1/adapters", json={"name": "sql"})
    assert answer.status_code == 200
    assert answer.json() == {"id": "sql", "object": "adapter", "bytes": answer.json()["bytes"]}
    assert answer.json()["bytes"] > 0
    assert admin.post("/v1/adapters", json={"name": "rhymes", "folder": "poems.v2"}).status_code == 200
    seen = user.get("/v1/adapters").json()
    assert [one["id"] for one in seen["data"]] == ["sql", "rhymes"]
    assert seen["available"] is None
    assert [m["id"] for m in user.get("/v1/models").json()["data"]] == ["tiny", "sql", "rhymes"]
    assert len({plain, text_of(user, "sql"), text_of(user, "rhymes")}) == 3
    assert text_of(user, "tiny") == plain
    for name in ("sql", "rhymes"):
        assert admin.delete(f"/v1/adapters/{name}").json() == {"id": name, "object": "adapter", "deleted": True}
    assert admin.get("/v1/adapters").json()["data"] == []
    assert user.post("/v1/completions", json={"model": "sql", "prompt": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "../outside/secret"}, 400),
        ({"name": "x", "folder": "../outside/secret"}, 400),
        ({"name": "x", "folder": "/etc"}, 400),
        ({"name": "x", "folder": ".."}, 400),
        ({"name": "x", "folder": "."}, 400),
        ({"name": "x", "folder": "sql\n"}, 400),
        ({"name": "x", "folder": "sql\x00"}, 400),
        ({"name": "", "folder": "sql"}, 400),
        ({"name": "n" * 65, "folder": "sql"}, 400),
        ({"name": "x", "path": "sql"}, 400),
        ({"name": "x", "folder": "linked"}, 404),
        ({"name": "x", "folder": "half-linked"}, 404),
        ({"name": "x", "folder": ".hidden"}, 400),
        ({"name": "x", "folder": "pickled"}, 404),
        ({"name": "nothing"}, 404),
        ({"name": "broken"}, 422),
        ({"name": "tiny", "folder": "sql"}, 409),
    ],
)
def test_nothing_else_is_opened(
    admin: httpx.Client, folder: pathlib.Path, body: dict[str, str], status: int
) -> None:
    answer = admin.post("/v1/adapters", json=body)
    assert answer.status_code == status, answer.text
    assert str(folder.parent) not in answer.text
    assert admin.get("/v1/adapters").json()["data"] == []


def test_it_takes_an_admin_key(user: httpx.Client, url: str) -> None:
    assert user.post("/v1/adapters", json={"name": "sql"}).status_code == 403
    assert user.delete("/v1/adapters/sql").status_code == 403
    assert httpx.post(f"{url}/v1/adapters", json={"name": "sql"}).status_code == 401
    assert httpx.get(f"{url}/v1/adapters").status_code == 401


def test_conflicts(admin: httpx.Client, user: httpx.Client) -> None:
    assert admin.delete("/v1/adapters/nothing").status_code == 404
    assert admin.post("/v1/adapters", json={"name": "sql"}).status_code == 200
    try:
        again = admin.post("/v1/adapters", json={"name": "sql"})
        assert (again.status_code, again.json()["error"]["param"]) == (409, "name")
        body = {"model": "sql", "prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with user.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # not closed, which would disconnect
            next(lines)
            assert admin.delete("/v1/adapters/sql").status_code == 409
    finally:
        for _ in range(200):
            if (last := admin.delete("/v1/adapters/sql").status_code) != 409:
                break
    assert last == 200


def test_without_a_folder_nothing_is_loaded() -> None:
    with serving(ServerConfig(port=0, admin_keys=(ADMIN,))) as it:
        headers = {"authorization": f"Bearer {ADMIN}"}
        answer = httpx.post(f"{it.url}/v1/adapters", json={"name": "sql"}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_folder")
        assert httpx.get(f"{it.url}/v1/adapters", headers=headers).json()["available"] == []
