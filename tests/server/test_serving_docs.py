"""The documents' curl commands run against a real server, and deploy/ uses existing metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Serving, serving

from mistral_7b.server.config import ServerConfig

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```sh\n(.*?)```", re.S)
COMMANDS = [
    (page, command)
    for page in ("docs/serving.md", "docs/tutorial.md", "deploy/README.md")
    for block in BLOCK.findall((ROOT / page).read_text())
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("curl")
]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("adapters")
    with serving(ServerConfig(port=0, admin_keys=("boss",), adapter_folder=str(folder))) as server:
        yield server


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command[:60] for _, command in COMMANDS])
def test_curl_is_answered(ready: Serving, page: str, command: str) -> None:
    command = (
        re.sub(r"(127\.0\.0\.1|localhost):8000", rf"\1:{ready.port}", command)
        .replace("demo", "tiny")
        .replace("starter", "tiny")
    )
    done = subprocess.run(
        ["bash", "-c", command.replace("curl", "curl --silent --show-error --write-out '\\n%{http_code}'", 1)],
        capture_output=True, text=True, timeout=20, check=False,
        env={"PATH": "/usr/bin:/bin", "MISTRAL_7B_ADMIN_KEY": "boss"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, _, status = done.stdout.rpartition("\n")
    if "/v1/adapters" in command:  # the 404 for a missing adapter shows that the admin key was accepted
        assert status in ("400", "404"), text
        assert "sql" in text
    elif " -N " in command:
        assert (status, text.count("data: ") > 3) == ("200", True), text
        assert text.rstrip().endswith("[DONE]" if "chat" in command else '{"type":"message_stop"}')
    else:
        assert (status, type(json.loads(text))) == ("200", dict)


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.S)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[s.split("\n")[0] for s in SNIPPETS])
def test_clients_in_python_are_answered(ready: Serving, snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(snippet.split()[1])
    exec(compile(snippet.replace(":8000", f":{ready.port}").replace('"demo"', '"tiny"'), "serving.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_documents_have_commands() -> None:
    assert len(COMMANDS) >= 6
    assert sum(" -N " in command for _, command in COMMANDS) >= 2


def test_alerts_and_prometheus_name_what_there_is(ready: Serving) -> None:
    rules, there = (ROOT / "deploy" / "alerts.yml").read_text(), ready.ask("GET", "/metrics")[2].decode()
    names = set(re.findall(r"\bmistral_7b_\w+|\bprocess_\w+", "".join(re.findall(r"expr: (.*)", rules))))
    assert len(names) >= 6
    for name in names:
        assert re.search(rf"^# TYPE {name.removesuffix('_bucket')} ", there, re.M), name
    scrape = (ROOT / "deploy" / "prometheus.yml").read_text()
    assert set(re.findall(r'job="(\w+)"', rules)) == set(re.findall(r"job_name: (\w+)", scrape)) == {"mistral_7b"}
    assert f"rule_files: [{'alerts.yml'}]" in scrape
