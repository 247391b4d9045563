"""/metrics: what Prometheus reads is what was done; and the dashboard asks for nothing else."""

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

DASHBOARD = pathlib.Path(__file__).parents[2] / "deploy" / "grafana.json"
ASK = {"messages": [{"role": "user", "content": "Say something, and then say it again."}], "temperature": 0}
Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving() as it, httpx.Client(base_url=it.url, timeout=30) as client:
        yield client


def scrape(client: httpx.Client) -> Samples:
    """By name and the labels' values."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name.removeprefix("mistral_7b_"), ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_what_was_done_is_counted(client: httpx.Client) -> None:
    before = scrape(client)
    usages = []
    for _ in range(2):
        body = client.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 7, **ASK}).json()
        usages.append(body["usage"])
    with client.stream("POST", "/v1/chat/completions", json={"max_tokens": 900, "stream": True, **ASK}) as stream:
        lines = stream.iter_lines()  # and no closing it: that would hang up
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
    assert grown("inter_token_latency_seconds_count") >= 12
    assert grown("request_prompt_tokens_sum") == 3 * prompt
    assert 0 < after["time_to_first_token_seconds_sum", ""] <= after["request_latency_seconds_sum", ""]


def test_clients_cannot_make_series(client: httpx.Client) -> None:
    before = set(scrape(client))
    for name in ("a", "b" * 50):
        client.post("/v1/chat/completions", json={"model": name, "user": name, **ASK})
        client.post("/v1/completions", json={"prompt": name, "max_tokens": 1, "cache_salt": name})
        client.get(f"/{name}", headers={"accept": name, "user-agent": name})
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
