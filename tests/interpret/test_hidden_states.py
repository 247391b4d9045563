"""Hidden states of documents, streamed to a file that safetensors reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from tiny import TINY, tiny_args, tiny_model, tokens_of

from mistral_7b import LLM
from mistral_7b.errors import InterpretError, WriteError
from mistral_7b.interpret import hidden_states, save_hidden_states


def test_each_documents_rows_are_its_own_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "CHUNK", 5)
    model, documents = tiny_model(TINY), [tokens_of((n,), seed=n).tolist() for n in (3, 17, 1)]
    assert save_hidden_states(model, documents, tmp_path / "states.safetensors", layers=[-1, 0]) == 21
    found = load_file(tmp_path / "states.safetensors")
    assert set(found) == {"residual.0", "residual.1", "tokens", "offsets"}
    assert found["tokens"].tolist() == [t for document in documents for t in document]
    assert found["offsets"].tolist() == [0, 3, 20, 21]
    for document, start, stop in zip(documents, (0, 3, 20), (3, 20, 21), strict=True):
        with model.record("residual") as tape:
            model(torch.tensor([document]))
        for n in (0, 1):
            torch.testing.assert_close(found[f"residual.{n}"][start:stop], tape["residual", n][0])


def test_texts_go_through_the_tokenizer(tmp_path: Path) -> None:
    llm = LLM("demo")
    count = save_hidden_states(llm.engine.model, ["Once", "a cat"], tmp_path / "a", [3], llm.tokenizer)
    assert load_file(tmp_path / "a")["residual.3"].shape == (count, llm.engine.model.args.dim)


def test_what_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    model, path = tiny_model(tiny_args(sliding_window=None, max_seq_len=8)), tmp_path / "states"
    for documents, field in (
        ([], "documents"),
        ([[1], []], "documents[1]"),
        ([[67]], "documents[0]"),
        ([[1] * 9], "documents[0]"),
        (["a"], "tokenizer"),
    ):
        with refused(InterpretError, field=field):
            save_hidden_states(model, documents, path)  # type: ignore[arg-type]
    with refused(WriteError):
        save_hidden_states(model, [[1]], tmp_path / "none" / "states")
    assert not list(tmp_path.iterdir())
