"""The prefix cache on disk: what an engine finds there is what it would have computed, and never in its way."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of

from mistral_7b.engine.completion import RequestOutput
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.disk_cache import DiskScheduler
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.page_contents import page_bytes
from mistral_7b.errors import ConfigError, WriteError
from mistral_7b.lora.files import Adapter, Factors
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.sampling.params import SamplingParams

W, PAGE = 8, 4
KINDS = ["int8", "int4", "int8 without a window", "int8, int8 keys", "bfloat16", "float32"]
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
PROMPT = tokens_of((41,)).tolist()


def model_of(kind: str, seed: int = 0) -> Mistral7B:
    args = tiny_args(sliding_window=None if "without" in kind else W)
    if kind == "float32":
        return tiny_model(args, seed=seed)
    if kind == "bfloat16":
        model = tiny_model(dataclasses.replace(args, head_dim=16), torch.bfloat16, seed)
        return quantize(model, Scheme("bf16", deterministic=True))
    return quantize(tiny_model(args, torch.bfloat16, seed), "int4" if "int4" in kind else "int8")


def config_of(folder: Path | None, kind: str = "", **more: Any) -> EngineConfig:
    settings = {"max_sequences": 6, "max_batch_tokens": 16, "page_size": PAGE, **more}
    return EngineConfig(prefix_cache=folder, kv_dtype="int8" if "int8 keys" in kind else None, **settings)


def ask(llm: LLM, prompt: list[int] = PROMPT, params: SamplingParams = PARAMS, **asked: Any) -> RequestOutput:
    output = llm.generate(prompt, params, **asked)[0]
    llm.engine.check()
    return output


def said(output: RequestOutput) -> list[Any]:
    return [(c.token_ids, c.logprobs) for c in output.outputs]


def restarted(folder: Path, kind: str = "int8", before: LLM | None = None, **more: Any) -> LLM:
    """A new engine on the same folder, when the one before has written everything."""
    if before is not None:
        before.engine.scheduler.close()
    return LLM(model_of(kind), config_of(folder, kind, **more))


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.kv"))


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder with the pages of PROMPT."""
    llm = restarted(tmp_path)
    ask(llm)
    llm.engine.scheduler.close()
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_survives_a_restart_to_the_bit(kind: str, tmp_path: Path) -> None:
    plain = ask(LLM(model_of(kind), config_of(None, kind)))
    first = restarted(tmp_path, kind)
    assert said(ask(first)) == said(plain)
    again = restarted(tmp_path, kind, first)
    output = ask(again)
    assert output.num_cached_tokens == 40
    assert again.engine.counts.disk_hits == again.engine.counts.disk_queries == 40
    assert again.engine.counts.disk_read_bytes > 0
    assert again.engine.counts.disk_written_bytes == 0, "what is there is not written again"
    if kind == "float32":
        assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    else:
        assert said(output) == said(plain)


def test_with_a_window_its_pages_are_enough(tmp_path: Path) -> None:
    first = restarted(tmp_path)
    ask(first)
    again = restarted(tmp_path, before=first)
    ask(again)
    seen = 40 // PAGE - again.engine.scheduler.first_visible(40)
    assert again.engine.counts.disk_read_bytes == seen * page_bytes(again.engine.pool)


def test_a_longer_prompt_and_several_completions_begin_there(filled: Path) -> None:
    longer, params = (
        [*PROMPT, *tokens_of((9,), seed=5).tolist()],
        dataclasses.replace(PARAMS, n=3, temperature=1.0, seed=7),
    )
    wanted = ask(LLM(model_of("int8"), config_of(None)), longer, params)
    again = restarted(filled)
    output = ask(again, longer, params)
    assert output.num_cached_tokens == 40
    assert said(output) == said(wanted)
    third = restarted(filled, before=again)
    assert ask(third, longer, params).num_cached_tokens == 48


def test_many_requests_at_once_read_a_prefix_once(filled: Path) -> None:
    prompts = [[*PROMPT[:40], *tokens_of((n,), seed=n).tolist()] for n in range(1, 9)]
    wanted = LLM(model_of("int8"), config_of(None)).generate(prompts, PARAMS)
    again = restarted(filled, max_sequences=2)
    outputs = again.generate(prompts, PARAMS)
    again.engine.check()
    assert [said(o) for o in outputs] == [said(o) for o in wanted]
    assert all(o.num_cached_tokens >= 40 for o in outputs)
    assert again.engine.counts.disk_hits == 40


def test_pages_of_answers_are_written_with_the_next_prompt(tmp_path: Path) -> None:
    llm = restarted(tmp_path, "int8 without a window")
    turn = [*PROMPT[:8], *ask(llm, PROMPT[:8], dataclasses.replace(PARAMS, max_tokens=16)).outputs[0].token_ids]
    llm.engine.scheduler.close()
    assert len(files_in(tmp_path)) == 2
    llm = restarted(tmp_path, "int8 without a window")
    ask(llm, turn)
    llm.engine.scheduler.close()
    assert len(files_in(tmp_path)) == 6


# ---------------------------------------------------------------- what is kept apart


def adapter(seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 40, generator=draw), torch.randn(30, 4, generator=draw)
    return Adapter({"layers.0.attention.wk": Factors(a, b, 0.5)})


def test_salts_and_adapters_are_kept_apart(filled: Path) -> None:
    llm = restarted(filled)
    llm.engine.load_adapter("one", adapter(1))
    llm.engine.load_adapter("two", adapter(2))
    assert ask(llm, cache_salt="a").num_cached_tokens == 0
    first = {name: said(ask(llm, adapter=name)) for name in ("one", "two")}
    assert first["one"] != first["two"]
    again = restarted(filled, before=llm)
    again.engine.load_adapter("two", adapter(2))  # in another order, under another name
    again.engine.load_adapter("uno", adapter(1))
    again.engine.load_adapter("three", adapter(3))
    for name, was, cached in (("uno", "one", 40), ("two", "two", 40), ("three", None, 0)):
        output = ask(again, adapter=name)
        assert output.num_cached_tokens == cached, name
        assert was is None or said(output) == first[was]
    assert ask(again, cache_salt="a").num_cached_tokens == 40
    assert ask(again, cache_salt="b").num_cached_tokens == 0


def test_an_adapter_replaced_while_a_request_is_read_leaves_no_wrong_pages(filled: Path) -> None:
    llm = restarted(filled)
    llm.engine.load_adapter("a", adapter(1))
    request = llm.inputs.text(PROMPT, PARAMS, RequestOptions(adapter="a"))
    llm.engine.unload_adapter("a")
    llm.engine.load_adapter("a", adapter(2))
    llm.engine.add(request)
    while not request.finished:
        llm.engine.step()
    again = restarted(filled, before=llm)
    again.engine.load_adapter("a", adapter(1))
    assert ask(again, adapter="a").num_cached_tokens == 0


def test_other_weights_find_nothing(filled: Path) -> None:
    llm = LLM(model_of("int8", seed=1), config_of(filled))
    assert ask(llm).num_cached_tokens == 0


# ---------------------------------------------------------------- configuration


def test_a_folder_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(WriteError, field="prefix_cache", place=tmp_path / "file" / "cache"):
        LLM(model_of("int8"), config_of(tmp_path / "file" / "cache"))
    with refused(ConfigError, field="prefix_cache_bytes"):
        LLM(model_of("int8"), config_of(tmp_path, prefix_cache_bytes=100))
    with refused(ConfigError, field="prefix_cache"):
        config_of(tmp_path, prefix_caching=False)


def test_an_engine_that_is_dropped_writes_what_waits(tmp_path: Path) -> None:
    llm = restarted(tmp_path)
    scheduler = llm.engine.scheduler
    assert isinstance(scheduler, DiskScheduler)
    threads = (scheduler.reader._thread, scheduler.writer._thread)
    ask(llm)
    engine: Engine | None = llm.engine
    del llm, scheduler, engine
    gc.collect()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(files_in(tmp_path)) == 10
