"""Speculative decoding changes only the number of steps: the tokens, text, finish reasons and scores are equal."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from example_counts import MANY, SOME
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny import tiny_args, tiny_model
from torch import Tensor

from mistral_7b.engine.completion import RequestOutput
from mistral_7b.engine.pages import PagePool
from mistral_7b.engine.speculation import (
    BACKOFF,
    DraftLength,
    DraftModel,
    PromptLookup,
    Speculator,
    StepTime,
    Tally,
    common_prefix_length,
)
from mistral_7b.errors import GenerationError
from mistral_7b.generate import Speculation, generate, stream
from mistral_7b.model import Mistral7B
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.tokenizer import Tokenizer

V3 = Tokenizer.v3()
V = 67
FREE = 0.0  # the row cost at which drafts are as long as they may be


def no_choice(logits: Tensor, ahead: Sequence[int]) -> int:
    raise AssertionError("prompt lookup asks no sampler")


@pytest.fixture(scope="module")
def model() -> Mistral7B:
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def small() -> Mistral7B:
    """A draft model: like the other but for a layer, so that it is right now and then."""
    big = tiny_model(dtype=torch.float64)
    part = Mistral7B(tiny_args(n_layers=1, sliding_window=5), dtype=torch.float64).requires_grad_(False)
    part.load_state_dict({k: v for k, v in big.state_dict().items() if "layers.1." not in k})
    return part


def repeating(period: int, times: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, V, (period,), generator=draw).tolist() * times


def facts(requests: Sequence[RequestOutput]) -> list[tuple[object, ...]]:
    """All that a completion says, log-probabilities apart."""
    return [(c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason) for r in requests for c in r.outputs]


def same(
    model: Mistral7B, prompts: Any, params: Any, speculate: Speculation, tokenizer: Tokenizer | None = None
) -> None:
    """Generated with and without, all is equal."""
    plain = generate(model, prompts, params, tokenizer)
    equal(generate(model, prompts, params, tokenizer, speculate=speculate), plain)


def equal(quick: Sequence[RequestOutput], plain: Sequence[RequestOutput]) -> None:
    """All is equal; log-probabilities to float tolerance."""
    assert facts(quick) == facts(plain)
    for a, b in zip(quick, plain, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert (x.logprobs is None) == (y.logprobs is None)
            for one, two in zip(x.logprobs or [], y.logprobs or [], strict=True):
                assert one.keys() == two.keys()
                assert all(one[t].rank == two[t].rank for t in one)
                assert all(one[t].logprob == pytest.approx(two[t].logprob, abs=1e-6) for t in one)


# --- exactness ---

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
KINDS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "seed": 3},
    "narrowed": {"temperature": 1.2, "seed": 4, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    "penalised": {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    "penalised and sampled": {"temperature": 0.8, "seed": 5, "repetition_penalty": 1.1, "frequency_penalty": 0.3},
    "biased": {"temperature": 0.5, "seed": 6, "logit_bias": {7: 4.0, 11: -3.0}},
    "scored": {"temperature": 0.7, "seed": 7, "logprobs": 3, "prompt_logprobs": 1},
    "several": {"temperature": 0.8, "seed": 8, "n": 3},
    "ended": {"temperature": 0.9, "seed": 9, "ignore_eos": False, "stop_token_ids": [5, 9], "min_tokens": 12},
    "ended greedily": {"temperature": 0, "ignore_eos": False, "stop_token_ids": [20, 30], "min_tokens": 7},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_those_without_speculation(model: Mistral7B, small: Mistral7B, name: str, kind: str) -> None:
    """Alone and in a ragged batch, far beyond the window."""
    params = SamplingParams(**{"max_tokens": 60, "ignore_eos": True, **KINDS[name]})
    prompts = [repeating(5, 4), repeating(11, 1, 1), repeating(2, 2, 2), [3]]
    beside, alone = generate(model, prompts, params), generate(model, prompts[0], params)
    for max_draft in (1, 6):
        speculate = Speculation(small if kind == "draft" else None, max_draft, 3, 1, row_cost=FREE)
        equal(generate(model, prompts, params, speculate=speculate), beside)
        equal(generate(model, prompts[0], params, speculate=speculate), alone)
        assert speculate.tally.accepted > 0  # or nothing was tested
        assert speculate.tally.drafted > speculate.tally.accepted


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize("window", [1, 8, None])
def test_rows_that_differ_in_all_share_a_batch(small: Mistral7B, window: int | None, kind: str) -> None:
    model = tiny_model(tiny_args(sliding_window=window, max_seq_len=300), torch.float64)
    prompts = [repeating(1 + i, 3, i) for i in range(len(KINDS))]
    params = [
        SamplingParams(**{"max_tokens": 10 + 7 * i, "ignore_eos": True, **changes})
        for i, changes in enumerate(KINDS.values())
    ]
    speculate = Speculation(small if kind == "draft" else None, 5, 3, 1, row_cost=FREE)
    same(model, prompts, params, speculate)
    same(model, prompts[::-1], params[::-1], speculate)
    assert speculate.tally.accepted > 0


@pytest.mark.parametrize("window", [20, None])
def test_sequences_of_many_pages_have_memory_for_drafts(window: int | None) -> None:
    model = tiny_model(tiny_args(sliding_window=window, max_seq_len=100), torch.float64)
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=70, ignore_eos=True)
    speculate = Speculation(model, 7, row_cost=FREE)
    same(model, [repeating(3, 2), repeating(5, 1)], params, speculate)
    assert speculate.tally.accepted > 50


class Oracle:
    """A drafter that knows the continuation, and is wrong at positions drawn by the test."""

    def __init__(self, ids: list[int], begun: int, lies: Callable[[int], bool]) -> None:
        self.ids, self.at, self.lies = ids, begun, lies

    def extend(self, tokens: Sequence[int]) -> None:
        assert self.ids[self.at : self.at + len(tokens)] == list(tokens)
        self.at += len(tokens)

    def propose(self, n: int, choose: Callable[[Tensor, Sequence[int]], int]) -> list[int]:
        truth = self.ids[self.at : self.at + n]
        return [(t + 1) % V if self.lies(self.at + i) else t for i, t in enumerate(truth)]


@settings(SOME, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_pattern_of_accepted_and_rejected_drafts_is_exact(data: st.DataObject) -> None:
    """Accepted and rejected drafts in any order cover every rollback, in rows that accept different counts."""
    window = data.draw(st.sampled_from([1, 3, 8, None]))
    model = tiny_model(tiny_args(sliding_window=window, max_seq_len=200), torch.float64)
    prompts = [repeating(data.draw(st.integers(1, 20)), 1, i) for i in range(data.draw(st.integers(1, 4)))]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=data.draw(st.integers(1, 40)), logprobs=1)
    plain = generate(model, prompts, params)
    lies = data.draw(st.lists(st.booleans(), min_size=7, max_size=7))
    whole = iter([[*r.prompt_token_ids, *r.outputs[0].token_ids] for r in plain])

    class Oracular(Speculation):
        def speculator(self, prompt: Sequence[int], max_length: int) -> Speculator:
            oracle = Oracle(next(whole), len(prompt), lambda place: lies[place % 7])
            return Speculator(oracle, DraftLength(self.max_draft), self.tally)

    speculate = Oracular(max_draft=data.draw(st.integers(1, 6)), row_cost=FREE)
    assert facts(generate(model, prompts, params, speculate=speculate)) == facts(plain)
    if not any(lies):
        assert speculate.tally.accepted == speculate.tally.drafted
        longest = max(len(r.outputs[0].token_ids) for r in plain)
        assert speculate.tally.steps <= len(prompts) * (1 + math.ceil((longest - 1) / 2))


def test_accepted_tokens_have_the_distribution_of_plain_sampling() -> None:
    """Chi-square over pairs of tokens of 2000 seeds against the probabilities themselves; and a control."""
    args = tiny_args(vocab_size=7, sliding_window=4)
    model = tiny_model(args, torch.float64)
    small = tiny_model(dataclasses.replace(args, n_layers=1), torch.float64, seed=1)
    prompt, n = [3, 4, 5, 3, 4], 2000

    def next_token(text: list[int]) -> Tensor:
        return model(torch.tensor([text]))[0][0, -1].softmax(-1)

    wanted = n * torch.stack([next_token(prompt)[a] * next_token([*prompt, a]) for a in range(7)]).flatten()
    common = wanted >= 5  # the rest is counted as one

    def too_far(seen: Tensor) -> bool:
        """Four deviations beyond what chi-square is on average: by chance in about one of 5000."""
        parts = [torch.cat([t[common], t[~common].sum()[None]]) for t in (seen, wanted)]
        freedom = int(common.sum())
        distance = float(((parts[0] - parts[1]) ** 2 / parts[1]).sum())
        return distance > freedom + 4 * math.sqrt(2 * freedom)

    params = [SamplingParams(max_tokens=3, ignore_eos=True, seed=seed) for seed in range(n)]
    for speculate in (Speculation(small, 2, row_cost=FREE), Speculation(None, 2, 2, 1, row_cost=FREE)):
        outputs = generate(model, [prompt] * n, params, batch_size=500, speculate=speculate)
        pairs = torch.tensor([r.outputs[0].token_ids[:2] for r in outputs])
        seen = torch.bincount(7 * pairs[:, 0] + pairs[:, 1], minlength=49).double()
        assert not too_far(seen)
        assert too_far(seen.roll(1))
        assert min(speculate.tally.accepted, speculate.tally.drafted - speculate.tally.accepted) > 100


# --- text and streams ---


def wordy() -> Mistral7B:
    return tiny_model(tiny_args(vocab_size=V3.vocab_size), torch.float64)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stop", [None, "e", ["th", " a"]])
def test_streams_give_the_same_pieces(n: int, stop: Any) -> None:
    """Token for token: however many come of a step, each has the piece that it would have without."""
    model = wordy()
    bias = dict.fromkeys(V3.encode("the cat and the hat and ", bos=False), 9.0)
    params = SamplingParams(n=n, seed=5, max_tokens=60, min_tokens=25, stop=stop, temperature=0.9, logit_bias=bias)
    speculate = Speculation(max_draft=6, min_ngram=1, row_cost=FREE)
    plain = list(stream(model, "the cat and the hat", params, V3))
    quick = list(stream(model, "the cat and the hat", params, V3, speculate=speculate))
    for index in range(n):
        assert [p for p in quick if p.index == index] == [p for p in plain if p.index == index]
    assert speculate.tally.accepted > 0
    same(model, "the cat and the hat", params, speculate, V3)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 20])
def test_an_end_in_the_midst_of_a_draft_is_the_end(model: Mistral7B, max_tokens: int) -> None:
    """EOS, a stop token and the token limit, at every position of a text whose drafts are all accepted."""
    prompt = repeating(6, 5)
    cycle = dict.fromkeys(prompt[:6], 100.0)
    free = generate(model, prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logit_bias=cycle))
    said = free[0].outputs[0].token_ids
    for end in sorted(set(said)):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=[end], logit_bias=cycle)
        speculate = Speculation(max_draft=8, min_ngram=1, row_cost=FREE)
        same(model, prompt, params, speculate)
        assert speculate.tally.tokens == len(generate(model, prompt, params)[0].outputs[0].token_ids)


def test_steps_are_fewer_and_counted(model: Mistral7B, monkeypatch: pytest.MonkeyPatch) -> None:
    speculate, forwards = Speculation(max_draft=8, min_ngram=1, row_cost=FREE), []
    plain = model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, *a: forwards.append(len(t)) or plain(t, *a))
    prompt = repeating(5, 6)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    out = generate(model, prompt, params, speculate=speculate)[0].outputs[0]
    tally = speculate.tally
    assert len(out.token_ids) == tally.tokens == 40
    assert len(forwards) == tally.steps < 40
    assert sum(n - 1 for n in forwards[1:]) == tally.drafted
    assert tally.tokens == tally.steps + tally.accepted
    assert tally.acceptance == tally.accepted / tally.drafted
    assert tally.tokens_per_step == 40 / tally.steps
    assert (Tally().acceptance, Tally().tokens_per_step) == (0, 0)


def test_memory_is_flat_with_drafts(model: Mistral7B, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages for the window and a step's tokens, which keep their place while tokens come and are taken back."""
    made: list[PagePool] = []
    plain = PagePool.__init__
    monkeypatch.setattr(PagePool, "__init__", lambda pool, *a, **k: made.append(pool) or plain(pool, *a, **k))
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=100, ignore_eos=True)
    speculate = Speculation(max_draft=5, min_ngram=1, row_cost=FREE)
    places, held = set(), []
    for _ in stream(model, [3], params, speculate=speculate):
        places.add(made[0].layers[0][0].data_ptr())
        held.append(made[0].held)
    assert len(made) == len(places) == 1
    assert max(held) <= -(-(8 + 5) // made[0].page) + 1  # of a hundred tokens
    assert speculate.tally.accepted > 0


# --- the drafters ---


def slowly(tokens: list[int], n: int, ngram: int, least: int) -> list[int]:
    """Prompt lookup by its definition, searching the whole text."""
    for size in range(ngram, least - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if size <= len(tokens) and tokens[start : start + size] == tokens[len(tokens) - size :]:
                text = list(tokens)
                for i in range(n):
                    text.append(text[start + size + i])
                return text[len(tokens) :]
    return []


@settings(MANY, derandomize=True)
@given(
    st.lists(st.integers(0, 2), max_size=30), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.data()
)
def test_prompt_lookup_is_a_search(tokens: list[int], a: int, b: int, n: int, data: st.DataObject) -> None:
    drafter = PromptLookup(max(a, b), min(a, b))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    for start, stop in itertools.pairwise([0, *cuts, len(tokens)]):
        drafter.extend(tokens[start:stop])
        assert drafter.propose(n, no_choice) == slowly(tokens[:stop], n, max(a, b), min(a, b))


def test_prompt_lookup_takes_the_longest_and_then_the_latest_repetition() -> None:
    drafter = PromptLookup(3, 1)
    drafter.extend([1, 2, 3, 40, 9, 3, 50, 9, 3, 60, 1, 2, 3])
    assert drafter.propose(2, no_choice) == [40, 9]  # after 1 2 3, not after the later 3
    drafter.extend([9, 3])
    assert drafter.propose(2, no_choice) == [60, 1]  # after the later of two
    drafter.extend([70])
    assert drafter.propose(2, no_choice) == []
    drafter.extend([70])
    assert drafter.propose(3, no_choice) == [70, 70, 70]


def test_appending_a_token_searches_nothing() -> None:
    """A hundred times the tokens give about a hundred times the index entries."""
    sizes = []
    for n in (100, 10_000):
        drafter = PromptLookup(4, 2)
        drafter.extend(torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(0)).tolist())
        sizes.append(len(drafter._after))
    assert sizes[1] <= 3 * 10_000
    assert sizes[0] >= 150


def test_a_draft_model_computes_each_token_once(small: Mistral7B, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    plain = small.hidden
    monkeypatch.setattr(small, "hidden", lambda t, *a: read.append(t[0].tolist()) or plain(t, *a))
    ids = repeating(30, 1)
    drafter = DraftModel(small, 60, 4)
    drafter.extend(ids[:20])

    def choose(logits: Tensor, ahead: Sequence[int]) -> int:
        return int(logits.argmax())

    with torch.inference_mode():
        draft = drafter.propose(4, choose)
        assert read == [ids[:20], draft[:1], draft[1:2], draft[2:3]]
        drafter.extend([*draft[:2], 7])  # two accepted, then another token
        assert drafter.cache.length.tolist() == [22]
        drafter.extend([8, 9])  # tokens of steps without a draft
        read.clear()
        later = drafter.propose(2, choose)
        assert read == [[7, 8, 9], later[:1]]
        text = [*ids[:20], *draft[:2], 7, 8, 9]
        for n, token in enumerate(later):
            logits, _ = small(torch.tensor([[*text, *later[:n]]]))
            assert token == int(logits[0, -1].argmax())
        drafter.extend([*later, 5])  # all accepted: the last of them was never fed
        assert drafter.cache.length.tolist() == [26]
        assert drafter.pending == [later[1], 5]


@pytest.mark.parametrize("came", [1, 2, 3])
def test_a_draft_of_which_only_a_prefix_was_used_is_rolled_back(small: Mistral7B, came: int) -> None:
    """An engine without pages for a whole draft feeds none of it: the new tokens may be no more than the draft."""
    ids = repeating(20, 1)

    def choose(logits: Tensor, ahead: Sequence[int]) -> int:
        return int(logits.argmax())

    with torch.inference_mode():
        drafter = DraftModel(small, 60, 4)
        drafter.extend(ids)
        draft = drafter.propose(4, choose)
        drafter.extend(draft[:came])
        other = DraftModel(small, 60, 4)
        other.extend([*ids, *draft[:came]])
        assert drafter.propose(4, choose) == other.propose(4, choose)


def test_a_draft_model_equal_to_the_model_is_always_accepted(model: Mistral7B) -> None:
    """Sampled too, with penalties and bans: it uses the random numbers and rules of the later positions."""
    params = SamplingParams(
        temperature=1.1, seed=2, n=2, max_tokens=40, min_tokens=40, repetition_penalty=1.2, frequency_penalty=0.5,
        logit_bias={2: 3.0}, top_p=0.95,
    )  # fmt: skip
    speculate = Speculation(model, 4, row_cost=FREE)
    same(model, repeating(9, 1), params, speculate)
    assert speculate.tally.drafted == speculate.tally.accepted > 50
    ends = {"stop_token_ids": [9], "logit_bias": {9: 100.0}, "min_tokens": 18, "max_tokens": 40}
    speculate = Speculation(model, 4, row_cost=FREE)
    same(model, repeating(9, 1), SamplingParams(temperature=0, ignore_eos=True, **ends), speculate)
    assert speculate.tally.accepted == 4 * 3 + 3  # the last of them is the end, once it may come


def test_common_prefix_length() -> None:
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2], [1, 2, 3]) == 2
    assert common_prefix_length([5, 2], [1, 2]) == common_prefix_length([], [1]) == 0


# --- the length ---


def linear(cost: float) -> Callable[[int], float]:
    return lambda n: 1 + cost * n


def test_the_draft_grows_with_acceptance_and_shrinks_without() -> None:
    length, lengths = DraftLength(16), []
    for _ in range(12):
        n = length.choose(linear(0.05))
        lengths.append(n)
        length.update(n, 0)
    assert lengths[0] < lengths[3] <= lengths[-1] == 16
    assert lengths == sorted(lengths)
    for _ in range(8):
        length.choose(linear(0.05))
        length.update(0, 1)
    assert length.choose(linear(0.05)) < lengths[0]


@pytest.mark.parametrize("cost", [0.02, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("a", [0.1, 0.5, 0.8, 0.95])
def test_the_draft_length_maximizes_the_expected_rate(a: float, cost: float) -> None:
    length = DraftLength(12)
    length.accepted, length.rejected = a, 1 - a
    rate = [sum(a**i for i in range(n + 1)) / (1 + cost * n) for n in range(13)]
    best = max(range(13), key=lambda n: rate[n])
    assert length.choose(linear(cost)) == (best or 2)  # 2: a probe, if no draft pays


def test_drafting_that_does_not_pay_pauses_and_is_probed() -> None:
    """Drafts that are always rejected cost only few probes; once they are accepted, drafting resumes."""
    length, tried = DraftLength(8), []
    for step in range(1000):
        if n := length.choose(linear(0.2)):
            tried.append(step)
            length.update(0, 1)
    assert len(tried) < 1000 / BACKOFF[1] + 12
    gaps = [b - a for a, b in itertools.pairwise(tried)]
    assert max(gaps) <= BACKOFF[1] + 1
    assert gaps[-1] == BACKOFF[1] + 1
    for _ in range(200):
        if n := length.choose(linear(0.2)):
            length.update(n, 0)
    assert length.choose(linear(0.2)) == 8
    dear = DraftLength(8)
    assert (
        sum(dear.choose(linear(2.0)) and not dear.update(2, 0) for _ in range(300)) < 20
    )  # accepted, and still too expensive


def test_a_rejected_token_is_counted_and_a_finished_sequence_rejects_none() -> None:
    for came, right, wrong in (([1, 2, 3, 1], 3, 0), ([1, 2, 9], 2, 1), ([9], 0, 1), ([1, 2], 2, 0)):
        drafter, length = PromptLookup(2, 1), DraftLength(3)
        drafter.extend([1, 2, 3, 1, 2, 3])
        speculator = Speculator(drafter, length, Tally())
        before = length.accepted, length.rejected
        assert speculator.propose(3, linear(FREE), no_choice) == [1, 2, 3]
        speculator.update(came)
        assert (length.accepted, length.rejected) == pytest.approx(
            (0.8 * before[0] + right, 0.8 * before[1] + wrong)
        )
        assert speculator.tally == Tally(1, len(came), 3, right)


def test_a_probe_waits_for_a_proposal() -> None:
    length = DraftLength(8)
    length.accepted, length.rejected = 0.0, 1.0
    assert [length.choose(linear(0.2)) for _ in range(5)] == [2] * 5  # the drafter had nothing to propose
    length.update(0, 1)
    assert [length.choose(linear(0.2)) for _ in range(BACKOFF[0] + 1)] == [0] * BACKOFF[0] + [2]


def test_step_time_is_measured_between_and_beyond() -> None:
    time = StepTime()
    assert not time.known
    time.add(1, 99.0)  # the first of a size may have compiled something
    assert not time.known
    for seconds in (1.0, 50.0, 1.2, 1.1):
        time.add(1, seconds)
    assert time.known
    assert time(1) == pytest.approx(1.15)
    assert 1.15 < time(2) < time(9) < 1.5  # estimated until it is measured
    for seconds in (9.0, 3.0, 3.0):
        time.add(5, seconds)
    assert time(5) == 3.0
    assert time(3) == pytest.approx((1.15 + 3.0) / 2)
    assert time(6) > 3.0
    given_cost = StepTime(0.5)
    given_cost.add(1, 7.0)
    given_cost.add(1, 7.0)
    assert (given_cost.known, given_cost(1), given_cost(4)) == (True, 1.0, 2.5)


def test_measured_row_costs_turn_drafting_off(model: Mistral7B, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a row costs as much as a step, nothing pays; by one where it is free, all does."""
    clock = [0.0]
    monkeypatch.setattr("mistral_7b.engine.engine.time.perf_counter", lambda: clock[0])
    plain, drafted = model.hidden, []
    for row_cost in (1.0, 0.0):

        def hidden(tokens: Tensor, *rest: Any, cost: float = row_cost) -> Tensor:
            clock[0] += 1 + cost * (len(tokens) - 1)
            return plain(tokens, *rest)

        monkeypatch.setattr(model, "hidden", hidden)
        speculate = Speculation(max_draft=6, min_ngram=1)
        params = SamplingParams(temperature=1.0, seed=0, max_tokens=90, ignore_eos=True)
        generate(model, repeating(4, 5), params, speculate=speculate)
        drafted.append(speculate.tally.drafted)
    assert drafted[0] < drafted[1] / 3


# --- refusals ---


def test_what_is_refused(model: Mistral7B) -> None:
    for wrong in (
        {"max_draft": 0}, {"min_ngram": 0}, {"ngram": 2, "min_ngram": 3}, {"row_cost": -1.0},
        {"row_cost": math.nan},
    ):  # fmt: skip
        with refused(GenerationError, field=next(iter(wrong))):
            Speculation(**wrong)  # type: ignore[arg-type]
    other = Speculation(tiny_model(tiny_args(vocab_size=66)))
    for call in (generate, stream):
        with refused(GenerationError, field="draft_model"):
            call(model, [3, 4], GREEDY, speculate=other)
