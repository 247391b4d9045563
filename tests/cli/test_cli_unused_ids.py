"""`generate` and `chat` with a model that emits ids beyond its tokenizer's vocabulary."""

from __future__ import annotations

import json
import pathlib

from command import SHAPE, write_model

V = SHAPE["vocab_size"]  # of the tokenizer


def test_what_has_no_text_has_none(run, tmp_path: pathlib.Path) -> None:
    folder = str(write_model(tmp_path / "padded", vocab_size=V + 64, sliding_window=64))
    flags = ("--temperature", "0", "--max-tokens", "5", "--logit-bias", str(V + 5), "100")
    result = run("generate", folder, "--prompt", "a b", "--echo", "never", *flags)
    assert (result.code, result.out) == (0, "\n"), result.err
    result = run("generate", folder, "--prompt", "a b", "--json", "--logprobs", "1", *flags)
    assert result.code == 0, result.err
    (output,) = json.loads(result.out)["outputs"]
    assert (output["text"], output["token_ids"]) == ("", [V + 5] * 5)
    assert output["logprobs"][0][str(V + 5)]["decoded_token"] == f"<unused_{V + 5}>"
    result = run("chat", folder, *flags, stdin="hello\n/exit\n")
    assert (result.code, result.out) == (0, "\n"), result.err
