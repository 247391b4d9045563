"""experiments/engine.py: it measures the engine's overhead per step; results for a tiny model."""

from __future__ import annotations

import importlib.util
import pathlib
import time
from types import ModuleType
from typing import Any

import pytest
from tiny import tiny_args, tiny_model
from waiting import less

from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.llm import LLM


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = pathlib.Path(__file__).parents[2] / "experiments" / "engine.py"
    spec = importlib.util.spec_from_file_location("benchmarks_engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"BATCH": 4, "STEPS": 3, "PREFIX": 64, "OWN": 4, "LONG": 5}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_all_of_it_on_a_tiny_model(script: ModuleType) -> None:
    model = tiny_model(tiny_args(max_seq_len=4096))
    llm = LLM(model, EngineConfig(max_sequences=4, max_batch_tokens=24, page_size=4))
    words = script.Words(model.args.vocab_size)
    told: dict[str, dict[str, Any]] = {}

    def tell(what: str, **figures: float) -> None:
        told[what] = figures

    script.overhead(llm, words, tell, "top_p", (0, 20))
    script.one_request(llm, words, tell, 1)
    script.prefix(llm, words, tell, 2)
    script.held_pages(llm, words, tell)
    for n in (0, 20):
        figures = told[f"step of 4, top_p, {n} waiting"]
        parts = sum(figures[name] for name in ("scheduling", "sampling", "text"))
        assert 0 < parts < figures["outside"] < figures["step"]
        assert all(figures[name] > 0 for name in ("scheduling", "sampling", "text"))
    assert told["one request of 128 + 64 tokens"]["engine"] > 0
    assert told["first token, prompts of 64 + 4 tokens, 64 of them shared"]["cached"] == 64
    pages = told["pages of a prompt of 40 tokens, window 8"]
    assert 8 < pages["most_tokens"] <= pages["window_and_step"] == 32
    token = 2 * 2 * 3 * 10 * 4  # layers, k and v, heads, width, float32
    assert pages["most_bytes"] == pages["most_tokens"] * token
    assert llm.engine.idle
    assert model.hidden.__func__ is type(model).hidden  # the model is restored
    llm.engine.check()


def test_the_model_is_not_counted_as_overhead(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_args(max_seq_len=4096))
    hidden = model.hidden

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return hidden(*args)

    monkeypatch.setattr(model, "hidden", slow)
    llm = LLM(model, EngineConfig(max_sequences=4, max_batch_tokens=24, page_size=4))
    words = script.Words(model.args.vocab_size)

    def overhead() -> float:
        told: list[dict[str, float]] = []
        script.overhead(llm, words, lambda what, **figures: told.append(figures), "greedy", (0,))
        assert all(f["step"] > 0.05 for f in told)
        return max(f["outside"] for f in told)

    less(0.05, overhead)
