"""Sampling against a plain numpy twin, against the distribution it claims, and at its edges."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from example_counts import MANY, SOME
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from mistral_7b.engine.completion import Completion
from mistral_7b.errors import SamplingError
from mistral_7b.sampling import choice as sampling
from mistral_7b.sampling.choice import CANDIDATES, choose, integer_weights, modes_of, select_tokens, uniforms
from mistral_7b.sampling.logprobs import logprobs
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.sampling.sampler import History, Row, adjust, draw_seed, sample_rows

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


def weights_of(logits, *rows):
    """What the package draws from: (R, V) int64."""
    x = adjust(logits, rows)
    return integer_weights(x, x.amax(-1), modes_of([row.params for row in rows], x.shape[-1], x.device))


def probabilities(logits, p, banned=(), prompt=(), output=()):
    """The same through the package, for one row."""
    row = Row(p, 0.0, banned, History(prompt).after(output))
    if p.greedy:
        return torch.eye(len(logits))[sample_rows(logits[None], [row])[0]]
    weights = weights_of(logits[None], row)[0].double()
    return weights / weights.sum()


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
@MANY
def test_each_step_agrees_with_the_numpy_twin(p, seed, banned, prompt, output):
    logits = random_logits(seed=seed)[0].double()
    want = twin(logits.numpy(), p, banned, prompt, output)
    got = probabilities(logits, p, banned, prompt, output).double().numpy()
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.7, 0.97])
def test_a_large_vocabulary(p):
    """Few candidates are sorted first; a flat distribution, or a large k, must fall back to them all."""
    asked = [{}, {"top_k": 3000}, {"top_k": 30}, {"min_p": 1e-3}]
    for scale in (0.1, 8.0):
        logits = random_logits(len(asked), 9 * CANDIDATES + 5, seed=3, scale=scale).double()
        rows = [Row(SamplingParams(top_p=p, **a)) for a in asked]
        kept = weights_of(logits, *rows) > 0
        for row in range(len(asked)):
            want = twin(logits[row].numpy(), rows[row].params)
            np.testing.assert_array_equal(kept[row].numpy(), want > 0)
        assert (kept[0].sum() > CANDIDATES) == (scale == 0.1 and p > 0.5)


def test_equals_are_kept_or_left_out_together():
    """Far more of them than are sorted at first, and with the k-th among them."""
    logits = torch.zeros(1, 4 * CANDIDATES)
    logits[:, 5::4] = 1.0
    logits[:, 1] = 2.0
    for asked, kept in (
        ({"top_k": 1}, 1), ({"top_k": 2}, CANDIDATES), ({"top_k": 3 * CANDIDATES}, 4 * CANDIDATES),
        ({"top_k": 2, "top_p": 1e-6}, 1), ({"top_k": 2, "top_p": 0.5}, CANDIDATES), ({"min_p": 0.3}, CANDIDATES),
        ({"top_p": 0.3}, CANDIDATES), ({"top_p": 0.9}, 4 * CANDIDATES),
    ):  # fmt: skip
        assert (weights_of(logits, Row(SamplingParams(**asked))) > 0).sum() == kept, asked


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
    rows = [Row(p, u) for u in uniforms(1234, 0, 0, n)]
    counts = np.bincount(sample_rows(logits.expand(n, -1), rows).numpy(), minlength=30)
    want = twin(logits[0].numpy(), p) * n
    assert counts[want == 0].sum() == 0
    want, counts = want[want > 0], counts[want > 0]
    freedom = len(want) - 1
    assert ((counts - want) ** 2 / want).sum() < freedom + 4 * math.sqrt(2 * freedom)


def test_the_random_numbers_are_even_and_independent_of_each_other():
    n = 4000
    for numbers in (
        uniforms(7, 0, 0, n),
        np.array([uniforms(7, i, 3, 1)[0] for i in range(n)]),
        np.array([uniforms(i, 0, 0, 1)[0] for i in range(n)]),
    ):
        assert all(0 <= u < 1 for u in numbers)
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 19 + 4 * math.sqrt(38)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(n)
    assert len({u for s in (-1, 0, 1, 2**80) for i in range(3) for u in uniforms(s, i, 0, 3)}) == 36


def test_a_random_number_is_the_first_word_of_its_own_block():
    """However many are made at once; 0 to 2^53 are all there is."""
    for seed, index, first in ((7, 0, 0), (-3, 2, 60), (2**80, 1, 1000)):
        blocks = [np.random.Philox(key=seed % 2**128, counter=[first + i, index, 0, 0]) for i in range(9)]
        want = [(block.random_raw() >> 11) * 2.0**-53 for block in blocks]
        assert uniforms(seed, index, first, 9).tolist() == want


def test_a_completion_asks_for_its_own_place():
    c = Completion([5, 7], SamplingParams(presence_penalty=1, min_tokens=2, max_tokens=200), 200, seed=9, index=3)
    want = uniforms(9, 3, 0, 200)
    for n in range(100):
        row, later = c.row(), c.row([8, 7, 8])
        assert (row.u, later.u) == (want[n], want[n + 3])
        assert (bool(row.banned), bool(later.banned)) == (n < 2, False)
        assert dict(zip(later.history.tokens, later.history.counts, strict=True)) == {5: n, 7: 1, 8: 2}
        assert dict(zip(row.history.tokens, row.history.counts, strict=True)) == {5: n, 7: 0}
        c.push(5)


def bits_of(tokens, vocab):
    """A grammar's mask that lets these tokens come."""
    allowed = np.zeros(-(-vocab // 32) * 32, dtype=bool)
    allowed[list(tokens)] = True
    return np.packbits(allowed, bitorder="little").view(np.int32)


ROWS = st.builds(
    lambda p, u, banned, prompt, output, allowed: Row(
        p,
        u,
        tuple(banned),
        History(prompt).after(output) if p.penalizes else None,
        allowed and bits_of(allowed, V),
    ),
    PARAMS,
    st.sampled_from([0.0, 0.3, 0.77, 1 - 2**-53]),
    TOKENS,
    TOKENS,
    TOKENS,
    st.none() | st.sets(st.integers(0, V - 1), min_size=1, max_size=5),
)


@given(rows=st.lists(ROWS, min_size=1, max_size=9), vocab=st.sampled_from([V, 3 * CANDIDATES + 1]), data=st.data())
@MANY
def test_a_row_is_sampled_the_same_to_the_bit_whatever_stands_beside_it(rows, vocab, data):
    """Any mixture of rows: all together, in another order, and each alone."""
    if vocab > V:
        rows = [dataclasses.replace(row, allowed=None) for row in rows]
    logits = random_logits(len(rows), vocab, seed=data.draw(st.integers(0, 10**6)))
    logits[:, ::3] = logits[:, ::3].round()  # some equals
    before = logits.clone()
    together = sample_rows(logits, rows)
    order = data.draw(st.permutations(range(len(rows))))
    assert sample_rows(logits[order], [rows[i] for i in order]).tolist() == together[order].tolist()
    for i, row in enumerate(rows):
        assert sample_rows(logits[i : i + 1], [row]).item() == together[i]
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        weights = weights_of(logits[drawn], *(rows[i] for i in drawn))
        for place, i in enumerate(drawn):
            assert torch.equal(weights_of(logits[i : i + 1], rows[i])[0], weights[place])
    assert torch.equal(logits, before)


@given(rows=st.lists(ROWS, min_size=1, max_size=9), seed=st.integers(0, 10**6))
@SOME
def test_where_everything_is_sorted_the_tokens_are_the_same(rows, seed):
    """As on a GPU, which is not asked whether few candidates were enough."""
    logits = random_logits(len(rows), 3 * CANDIDATES + 1, seed=seed)
    rows = [dataclasses.replace(row, allowed=None) for row in rows]
    few = sample_rows(logits, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_cutoff_on_cpu", sampling._cutoff)
        assert torch.equal(sample_rows(logits, rows), few)


def test_no_device_is_asked_for_a_value():
    """On meta there are no values to ask for: what would wait for the device fails there."""
    rows = [
        Row(SamplingParams(temperature=0)),
        Row(SamplingParams(top_k=7, top_p=0.9, min_p=0.01), 0.5, (3,)),
        Row(SamplingParams(presence_penalty=1, logit_bias={1: 1.0}), 0.5, (), History([1, 2])),
        Row(SamplingParams(), 0.5, (), None, bits_of([4], V)),
    ]
    logits = torch.zeros(len(rows), V, device="meta")
    assert sample_rows(logits, rows).shape == (len(rows),)
    with pytest.raises(RuntimeError, match="meta"):  # the control
        bool(sample_rows(logits, rows).any())


def test_a_grammar_alone_decides_and_bias_and_penalties_choose_among_what_it_allows():
    logits, vocab = random_logits(1, 70, seed=2, scale=0.5), 70
    for allowed in ({0}, {31, 32}, {63, 64, 69}):
        best = max(allowed, key=lambda t: logits[0, t])
        mask = bits_of(allowed, vocab)
        for p in (SamplingParams(temperature=0), SamplingParams(temperature=1e-4), SamplingParams(top_k=1)):
            assert sample_rows(logits, [Row(p, 0.5, tuple(allowed), None, mask)]).item() == best
        drawn = {
            sample_rows(logits, [Row(SamplingParams(), u, (), None, mask)]).item() for u in uniforms(1, 0, 0, 200)
        }
        assert drawn == allowed
        lifted = SamplingParams(temperature=0, logit_bias=dict.fromkeys({*range(vocab)} - {best}, 50.0))
        assert sample_rows(logits, [Row(lifted, allowed=mask)]).item() == max(
            allowed, key=lambda t: logits[0, t] + 50 * (t != best)
        )


def test_logits_without_a_finite_highest_give_no_token():
    rows = [Row(SamplingParams(temperature=t, top_k=k), 0.5) for t in (0, 1) for k in (0, 3)]
    for broken in (math.nan, math.inf):
        logits = random_logits(len(rows), seed=4)
        want = sample_rows(logits, rows)
        for i in range(len(rows)):
            bad = logits.clone()
            bad[i, 7] = broken
            got = sample_rows(bad, rows)
            assert got[i] == -1
            assert [*got[:i], *got[i + 1 :]] == [*want[:i], *want[i + 1 :]]
    assert sample_rows(torch.full((len(rows), V), -math.inf), rows).tolist() == [-1] * len(rows)


def test_rows_may_be_sampled_in_and_out_of_inference_mode():
    """The tensors that are kept from one to the next serve both."""
    logits, rows = random_logits(2, seed=11), [Row(SamplingParams(temperature=0.83, top_p=0.71), 0.4)] * 2
    with torch.inference_mode():
        want = sample_rows(logits, rows)
    assert sample_rows(logits.requires_grad_(), rows).tolist() == want.tolist()


def test_captured_ways_are_those_of_the_rows():
    """The same ways with other logits and numbers, as a captured step replays them."""
    params = [SamplingParams(temperature=0), SamplingParams(top_p=0.5), SamplingParams(), SamplingParams(top_k=3)]
    ways = modes_of(params, V, torch.device("cpu"))
    for seed in range(20):
        logits, u = random_logits(4, seed=seed), uniforms(seed, 0, 0, 4)
        want = sample_rows(logits, [Row(p, x) for p, x in zip(params, u, strict=True)])
        assert torch.equal(select_tokens(logits, ways, torch.from_numpy(u)), want)


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
            assert torch.equal(sample_rows(logits, [Row(p, u)] * 4), best), p
    only = torch.full((1, V), -math.inf)
    only[0, 41] = -5
    for p in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.3, top_k=4, min_p=0.5)):
        for u in (0.0, 0.5, 1 - 2**-53):
            assert sample_rows(only, [Row(p, u)]).item() == 41
    banned = [i for i in range(V) if i != 3]
    assert sample_rows(logits, [Row(SamplingParams(), 0.7, banned)] * 4).tolist() == [3] * 4


def test_a_token_of_no_probability_is_never_chosen():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u, want in ((0.0, 1), (0.499, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert sample_rows(logits, [Row(SamplingParams(), u)]).item() == want
        for scale in (1, 2**60):
            weights = torch.tensor([[0, scale, 0, scale, 0]])
            assert choose(weights, torch.tensor([u], dtype=torch.float64)).item() == want


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


def test_rows_get_their_own_number_of_logprobs():
    """Among many equals too, of which those with the lower ids come first."""
    logits = random_logits(4, seed=4).round()
    tokens, ks = torch.tensor([5, 0, 96, 7]), [3, 0, -1, 20]
    together = logprobs(logits, tokens, ks, str)
    for row, (k, entry) in enumerate(zip(ks, together, strict=True)):
        assert [entry] == logprobs(logits[row : row + 1], tokens[row : row + 1], k, str)
        order = sorted(range(V), key=lambda t: (-logits[row, t], t))[: V if k < 0 else k]
        assert list(entry) == [tokens[row].item(), *(t for t in order if t != tokens[row])]
    sure = torch.full((1, V), -math.inf)
    sure[0, 3] = 0
    assert list(logprobs(sure, torch.tensor([3]), 3)[0].items()) == [
        (3, (0.0, 1, None)), (0, (-math.inf, 2, None)), (1, (-math.inf, 3, None)),
    ]  # fmt: skip


def test_history_counts_tokens_and_what_comes_later_leaves_it_alone():
    history = History([3, 1, 1])
    history.add(4)
    later = history.after([1, 4, 0])
    for h, want in ((history, {1: 0, 3: 0, 4: 1}), (later, {1: 1, 3: 0, 4: 2, 0: 1})):
        assert dict(zip(h.tokens.tolist(), h.counts.tolist(), strict=True)) == want
    history.add(0)
    assert later.counts.tolist() == [1, 0, 2, 1]


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
        with refused(SamplingError, field=name):
            SamplingParams(**{name: value})


def test_values_in_range_are_taken():
    p = SamplingParams(logit_bias={"5": 1}, stop="x", top_k=-1, max_tokens=None, min_tokens=99, seed=-3)
    assert (p.logit_bias, p.stops, SamplingParams(stop=["a", "b"]).stops) == ({5: 1.0}, ("x",), ("a", "b"))
    assert SamplingParams() == SamplingParams.from_dict({}) == SamplingParams(temperature=1, max_tokens=16)
    with refused(SamplingError, field="topp"):
        SamplingParams.from_dict({"topp": 1})
    with pytest.raises(AttributeError):
        p.top_p = 0.5


def test_seeds_are_drawn_from_torchs_generator():
    torch.manual_seed(0)
    drawn = [draw_seed(), draw_seed()]
    torch.manual_seed(0)
    assert [draw_seed(), draw_seed()] == drawn
    assert drawn[0] != drawn[1]
