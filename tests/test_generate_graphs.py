"""`generate` and `stream` on a GPU, where decoding is replayed in graphs: the tokens of kernel by kernel.

Without CUDA the same steps run unrecorded, and ahead of what is read as they would there.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import TINY, tiny_args, tiny_model, tokens_of

from mistral_7b.engine import engine as loop
from mistral_7b.engine.completion import RequestOutput
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.forward import Forward, GraphForward, forward_for
from mistral_7b.engine.pages import PagePool
from mistral_7b.errors import GenerationError
from mistral_7b.generate import generate, stream
from mistral_7b.lora.adapters import Adapters
from mistral_7b.model import Mistral7B
from mistral_7b.sampling.params import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if DEVICE == "cuda" else torch.float64  # without kernels nothing is recorded
MODEL = tiny_model(TINY, DTYPE).to(DEVICE)
FULL = tiny_model(tiny_args(sliding_window=None, max_seq_len=400), DTYPE).to(DEVICE)
PROMPTS = [tokens_of((n,), seed=n).tolist() for n in (1, 3, 8, 21, 40)]  # window 8
WAYS = {
    "greedy": SamplingParams(temperature=0, max_tokens=50),
    "temperature": SamplingParams(temperature=1.3, max_tokens=50, seed=1),
    "top_k": SamplingParams(temperature=1.5, top_k=5, max_tokens=50, seed=2),
    "top_p": SamplingParams(temperature=1.5, top_p=0.7, max_tokens=50, seed=3),
    "min_p": SamplingParams(temperature=1.5, min_p=0.1, max_tokens=50, seed=4),
    "all": SamplingParams(temperature=1.5, top_k=20, top_p=0.8, min_p=0.02, max_tokens=50, n=2, seed=5),
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphForward]:
    """Decode in graphs without CUDA too; what did so, call by call."""
    made: list[GraphForward] = []

    def graphed(adapters: Adapters, pool: PagePool, config: EngineConfig) -> Forward:
        real = forward_for(adapters, pool, config)
        made.append(real if isinstance(real, GraphForward) else GraphForward(adapters, pool, config))
        return made[-1]

    monkeypatch.setattr(loop, "forward_for", graphed)
    return made


def by_kernels(model: Mistral7B, prompts: object, params: object, **how: object) -> list[RequestOutput]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "forward_for", lambda adapters, pool, config: Forward(adapters, pool))
        return generate(model, prompts, params, **how)  # type: ignore[arg-type]


def ids(outputs: list[RequestOutput]) -> list[tuple[list[int], str | None, object]]:
    return [(o.token_ids, o.finish_reason, o.stop_reason) for r in outputs for o in r.outputs]


@pytest.mark.parametrize("model", [MODEL, FULL], ids=["window", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_same_tokens_as_kernel_by_kernel(way: str, model: Mistral7B, graphs: list[GraphForward]) -> None:
    """Ragged rows that begin before the window is full and leave it behind several times."""
    params = dataclasses.replace(WAYS[way], ignore_eos=True)
    wanted = by_kernels(model, PROMPTS, params)
    assert graphs == []
    assert ids(generate(model, PROMPTS, params)) == ids(wanted)
    assert {size for size, _ in graphs[0].steps} == {min(16, 8 * params.n)}
    assert len(wanted[0].outputs[0].token_ids) == 50


def test_rows_that_ask_for_different_things(graphs: list[GraphForward]) -> None:
    params = [dataclasses.replace(p, n=1, ignore_eos=True) for p in [*list(WAYS.values())[:4], WAYS["all"]]]
    wanted = ids(by_kernels(MODEL, PROMPTS, params))
    assert ids(generate(MODEL, PROMPTS, params)) == wanted
    assert len(graphs[0].steps) == 1
    assert wanted == [
        row for p, prompt in zip(params, PROMPTS, strict=True) for row in ids(by_kernels(MODEL, prompt, p))
    ]


def test_int8_keys_and_values(graphs: list[GraphForward]) -> None:
    for model in (MODEL, FULL):
        params = dataclasses.replace(WAYS["temperature"], ignore_eos=True)
        wanted = ids(by_kernels(model, PROMPTS, params, kv_dtype=torch.int8))
        assert ids(generate(model, PROMPTS, params, kv_dtype=torch.int8)) == wanted
        assert wanted != ids(by_kernels(model, PROMPTS, params))
    assert [len(forward.steps) for forward in graphs] == [1, 1]


def test_each_row_ends_for_its_own_reason(graphs: list[GraphForward]) -> None:
    """By EOS, by a stop token, by its length, while others go on in smaller graphs."""
    some = by_kernels(MODEL, PROMPTS, SamplingParams(temperature=0, ignore_eos=True, max_tokens=90))
    tokens = [r.outputs[0].token_ids for r in some]
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=90, stop_token_ids=[tokens[0][20]]),
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=17),
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=90),
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=3),
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=1),
    ]
    wanted = by_kernels(MODEL, PROMPTS, params)
    got = generate(MODEL, PROMPTS, params)
    assert ids(got) == ids(wanted)
    assert {o.outputs[0].finish_reason for o in got} == {"stop", "length"}
    assert {size for size, _ in graphs[0].steps} == {4, 2, 1}  # one had ended with its first token


def test_texts_that_outgrow_a_graphs_table(graphs: list[GraphForward]) -> None:
    """With rows that end on the way; a table of 64 pages of 16 tokens holds no more than 1024."""
    model = tiny_model(tiny_args(sliding_window=None, max_seq_len=1200), DTYPE).to(DEVICE)
    prompts = [tokens_of((n,), seed=n).tolist() for n in (1000, 1010, 8, 990)]
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in (60, 45, 25, 9)]
    got = generate(model, prompts, params)
    assert ids(got) == ids(by_kernels(model, prompts, params))
    assert {columns for _, columns in graphs[0].steps} == {64, 256}


def test_stream_gives_the_same(graphs: list[GraphForward]) -> None:
    params = SamplingParams(temperature=1.2, max_tokens=40, seed=7, ignore_eos=True)
    wanted = by_kernels(MODEL, PROMPTS[3], params)[0].outputs[0]
    pieces = list(stream(MODEL, PROMPTS[3], params))
    assert [t for p in pieces for t in p.token_ids] == wanted.token_ids
    assert pieces[-1].finish_reason == "length"
    assert [size for size, _ in graphs[0].steps] == [1]


def test_logits_that_are_not_finite_are_an_error_in_a_row_that_counts(graphs: list[GraphForward]) -> None:
    broken = tiny_model(TINY, torch.float32).to(DEVICE)
    params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=1)
    pieces = stream(broken, PROMPTS[2], params)
    next(pieces)
    broken.norm.weight[0] = float("nan")
    with pytest.raises(GenerationError, match="not finite"):
        list(pieces)


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: a graph can be recorded on one only")
def test_what_no_kernel_attends_for_is_not_recorded(graphs: list[GraphForward]) -> None:
    """In float64, which Triton does not take: a graph would go on with the pages of one step."""
    model = tiny_model(TINY, torch.float64).to("cuda")
    config = EngineConfig()
    pool = PagePool(2, 3, 10, 20, 4, dtype=torch.float64, device="cuda")
    assert type(forward_for(Adapters(model), pool, config)) is Forward
