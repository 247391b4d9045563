"""CONTRIBUTING's recipes for a route and a command, followed: what they name is all that is needed."""

from __future__ import annotations

import pathlib
import sys
from types import ModuleType

import pytest
from fastapi import APIRouter
from serving import serving

from mistral_7b import cli
from mistral_7b.server import app
from mistral_7b.server.openai.body import Body
from mistral_7b.server.state import State

COMMAND = '''
import dataclasses

from mistral_7b.cli.inputs import read_flags


@dataclasses.dataclass(frozen=True)
class Shout:
    """Print a text in capitals."""

    text: str
    """The text."""
    times: int = 1
    """How often."""


def run(argv: list[str]) -> int:
    args = read_flags(Shout, "shout", argv)
    print(" ".join([args.text.upper()] * args.times))
    return 0
'''


class WordsRequest(Body):
    """The request body of POST /v1/words."""

    text: str


def words_module() -> ModuleType:
    def router(state: State) -> APIRouter:
        routes = APIRouter()

        @routes.post("/v1/words")
        async def count(body: WordsRequest) -> dict[str, int | str]:
            """Count the words of a text."""
            return {"words": len(body.text.split()), "model": state.model_name}

        return routes

    module = ModuleType("words")
    module.router = router  # type: ignore[attr-defined]
    return module


def test_a_route_needs_its_router_its_body_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ROUTERS", (*app.ROUTERS, words_module()))
    with serving() as server:
        assert server.post("/v1/words", {"text": "one two"}) == (200, {"words": 2, "model": "tiny"})
        status, refused = server.post("/v1/words", {"text": 1})
        assert (status, refused["error"]["param"]) == (400, "text")
        assert "/v1/words" in server.ask("GET", "/openapi.json")[2].decode()


def test_a_command_needs_its_module_and_an_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "shout.py").write_text(COMMAND)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])  # as if it were in cli/
    monkeypatch.setitem(cli.COMMANDS, "shout", "print a text in capitals")
    assert cli.main(["shout", "--text", "hi", "--times", "2"]) == 0
    assert capsys.readouterr().out == "HI HI\n"
    assert cli.main(["shout", "--tex", "hi"]) == 2
    assert cli.main(["--help"]) == 0
    assert "print a text in capitals" in capsys.readouterr().out
    sys.modules.pop("mistral_7b.cli.shout")
