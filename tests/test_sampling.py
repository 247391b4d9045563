"""Sampling against a plain numpy twin, against the distribution it claims, and at its edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_7b.errors import SamplingError
from mistral_7b.sampling import (
    CANDIDATES,
    History,
    SamplingParams,
    adjust,
    choose,
    draw_seed,
    keep_top_p,
    logprobs,
    narrow,
    sample,
    uniform,
)

V = 97


def random_logits(rows=1, vocab=V, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def twin(logits, p, banned=(), prompt=(), output=()):
    """One row from raw logits to probabilities, written token by token from vLLM's description."""
    x = np.array(logits, dtype=np.float64)
    for token, number in (p.logit_bias or {}).items():
        x[token] += number
    for token in banned:
        x[token] = -np.inf
    for token in set(prompt) | set(output):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(output):
        x[token] -= p.frequency_penalty * list(output).count(token) + p.presence_penalty
    if p.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    x = x / p.temperature
    probabilities = softmax(x)
    for token in range(len(x)):
        if probabilities[token] < p.min_p * probabilities.max():
            x[token] = -np.inf
    if 0 < p.top_k < len(x):
        x[x < sorted(x)[-p.top_k]] = -np.inf
    if p.top_p < 1:
        probabilities, total, kept = softmax(x), 0.0, set()
        for token in np.argsort(-probabilities):
            if total >= p.top_p:
                break
            kept.add(token)
            total += probabilities[token]
        for token in range(len(x)):
            if token not in kept:
                x[token] = -np.inf
    return softmax(x)


def probabilities(logits, p, banned=(), prompt=(), output=()):
    """The same through the package, for one row."""
    history = History([prompt], len(logits), "cpu")
    for token in output:
        history.add(torch.tensor([token]))
    x = adjust(logits[None], p, banned, history)
    return torch.eye(x.shape[-1])[x.argmax()] if p.greedy else narrow(x, p).double().softmax(-1)[0]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.3, 1, 2.5]),
    top_k=st.sampled_from([-1, 0, 1, 2, 10, V, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1]),
    min_p=st.sampled_from([0, 0.01, 0.2, 1]),
    repetition_penalty=st.sampled_from([0.5, 1, 1.7]),
    presence_penalty=st.sampled_from([-2, 0, 1.3]),
    frequency_penalty=st.sampled_from([-0.7, 0, 2]),
    logit_bias=st.none()
    | st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100, -1.5, 4, 100]), max_size=4),
)
TOKENS = st.lists(st.integers(0, V - 1), max_size=12)


@given(p=PARAMS, seed=st.integers(0, 10**6), banned=TOKENS, prompt=TOKENS, output=TOKENS)
@settings(max_examples=300, deadline=None)
def test_each_step_agrees_with_the_numpy_twin(p, seed, banned, prompt, output):
    logits = random_logits(seed=seed)[0].double()
    want = twin(logits.numpy(), p, banned, prompt, output)
    got = probabilities(logits, p, banned, prompt, output).double().numpy()
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.7, 0.97])
def test_top_p_over_a_large_vocabulary(p):
    """Few candidates are tried first; a flat distribution must fall back to them all."""
    for scale in (0.1, 8.0):
        logits = random_logits(2, 9 * CANDIDATES + 5, seed=3, scale=scale).double()
        kept = keep_top_p(logits, p)
        for row in range(2):
            want = twin(logits[row].numpy(), SamplingParams(top_p=p))
            np.testing.assert_array_equal(kept[row].isfinite().numpy(), want > 0)
        assert (kept.isfinite().sum(-1) > CANDIDATES).all() == (scale == 0.1 and p > 0.5)


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.8),
        SamplingParams(top_k=5),
        SamplingParams(min_p=0.1),
    ],
)
def test_tokens_come_with_their_probabilities(p):
    """Pearson's chi-squared of 20000 tokens from consecutive positions of one seed."""
    logits, n = random_logits(vocab=30, seed=1, scale=1.5), 20000
    u = [uniform(1234, 0, i) for i in range(n)]
    counts = np.bincount(sample(logits.expand(n, -1), p, u).numpy(), minlength=30)
    want = twin(logits[0].numpy(), p) * n
    assert counts[want == 0].sum() == 0
    want, counts = want[want > 0], counts[want > 0]
    freedom = len(want) - 1
    assert ((counts - want) ** 2 / want).sum() < freedom + 4 * math.sqrt(2 * freedom)


def test_the_random_numbers_are_even_and_independent_of_each_other():
    n = 4000
    for numbers in (
        [uniform(7, 0, i) for i in range(n)],
        [uniform(7, i, 3) for i in range(n)],
        [uniform(i, 0, 0) for i in range(n)],
    ):
        assert all(0 <= u < 1 for u in numbers)
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 19 + 4 * math.sqrt(38)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(n)
    assert uniform(7, 0, 3) == uniform(7, 0, 3)
    assert len({uniform(s, i, t) for s in (-1, 0, 1, 2**80) for i in range(3) for t in range(3)}) == 36


@given(p=PARAMS, vocab=st.sampled_from([5, 97, 1003]))
@settings(max_examples=60, deadline=None)
def test_a_row_is_sampled_the_same_to_the_bit_whatever_stands_beside_it(p, vocab):
    p = SamplingParams(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p)
    logits = random_logits(7, vocab, seed=vocab)
    u = [uniform(5, 0, i) for i in range(7)]
    together = sample(logits, p, u)
    for row in range(7):
        assert sample(logits[row : row + 1], p, u[row : row + 1]).item() == together[row]
        if not p.greedy:
            assert torch.equal(narrow(logits[row : row + 1], p)[0], narrow(logits, p)[row])


def test_extremes_take_the_most_probable_token():
    logits = random_logits(4, seed=9)
    best = logits.argmax(-1)
    for p in (
        SamplingParams(temperature=0),
        SamplingParams(temperature=1e-4),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-12),
        SamplingParams(min_p=1),
    ):
        for u in (0.0, 0.5, 1 - 2**-53):
            assert torch.equal(sample(logits, p, [u] * 4), best), p
    only = torch.full((1, V), -math.inf)
    only[0, 41] = -5
    for p in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.3, top_k=4, min_p=0.5)):
        for u in (0.0, 0.5, 1 - 2**-53):
            assert sample(only, p, [u]).item() == 41
    banned = [i for i in range(V) if i != 3]
    assert sample(logits, SamplingParams(), [0.7] * 4, banned).tolist() == [3] * 4


def test_a_token_of_no_probability_is_never_chosen():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u, want in ((0.0, 1), (0.499, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert choose(logits, torch.tensor([u], dtype=torch.float64)).item() == want


def test_logprobs_are_those_of_the_raw_distribution():
    logits, tokens = random_logits(3, seed=4), torch.tensor([5, 0, 96])
    table = [np.log(softmax(row.double().numpy())) for row in logits]
    for k in (0, 1, 4, -1, 1000):
        for row, entry, token in zip(table, logprobs(logits, tokens, k, str), tokens.tolist(), strict=True):
            order = np.argsort(-row).tolist()
            wanted = order if k < 0 else order[:k]
            assert next(iter(entry)) == token
            assert set(entry) == {token, *wanted}
            for t, found in entry.items():
                assert found.logprob == pytest.approx(row[t], abs=1e-5)
                assert (found.rank, found.decoded_token) == (order.index(t) + 1, str(t))


def test_history_counts_tokens_and_follows_its_rows():
    history = History([[1, 1], [2], [3]], 6, "cpu")
    for step in ([4, 5, 5], [4, 4, 5]):
        history.add(torch.tensor(step))
    part = history.select([2, 0])
    assert part.counts.tolist() == [[0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 2, 0]]
    assert part.prompt.nonzero().tolist() == [[0, 3], [1, 1]]


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "n": [0, 1.5, True, None],
        "temperature": [-0.1, math.nan, math.inf, "1", None, True],
        "top_k": [-2, 1.0],
        "top_p": [0, -1, 1.01, math.nan],
        "min_p": [-0.1, 1.1],
        "repetition_penalty": [0, -1, math.inf],
        "presence_penalty": [-2.1, 2.1],
        "frequency_penalty": [-2.1, 2.1, math.nan],
        "logit_bias": [{1: 101}, {-1: 0}, {"x": 1}, [1], {1: math.nan}, {1: None}],
        "stop": ["", ["a", ""], [1], b"x", {"a": 1}],
        "stop_token_ids": [[-1], ["2"], [1.0], "2"],
        "ignore_eos": [1, None],
        "max_tokens": [0, -1, 1.0],
        "min_tokens": [-1, 17, None],
        "seed": [1.5, "1", True],
        "logprobs": [-2, 0.5, True],
        "prompt_logprobs": [-2],
    }.items(),
)
def test_values_out_of_range_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(SamplingError, match=name):
            SamplingParams(**{name: value})


def test_values_in_range_are_taken():
    p = SamplingParams(logit_bias={"5": 1}, stop="x", top_k=-1, max_tokens=None, min_tokens=99, seed=-3)
    assert (p.logit_bias, p.stops, SamplingParams(stop=["a", "b"]).stops) == ({5: 1.0}, ("x",), ("a", "b"))
    assert SamplingParams() == SamplingParams.from_dict({}) == SamplingParams(temperature=1, max_tokens=16)
    with pytest.raises(SamplingError, match="topp"):
        SamplingParams.from_dict({"topp": 1})
    with pytest.raises(AttributeError):
        p.top_p = 0.5


def test_seeds_are_drawn_from_torchs_generator():
    torch.manual_seed(0)
    drawn = [draw_seed(), draw_seed()]
    torch.manual_seed(0)
    assert [draw_seed(), draw_seed()] == drawn
    assert drawn[0] != drawn[1]
