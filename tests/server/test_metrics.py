"""/metrics: counters match the requests made, labels are bounded, and the dashboard uses existing metrics."""

from __future__ import annotations

import json
import pathlib
import re
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import serving
from waiting import until

from mistral_7b.engine.config import EngineConfig
from mistral_7b.server.state import State

DASHBOARD = pathlib.Path(__file__).parents[2] / "deploy" / "grafana.json"
ASK = {"messages": [{"role": "user", "content": "Say something, and then say it again."}], "temperature": 0}
Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving() as it, httpx.Client(base_url=it.url, timeout=30) as client:
        yield client


def scrape(client: httpx.Client) -> Samples:
    """Samples by name and label values."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name.removeprefix("mistral_7b_"), ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_tokens_found_on_disk_are_counted(tmp_path: pathlib.Path) -> None:
    engine = EngineConfig(max_sequences=2, max_batch_tokens=64, page_size=4, prefix_cache=tmp_path)
    found = []
    for _ in range(2):
        with serving(engine=engine) as it, httpx.Client(base_url=it.url, timeout=30) as client:
            body = client.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 3, **ASK}).json()
            found.append((body["usage"], scrape(client)))
    (first, _), (usage, samples) = found
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached == (usage["prompt_tokens"] - 1) // 4 * 4 > 0
    assert samples["prefix_cache_disk_hits_total", ""] == samples["prefix_cache_disk_queries_total", ""] == cached
    assert samples["prefix_cache_disk_read_bytes_total", ""] > 0
    assert samples["prefix_cache_disk_dropped_pages_total", ""] == 0


def test_what_was_done_is_counted(client: httpx.Client) -> None:
    before = scrape(client)
    usages = []
    for _ in range(2):
        body = client.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 7, **ASK}).json()
        usages.append(body["usage"])
    with client.stream("POST", "/v1/chat/completions", json={"max_tokens": 900, "stream": True, **ASK}) as stream:
        lines = stream.iter_lines()  # not closed, which would disconnect
        next(lines)
        during = scrape(client)
    deadline = time.monotonic() + 10
    while scrape(client)["requests_finished_total", "abort"] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    after = scrape(client)

    def grown(name: str, label: str = "") -> float:
        return after[name, label] - before[name, label]

    assert grown("requests_total") == 3
    assert grown("requests_finished_total", "length") == 2
    assert grown("requests_finished_total", "abort") == 1
    assert grown("requests_finished_total", "error") == 0
    prompt = usages[0]["prompt_tokens"]
    assert grown("prompt_tokens_total") == grown("prefix_cache_queries_total") == 3 * prompt
    cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert grown("prefix_cache_hits_total") == 2 * cached
    assert grown("generation_tokens_total") >= 15
    assert (during["requests_running", ""], during["requests_waiting", ""]) == (1, 0)
    assert 0 < during["kv_cache_usage_ratio", ""] < 1
    assert after["requests_running", ""] == after["kv_cache_usage_ratio", ""] == 0
    for name, count in (
        ("time_to_first_token_seconds", 3), ("request_latency_seconds", 3), ("request_queue_time_seconds", 3),
        ("request_prompt_tokens", 3), ("request_generation_tokens", 3),
    ):  # fmt: skip
        assert grown(f"{name}_count") == count, name
    assert 0 < grown("inter_token_latency_seconds_count") <= grown("generation_tokens_total") - 3
    assert grown("request_prompt_tokens_sum") == 3 * prompt
    assert 0 < after["time_to_first_token_seconds_sum", ""] <= after["request_latency_seconds_sum", ""]


def test_every_token_of_a_piece_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(State, "write_interval", lambda self: 0.05)  # pieces of many tokens, as on a busy server
    with serving() as it, httpx.Client(base_url=it.url, timeout=60) as client:
        client.post(
            "/v1/completions", json={"prompt": [1, 2], "max_tokens": 300, "ignore_eos": True}
        ).raise_for_status()
        assert scrape(client)["inter_token_latency_seconds_count", ""] > 100


def test_http_requests_are_counted_by_template_method_and_status(client: httpx.Client) -> None:
    before = scrape(client)
    asked = [
        ("GET", "/v1/models", 200), ("GET", "/v1/models/tiny", 200), ("GET", "/v1/models/other", 404),
        ("PUT", "/v1/models", 405), ("POST", "/v1/completions", 400), ("GET", "/nowhere", 404),
        ("BREW", "/v1/models", 405), ("HEAD", "/", 200),
    ]  # fmt: skip
    for method, path, status in asked:
        assert client.request(method, path).status_code == status
    after = scrape(client)

    def grown(route: str, method: str, status: str) -> float:
        sample = "http_requests_total", f"{method},{route},{status}"
        return after[sample] - before.get(sample, 0)

    assert grown("/v1/models", "GET", "200") == grown("/v1/models/{name}", "GET", "200") == 1
    assert grown("/v1/models/{name}", "GET", "404") == grown("/v1/models", "PUT", "405") == 1
    assert grown("/v1/completions", "POST", "400") == grown("none", "GET", "404") == 1
    assert grown("/v1/models", "other", "405") == grown("/", "HEAD", "200") == 1
    assert after["http_request_duration_seconds_count", "POST,/v1/completions"] >= 1
    assert not any("nowhere" in labels or "BREW" in labels for _, labels in after)


def test_who_finds_the_queue_full_is_refused_and_no_error(client: httpx.Client) -> None:
    engine = EngineConfig(max_sequences=1, max_batch_tokens=16, page_size=4, max_waiting=4)
    with serving(engine=engine) as it, httpx.Client(base_url=it.url, timeout=30) as client:
        before = scrape(client)
        body = {"prompt": ["a", "b", "c", "d"], "max_tokens": 100_000, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}):
            assert until(lambda: it.llm.engine.scheduler.waiting == 3)
            assert client.post("/v1/completions", json=body).status_code == 429
        it.idle()
        after = scrape(client)
    ends = {
        labels: after[name, labels] - before[name, labels]
        for name, labels in after
        if name == "requests_finished_total"
    }
    assert ends["refused"] >= 1
    assert ends["error"] == 0
    assert ends["refused"] + ends["abort"] == after["requests_total", ""] == 8
    # refused requests are not in the latency histograms
    assert after["request_latency_seconds_count", ""] == after["requests_total", ""] - ends["refused"]


def test_clients_cannot_make_series(client: httpx.Client) -> None:
    def ask(name: str) -> None:
        client.post("/v1/chat/completions", json={"model": name, "user": name, **ASK})
        client.post("/v1/completions", json={"prompt": name, "max_tokens": 1, "cache_salt": name})
        client.get(f"/{name}", headers={"accept": name, "user-agent": name})
        client.get(f"/v1/models/{name}")
        client.get(f"/web/{name}")
        client.request(name.upper(), "/v1/models")

    ask("first")
    before = set(scrape(client))
    for name in ("a", "b" * 50):
        ask(name)
    assert set(scrape(client)) == before


def test_the_dashboard_asks_for_what_there_is(client: httpx.Client) -> None:
    names = {name for name, _ in scrape(client)}
    board = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"mistral_7b_(\w+)", expression)}
    assert len(asked) > 15
    assert asked <= names
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_event_loop_is_looked_after(client: httpx.Client) -> None:
    time.sleep(0.2)
    seen = scrape(client)
    assert seen["event_loop_lag_seconds_count", ""] >= 10
    assert seen["event_loop_blocked_seconds_sum", ""] <= seen["event_loop_lag_seconds_sum", ""]
    assert 0 < seen["event_loop_longest_lag_seconds", ""] < 10
    assert seen["event_loop_longest_block_seconds", ""] <= seen["event_loop_longest_lag_seconds", ""]
    assert seen["kv_cache_pages_held", ""] == 0
