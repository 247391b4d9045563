"""Prices of texts against the float64 reference, and where they can be counted by hand."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of, truth

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.errors import EvaluationError
from mistral_7b.evaluation import perplexity

WINDOW = 8
LONG = [1, *tokens_of((3 * WINDOW + 5,)).tolist()]


def nats_by_reference(model: Mistral7B, ids: list[int]) -> float:
    log_p = truth(model, torch.tensor(ids[:-1])).log_softmax(-1)
    return -log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()


@pytest.mark.parametrize("chunk", [1, WINDOW - 1, WINDOW + 1, 512])
def test_nats_are_the_references_however_it_is_chunked(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("mistral_7b.evaluation.perplexity"), "CHUNK", chunk)
    model = tiny_model(dtype=torch.float64)
    found = perplexity(model, [LONG, [1, 5, 7]])
    wanted = nats_by_reference(model, LONG) + nats_by_reference(model, [1, 5, 7])
    assert found.nats == pytest.approx(wanted, abs=1e-9)
    assert found.tokens == len(LONG) - 1 + 2
    assert found.perplexity == pytest.approx(math.exp(wanted / found.tokens), rel=1e-12)


def test_the_window_and_bos_count() -> None:
    """Controls: another window, no BOS, or documents run together give another price."""
    model = tiny_model(dtype=torch.float64)
    price = perplexity(model, [LONG]).nats
    wide = tiny_model(tiny_args(sliding_window=None), dtype=torch.float64)
    assert abs(perplexity(wide, [LONG]).nats - price) > 1e-3
    assert perplexity(model, [LONG[1:]]).nats == price  # BOS is put before what lacks it, and only then
    without = nats_by_reference(model, LONG[1:]) + nats_by_reference(model, LONG[:2])
    assert abs(without - price) > 1e-3
    assert abs(perplexity(model, [LONG + LONG[1:]]).nats - 2 * price) > 1e-3


def test_a_model_that_knows_nothing_pays_log_v() -> None:
    model = Mistral7B.from_pretrained("demo", dtype=torch.float32)
    model.output.weight = torch.nn.Parameter(torch.zeros_like(model.output.weight))
    tokenizer, text = Tokenizer.from_pretrained("demo"), "def f(x):\n    return 'é'\n"
    found = perplexity(model, [text], tokenizer)
    assert found.perplexity == pytest.approx(4096, rel=1e-5)
    assert found.bytes == len(text) + 1
    assert found.bits_per_byte == pytest.approx(found.tokens * 12 / (len(text) + 1), rel=1e-5)
    assert perplexity(model, [text, [1, 2]], tokenizer).bits_per_byte is None  # bytes of ids are not known
    assert found.to_dict()["perplexity"] == found.perplexity


def test_without_a_window_a_document_is_cut_to_the_context() -> None:
    args = tiny_args(sliding_window=None, max_seq_len=10)
    model, body = tiny_model(args, dtype=torch.float64), LONG[1:]
    wanted = sum(nats_by_reference(model, [1, *body[i : i + 9]]) for i in range(0, len(body), 9))
    found = perplexity(model, [LONG])
    assert found.nats == pytest.approx(wanted, abs=1e-9)
    assert found.tokens == len(body)


def test_what_cannot_be_priced_is_refused() -> None:
    with refused(EvaluationError, field="documents"):
        perplexity(tiny_model(), [[1], []])
    with refused(EvaluationError, field="tokenizer"):
        perplexity(tiny_model(), ["text"])
