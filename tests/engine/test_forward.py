"""Decoding in graphs of a few sizes: the bits of kernel by kernel. Uncaptured here, captured where CUDA is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_args, tiny_model, tokens_of
from torch import Tensor

from mistral_7b.engine.batch import PaddingRow, PagedBatch
from mistral_7b.engine.completion import RequestOutput
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.forward import COLUMNS, DecodeStep, Forward, GraphForward, bucket_size
from mistral_7b.engine.in_flight import Plan
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.pages import PagePool
from mistral_7b.engine.speculation import Speculation
from mistral_7b.kernels.cpu.compiler import library
from mistral_7b.kernels.gpu.graph import WARM_UP
from mistral_7b.lora.files import Adapter, Factors
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.sampling.params import SamplingParams

compiled = pytest.mark.skipif(library() is None, reason="without the kernels rows depend on their neighbours")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NINE = [1, 17, 40, 8, 9, 3, 25, 33, 16]  # tokens of prompts; window 8


def llm_of(window: int | None = 8, n: int = 9, dtype: torch.dtype = torch.float64, **config: Any) -> LLM:
    model = tiny_model(tiny_args(sliding_window=window, max_seq_len=400), dtype)
    if dtype == torch.bfloat16:
        quantize(model, Scheme("int8"))
    settings = {
        "max_sequences": n,
        "max_batch_tokens": n + 16,
        "page_size": 4,
        "kv_cache_bytes": 1 << 22,
        **config,
    }
    return LLM(model, EngineConfig(**settings))


def in_graphs(llm: LLM, record: Callable[..., Any] = lambda step: step) -> GraphForward:
    """Let an engine decode in graphs, which are not recorded; nothing is in flight between its steps."""
    engine = llm.engine
    engine.forward = GraphForward(engine.adapters, engine.pool, engine.config, record)
    engine.forward.overlaps = False
    return engine.forward


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [tokens_of((n,), seed=n).tolist() for n in lengths]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [c.token_ids for o in outputs for c in o.outputs]


def watched(forward: Forward) -> list[tuple[list[str], Tensor]]:
    """Every call's requests, and a copy of its hidden states."""
    seen: list[tuple[list[str], Tensor]] = []
    real = forward.hidden

    def hidden(plan: Plan, fed: Tensor) -> Tensor:
        out = real(plan, fed)
        seen.append(([s.request.id for s, _ in plan], out.clone()))
        return out

    forward.hidden = hidden  # type: ignore[method-assign]
    return seen


@compiled
@pytest.mark.parametrize(("window", "kv_dtype"), [(None, None), (8, "int8")])
@pytest.mark.parametrize("n", range(1, 10))
def test_a_row_has_the_same_bits_however_many_it_is_filled_up_to(
    n: int, window: int | None, kv_dtype: Any
) -> None:
    prompts = prompts_of(NINE[:n])
    runs = []
    for graphs in (False, True):
        llm = llm_of(window, dtype=torch.bfloat16, kv_dtype=kv_dtype)
        forward = in_graphs(llm) if graphs else llm.engine.forward
        seen = watched(forward)
        names = [str(i) for i in range(n)]
        llm.generate(prompts, GREEDY, asked=[_asked(name) for name in names])
        runs.append(seen)
        if isinstance(forward, GraphForward):
            assert {size for size, _ in forward.steps} >= {next(s for s in (1, 2, 4, 8, 9) if s >= n)}
    assert len(runs[0]) == len(runs[1]) >= 12
    for (who, plain), (same, replayed) in zip(*runs, strict=True):
        assert who == same
        assert torch.equal(plain, replayed)


def _asked(name: str) -> RequestOptions:
    return RequestOptions(request_id=name)


def test_rows_are_filled_up_to_few_numbers_and_by_few() -> None:
    sizes = [bucket_size(n) for n in range(1, 513)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 3 + 8 + (512 - 64) / 16
    for n, size in enumerate(sizes, 1):
        assert bucket_size(size) == size >= n
        assert size - n < max(8, n / 4)
        assert n > 2 or size == n


def test_what_nobody_holds_is_left_alone() -> None:
    """Rows of nobody write to the page that is nobody's, and no other."""
    llm = llm_of(prefix_caching=False)
    in_graphs(llm)
    pool, engine = llm.engine.pool, llm.engine
    for t in (t for layer in pool.layers for t in layer):
        t.zero_()
    for request in (llm.inputs.text(p, GREEDY, _asked(str(i))) for i, p in enumerate(prompts_of([9, 20, 30]))):
        engine.add(request)
    for _ in range(9):
        engine.step()
    running = engine.scheduler.running
    assert all(s.decoding for s in running)
    before = [t.clone() for layer in pool.layers for t in layer]
    pool.layers[0][0][pool.scratch] = 7.0
    engine.step()
    mine = {page for s in running for page in s.held}
    others = [page for page in range(pool.n_pages) if page not in mine]
    for t, was in zip((t for layer in pool.layers for t in layer), before, strict=True):
        assert torch.equal(t[others], was[others])
        assert not torch.equal(t, was)
    assert (pool.layers[0][0][pool.scratch] != 7.0).any(), "three of four rows are somebody's"


def test_a_graph_for_each_size_and_width_recorded_when_it_is_needed() -> None:
    made: list[DecodeStep] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        made.append(step.__self__)  # type: ignore[attr-defined]
        for _ in range(WARM_UP):  # as on a GPU, and without a trace
            step()
        return step

    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (65, 20, 12, 12, 8)]
    prompts = prompts_of([5, 40, 8, 17, 1])
    wanted = llm_of(page_size=1, max_batch_tokens=30).generate(prompts, params)
    llm = llm_of(page_size=1, max_batch_tokens=30)
    forward = in_graphs(llm, record)
    assert tokens(llm.generate(prompts, params)) == tokens(wanted)
    assert len(made) == len(forward.steps)
    assert set(forward.steps) >= {(8, COLUMNS), (4, COLUMNS), (1, COLUMNS), (1, 4 * COLUMNS)}
    addresses = [[t.data_ptr() for t in (s.tokens, s.out, *s.batch._tensors)] for s in made]
    assert tokens(llm.generate(prompts, params)) == tokens(wanted)
    assert addresses == [[t.data_ptr() for t in (s.tokens, s.out, *s.batch._tensors)] for s in made]
    assert {s.batch.table.shape for s in made} == set(forward.steps)


def test_prompts_guesses_and_adapters_are_computed_as_they_come() -> None:
    llm = llm_of(prefix_caching=False)
    forward = in_graphs(llm)
    llm.engine.adapters.load("a", adapter_of(llm))
    prompt = [3, 4, 5, 6] * 6
    adapted = llm.generate(prompt, GREEDY, adapter="a")
    assert not forward.steps
    plain = llm.generate(prompt, GREEDY)
    assert list(forward.steps) == [(1, COLUMNS)]
    assert tokens(plain) == tokens(llm_of().generate(prompt, GREEDY)) != tokens(adapted)
    seen = watched(forward)
    biased = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logit_bias={5: 6.0})
    wanted = llm_of().generate(prompt, biased)
    seen.clear()
    assert tokens(llm.generate(prompt, biased, speculation=Speculation(row_cost=0.01))) == tokens(wanted)
    assert llm.engine.counts.accepted_tokens > 0
    assert any(len(hidden) > 1 for _, hidden in seen[2:])


def test_a_step_asks_the_device_for_nothing() -> None:
    """On meta there are no values to ask for: what would wait for the device fails there."""
    model = Mistral7B(tiny_args(), device="meta")
    pool = PagePool(2, 3, 10, 20, 4, dtype=torch.bfloat16, device="meta")
    parts = [(PaddingRow(np.arange(6), stop=6, computed=21), 1), (PaddingRow(np.array([pool.scratch])), 1)]
    with torch.inference_mode():
        step = DecodeStep(model, PagedBatch(pool, 8, parts, 64))
        out = step(parts, torch.zeros(1, dtype=torch.long, device="meta"), lambda run: run)
    assert out.shape == (1, model.args.dim)
    with pytest.raises(RuntimeError, match="meta"):  # the control
        bool(out.any())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a graph can be captured on one only")
def test_it_is_captured_on_a_gpu() -> None:
    prompts = prompts_of(NINE)
    wanted = llm_of(dtype=torch.float32).generate(prompts, GREEDY)
    model = tiny_model(tiny_args(max_seq_len=400), torch.float32).to("cuda")
    llm = LLM(model, EngineConfig(max_sequences=9, max_batch_tokens=30, page_size=4, kv_cache_bytes=1 << 22))
    forward = llm.engine.forward
    assert isinstance(forward, GraphForward)
    assert tokens(llm.generate(prompts, GREEDY)) == tokens(wanted)
    replays = [step.replay.__self__ for step in forward.steps.values()]  # type: ignore[union-attr]
    assert replays
    assert all(isinstance(graph, torch.cuda.CUDAGraph) for graph in replays)
    llm.engine.check()


def test_steps_filled_up_give_what_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, whose rows do not depend on how many there are; with an adapter, and prompts in chunks."""
    outputs, sizes = [], []
    hidden = Mistral7B.hidden
    for fill in (False, True):
        seen: set[int] = set()

        def noted(self: Mistral7B, tokens: Tensor, *rest: Any, seen: set[int] = seen, **more: Any) -> Tensor:
            seen.add(len(tokens))
            return hidden(self, tokens, *rest, **more)

        monkeypatch.setattr(Mistral7B, "hidden", noted)
        llm = llm_of()
        engine = llm.engine
        engine.forward = Forward(engine.adapters, engine.pool, fill)
        engine.adapters.load("a", adapter_of(llm))
        asked = [RequestOptions(adapter="a" if i % 3 == 1 else None) for i in range(len(NINE))]
        outputs.append(llm.generate(prompts_of(NINE), replace(GREEDY, logprobs=2), asked=asked))
        sizes.append(seen)
    assert sizes[1] == {bucket_size(n) for n in sizes[1]}
    assert sizes[0] - sizes[1]
    for plainly, full in zip(*outputs, strict=True):
        assert plainly.outputs[0].token_ids == full.outputs[0].token_ids
        for one, other in zip(plainly.outputs[0].logprobs, full.outputs[0].logprobs, strict=True):
            assert one.keys() == other.keys()
            assert all(abs(one[t].logprob - other[t].logprob) < 1e-10 for t in one)


@pytest.mark.parametrize("chosen", [[1, 2, 3], [0, 1, 3], [3], [0, 1, 2, 3]])
def test_rows_are_chosen_where_they_are_filled_up_to_the_number_of_all(chosen: list[int]) -> None:
    """Three sampled rows of a step of four are filled up to four: not to be taken for all of them."""
    llm = llm_of()
    forward = Forward(llm.engine.adapters, llm.engine.pool, pad_rows=True)
    hidden = torch.randn(4, llm.engine.model.args.dim, dtype=torch.float64)
    with torch.inference_mode():
        logits = forward.logits(hidden, [(i, None) for i in chosen])
        torch.testing.assert_close(logits, llm.engine.model.logits(hidden[chosen]))


def adapter_of(llm: LLM) -> Adapter:
    draw, args = torch.Generator().manual_seed(0), llm.engine.model.args
    factors = Factors(
        torch.randn(2, args.dim, generator=draw), torch.randn(args.hidden_dim, 2, generator=draw), 0.5
    )
    return Adapter({"layers.0.feed_forward.w1": factors})


@pytest.mark.parametrize(
    ("dtype", "kind", "fill"), [("bfloat16", None, True), ("bfloat16", "int8", False), ("float32", None, False)]
)
def test_steps_are_filled_up_where_code_is_made_for_each_shape(dtype: str, kind: Any, fill: bool) -> None:
    model = tiny_model(tiny_args(), getattr(torch, dtype))
    if kind:
        quantize(model, Scheme(kind))
    assert LLM(model, EngineConfig(kv_cache_bytes=1 << 22)).engine.forward.pad_rows == fill
