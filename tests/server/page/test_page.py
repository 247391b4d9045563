"""The page's files: headers, caching, size, and no resources of other hosts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import fields

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI
from starlette.testclient import TestClient
from waiting import soon

from mistral_7b.sampling.params import SamplingParams
from mistral_7b.server.page import TYPES, WEB, files, router

OWN = sorted(p for p in WEB.iterdir() if p.suffix in (".js", ".css", ".html", ".svg"))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(router(None))  # type: ignore[arg-type]
    with TestClient(app) as client:
        yield client


def test_every_file_has_its_type_and_the_policy(client: TestClient) -> None:
    for name in files():
        response = client.get(f"/web/{name}")
        assert response.status_code == 200
        assert response.content == (WEB / name).read_bytes()
        assert response.headers["content-type"] == TYPES["." + name.rsplit(".", 1)[1]]
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"http|\*", policy)
    assert client.get("/").content == (WEB / "index.html").read_bytes()


@pytest.mark.parametrize("packing", ["gzip", "identity"])
def test_what_has_not_changed_is_not_sent_again(client: TestClient, packing: str) -> None:
    first = client.get("/", headers={"accept-encoding": packing})
    assert first.headers.get("content-encoding", "identity") == packing
    tag = {"if-none-match": first.headers["etag"], "accept-encoding": packing}
    again = client.get("/", headers=tag)
    assert (again.status_code, again.content) == (304, b"")
    other = {**tag, "accept-encoding": "identity" if packing == "gzip" else "gzip"}
    assert client.get("/", headers=other).status_code == 200  # the ETag depends on the encoding


@pytest.mark.parametrize("name", [
    "nothing.js", "../page.py", "..%2fpage.py", "%2e%2e/page.py", "vendor", "vendor/", "vendor/inter.LICENSE",
    "/etc/passwd", "",
])  # fmt: skip
def test_no_other_path_is_opened(client: TestClient, name: str) -> None:
    assert client.get(f"/web/{name}").status_code == 404


def test_the_whole_page_is_light_and_soon_there(client: TestClient) -> None:
    assert sum(len(file.plain) for file in files().values()) <= 600_000
    soon(0.05, lambda: client.get("/"), clock=time.perf_counter)


def test_nothing_is_inline_or_from_elsewhere() -> None:
    html = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son[a-z]+=|<style|javascript:", html)
    assert re.findall(r"<script[^>]*>([^<]*)", html) == ["", ""]
    known = set(files())
    for path in OWN:
        text = path.read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, path.name
        found = re.findall(
            r"(?:from|import\()\s*\"\./([^\"]+)\"|(?:href|src)=\"/web/([^\"]+)\"|url\(\"([^\"]+)\"\)", text
        )
        assert {"".join(names) for names in found} <= known, path.name
    assert re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function",
                     "".join(p.read_text(encoding="utf-8") for p in OWN)) is None  # fmt: skip


def test_libraries_keep_their_licences() -> None:
    for path in (WEB / "vendor").glob("*"):
        if path.suffix != ".LICENSE":
            assert path.with_suffix(".LICENSE").stat().st_size > 500, path.name


def test_the_panel_shows_the_defaults_that_hold() -> None:
    rows = re.findall(
        r'\bname: "(\w+)",.*?usual: "([^"]+)"', (WEB / "settings.js").read_text(encoding="utf-8"), re.S
    )
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    assert len(rows) == 9
    for name, usual in rows:
        if name not in (
            "max_tokens",
            "seed",
        ):  # described in words
            assert float(usual) == defaults[name], name
