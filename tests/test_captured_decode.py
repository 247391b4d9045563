"""Decode as one step on fixed buffers: the tokens of step by step. Uncaptured here, captured where CUDA is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import TINY, tiny_args, tiny_model, tokens_of

from mistral_7b import captured
from mistral_7b.cache import RollingCache
from mistral_7b.completion import Completion, RequestOutput
from mistral_7b.errors import GenerationError
from mistral_7b.generate import generate, stream
from mistral_7b.model import Mistral7B
from mistral_7b.sampling import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL = tiny_model(TINY, torch.float64).to(DEVICE)
FULL = tiny_model(tiny_args(sliding_window=None, max_seq_len=400), torch.float64).to(DEVICE)
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
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decode so without CUDA too; the rows of each set of buffers that was made, as they are made."""
    made: list[int] = []
    real = captured.CapturedDecode._allocate

    def allocate(self: captured.CapturedDecode) -> None:
        made.append(len(self.rows))
        real(self)

    monkeypatch.setattr(captured.CapturedDecode, "_allocate", allocate)
    monkeypatch.setattr(captured, "supports", lambda model, rows: True)
    return made


def by_steps(model: Mistral7B, prompts: object, params: object, **how: object) -> list[RequestOutput]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "supports", lambda model, rows: False)
        return generate(model, prompts, params, **how)  # type: ignore[arg-type]


def ids(outputs: list[RequestOutput]) -> list[tuple[list[int], str | None, object]]:
    return [(o.token_ids, o.finish_reason, o.stop_reason) for r in outputs for o in r.outputs]


@pytest.mark.parametrize("model", [MODEL, FULL], ids=["window", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_same_tokens_as_step_by_step(way: str, model: Mistral7B, captures: list[int]) -> None:
    """Ragged rows that begin before the window is full and go round it several times."""
    params = dataclasses.replace(WAYS[way], ignore_eos=True)
    wanted = by_steps(model, PROMPTS, params)
    assert captures == []
    assert ids(generate(model, PROMPTS, params)) == ids(wanted)
    assert captures == [5 * params.n]
    assert len(wanted[0].outputs[0].token_ids) == 50


def test_rows_that_ask_for_different_things(captures: list[int]) -> None:
    params = [dataclasses.replace(p, n=1, ignore_eos=True) for p in [*list(WAYS.values())[:4], WAYS["all"]]]
    wanted = ids(by_steps(MODEL, PROMPTS, params))
    assert ids(generate(MODEL, PROMPTS, params)) == wanted
    assert captures == [5]
    assert wanted == [
        row for p, prompt in zip(params, PROMPTS, strict=True) for row in ids(by_steps(MODEL, prompt, p))
    ]


def test_int8_keys_and_values(captures: list[int]) -> None:
    for model in (MODEL, FULL):
        params = dataclasses.replace(WAYS["temperature"], ignore_eos=True)
        wanted = ids(by_steps(model, PROMPTS, params, kv_dtype=torch.int8))
        assert ids(generate(model, PROMPTS, params, kv_dtype=torch.int8)) == wanted
        assert wanted != ids(by_steps(model, PROMPTS, params))
    assert captures == [5, 5]


def test_each_row_ends_for_its_own_reason(captures: list[int]) -> None:
    """By EOS, by a stop token, by its length, in the middle of a chunk; the ring closes up when half are gone."""
    some = by_steps(MODEL, PROMPTS, SamplingParams(temperature=0, ignore_eos=True, max_tokens=90))
    tokens = [r.outputs[0].token_ids for r in some]
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=90, stop_token_ids=[tokens[0][20]]),
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=captured.CHUNK + 1),
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=90),
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=3),
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=1),
    ]
    wanted = by_steps(MODEL, PROMPTS, params)
    got = generate(MODEL, PROMPTS, params)
    assert ids(got) == ids(wanted)
    assert {o.outputs[0].finish_reason for o in got} == {"stop", "length"}
    assert captures[0] == 4  # one had ended with its first token
    assert captures[-1] == 1
    assert len(captures) >= 2


@pytest.mark.parametrize("first", [10, 30])
def test_the_ring_grows_when_it_must(first: int, captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From few slots, with rows that end and go on in vain past the slots there are."""
    monkeypatch.setattr("mistral_7b.generate.FIRST_SLOTS", first)
    grown = []
    real = RollingCache.enlarge
    monkeypatch.setattr(RollingCache, "enlarge", lambda self, slots: (grown.append(slots), real(self, slots)))
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in (300, 300, 25, 290, 9)]
    got = generate(FULL, PROMPTS, params)
    captured_growths, grown[:] = list(grown), []
    assert ids(got) == ids(by_steps(FULL, PROMPTS, params))
    assert len(captured_growths) >= 2
    assert len(captures) >= 1 + len(captured_growths)


def test_stream_gives_the_same(captures: list[int]) -> None:
    params = SamplingParams(temperature=1.2, max_tokens=40, seed=7, ignore_eos=True)
    wanted = by_steps(MODEL, PROMPTS[3], params)[0].outputs[0]
    pieces = list(stream(MODEL, PROMPTS[3], params))
    assert [t for p in pieces for t in p.token_ids] == wanted.token_ids
    assert pieces[-1].finish_reason == "length"
    assert captures == [1]


def test_logits_that_are_not_finite_are_an_error_in_a_row_that_counts(captures: list[int]) -> None:
    broken = tiny_model(TINY, torch.float32).to(DEVICE)
    params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=1)
    pieces = stream(broken, PROMPTS[2], params)
    next(pieces)
    broken.norm.weight[0] = float("nan")
    with pytest.raises(GenerationError):
        list(pieces)


def test_warming_up_leaves_no_trace(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every chunk, in rings that have gone round; a second step without going back would be seen."""
    params = SamplingParams(temperature=1.5, top_p=0.9, max_tokens=60, ignore_eos=True, seed=5)
    rehearsals, real = [], captured.CapturedDecode._step

    def step(self: captured.CapturedDecode) -> None:
        if int(self.at) == 0 and rehearsals[-1:] != [True]:
            rehearsals.append(True)
            self._rehearse()
            rehearsals.append(False)
        real(self)

    monkeypatch.setattr(captured.CapturedDecode, "_step", step)
    got = generate(MODEL, PROMPTS, params)
    assert len(rehearsals) >= 8
    assert ids(got) == ids(by_steps(MODEL, PROMPTS, params))


def completion(**params: object) -> Completion:
    sampling = SamplingParams(**{"max_tokens": 100, **params})  # type: ignore[arg-type]
    return Completion([1], sampling, sampling.max_tokens or 0, seed=0)


def test_what_decodes_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(TINY)
    plain, sampled = completion(temperature=0), completion(temperature=0.7, top_p=0.9)
    assert not captured.supports(model, [plain])  # not without CUDA
    weight = type("", (), {"device": torch.device("cuda"), "dtype": torch.bfloat16, "requires_grad": False})
    on_cuda = type("", (), {"norm": type("", (), {"weight": weight})})
    assert captured.supports(on_cuda, [plain, completion(temperature=0, stop_token_ids=[3], seed=4)])
    assert captured.supports(on_cuda, [sampled, completion(temperature=0.7, top_p=0.9, seed=8)])
    assert captured.supports(on_cuda, [plain, sampled])
    for params in (
        {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1},
        {"logit_bias": {1: 1.0}}, {"logprobs": 1}, {"min_tokens": 2}, {"max_tokens": 2 * captured.CHUNK},
    ):  # fmt: skip
        assert not captured.supports(on_cuda, [completion(**params)]), params


def test_a_step_asks_the_device_for_nothing() -> None:
    """On meta there are no values to ask for: what would wait for the device fails there."""
    model = Mistral7B(TINY, device="meta")
    rows = [completion(temperature=0.8, top_k=7, top_p=0.9, min_p=0.01) for _ in range(2)]
    for row in rows:
        row.token_ids.append(5)
    cache = model.rolling_cache(2, 64, static=True)
    with torch.inference_mode():
        decode = captured.CapturedDecode(model, cache, rows, 64)
        decode._step()
        assert decode.out.shape == (captured.CHUNK, 2)
        with pytest.raises(RuntimeError, match="meta"):  # the control
            bool(decode.out.any())


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: a graph can be captured on one only")
def test_it_is_captured_on_a_gpu() -> None:
    params = SamplingParams(temperature=1.5, top_k=20, top_p=0.8, max_tokens=50, ignore_eos=True, seed=5)
    seen: list[object] = []
    real = captured.CapturedDecode._capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured.CapturedDecode, "_capture", lambda self: (real(self), seen.append(self.graph)))
        got = generate(MODEL, PROMPTS, params)
    assert len(seen) == 1
    assert isinstance(seen[0], torch.cuda.CUDAGraph)
    assert ids(got) == ids(by_steps(MODEL, PROMPTS, params))
