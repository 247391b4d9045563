"""--stop-token: more tokens that end generation, by spelling or id."""

from __future__ import annotations

import json

import pytest
from command import SHAPE, write_model
from refusals import refused

from mistral_7b.cli.chat import Chat
from mistral_7b.cli.inputs import ModelOptions, UsageError, read_flags
from mistral_7b.cli.serve import Serve
from mistral_7b.errors import TokenizerError

V = SHAPE["vocab_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "padded", vocab_size=V + 64, sliding_window=64))


@pytest.mark.parametrize(
    ("spelled", "token"), [("[TOOL_CALLS]", 5), (" weather", 8854), (str(V + 3), V + 3), ("5", 5), (None, 5)]
)
def test_generation_ends_there(run, folder: str, spelled: str | None, token: int) -> None:
    flags = ["--temperature", "0", "--max-tokens", "5", "--logit-bias", str(token), "100", "--json"]
    stop = [] if spelled is None else ["--stop-token", "[INST]", "--stop-token", spelled]
    result = run("generate", folder, "--prompt", "a b", *flags, *stop)
    assert result.code == 0, result.err
    (output,) = json.loads(result.out)["outputs"]
    wanted = ("length", 5) if spelled is None else ("stop", 1)
    assert (output["finish_reason"], len(output["token_ids"])) == wanted
    assert output["text"] == ""


@pytest.mark.parametrize(("kind", "name"), [(Chat, "chat"), (Serve, "serve")])
def test_chat_and_serve_have_it(folder: str, kind: type[ModelOptions], name: str) -> None:
    flags = ["--dtype", "float32", "--stop-token", "[INST]", "--stop-token", "7"]
    args = read_flags(kind, name, [folder, *flags])
    assert args.open(folder)[1].stop_ids == frozenset((2, 3, 7))


@pytest.mark.parametrize(("spelled", "error"), [("no token", TokenizerError), (str(V + 64), UsageError)])
def test_what_is_no_token_is_refused(folder: str, spelled: str, error: type[TokenizerError]) -> None:
    args = read_flags(Chat, "chat", [folder, "--dtype", "float32", "--stop-token", spelled])
    with refused(error):
        args.open(folder)
