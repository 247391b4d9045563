"""Scores on the engine: those of the float64 reference, and equal bits in any batch, order and company."""

from __future__ import annotations

import pathlib
import random

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, truth

from mistral_7b import Mistral7B
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.errors import GenerationError, PromptTooLongError
from mistral_7b.evaluation.scoring import CHUNK, rounds, score, scoring_engine
from mistral_7b.lora.trainable import LoraArgs, adapt
from mistral_7b.quantization import quantize


def pairs_of(vocabulary: int, lengths: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Contexts about chunks and pages, one of which begins another; four continuations of each."""
    draw = random.Random(0)
    contexts = [[1, *(draw.randrange(3, vocabulary) for _ in range(n))] for n in lengths]
    contexts.append([*contexts[0], 5, 6])
    return [
        (c, [draw.randrange(3, vocabulary) for _ in range(draw.choice([1, 2, 9]))])
        for c in contexts
        for _ in "abcd"
    ]


@pytest.mark.parametrize("window", [8, None])
def test_scores_are_the_references(window: int | None) -> None:
    model = tiny_model(tiny_args(sliding_window=window), torch.float64)
    pairs = pairs_of(67, (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK))
    inputs = scoring_engine(model, None)
    for (context, continuation), found in zip(pairs, score(inputs, pairs), strict=True):
        table = truth(model, torch.tensor([*context, *continuation])).log_softmax(-1)
        for i, (token, s) in enumerate(zip(continuation, found, strict=True), len(context) - 1):
            assert s.logprob == pytest.approx(table[i, token].item(), abs=2e-6)  # log-softmax is float32
            assert s.greedy == (int(table[i].argmax()) == token)
    assert inputs.engine.counts.cached_tokens > 0


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_scores_have_equal_bits_at_every_batch_size_and_in_any_order(kind: str) -> None:
    pairs, found = pairs_of(4000, (3, 31, 32, 33, 65)), []
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    for batch in (1, 8, 64):
        model = Mistral7B.from_pretrained("demo", dtype=dtype, quantization="int8" if kind == "int8" else None)
        inputs, order = scoring_engine(model, None, batch), list(range(len(pairs)))
        random.Random(batch).shuffle(order)
        scores = dict(zip(order, score(inputs, [pairs[i] for i in order]), strict=True))
        found.append([scores[i] for i in range(len(pairs))])
        assert score(inputs, pairs[-1:])[0] == found[-1][-1]  # alone, with all its pages cached
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_was_scored_is_saved_as_it_was(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    for tie in (False, True):
        model, out = tiny_model(tiny_args(tie_embeddings=tie), dtype), tmp_path / str(tie)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        score(scoring_engine(model, None), [([1, 5], [6])])
        model.save_pretrained(out)
        after = Mistral7B.from_pretrained(out, dtype=dtype).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], t) for name, t in before.items())


def test_an_adapter_is_trained_further_after_it_was_scored() -> None:
    model = tiny_model(tiny_args())
    factors = adapt(model, LoraArgs(rank=2), seed=0)
    score(scoring_engine(model, None), [([1, 5], [6])])
    model(torch.tensor([[1, 5, 6]]))[0].sum().backward()
    assert all(p.grad is not None for p in factors)


def test_a_prefix_is_computed_once() -> None:
    model = quantize(tiny_model(tiny_args(sliding_window=None), torch.bfloat16), "int8")
    inputs, context = scoring_engine(model, None), [1, *range(3, 67)]
    score(inputs, [(context, [i, 5]) for i in range(3, 11)])
    counts = inputs.engine.counts
    assert counts.cached_tokens == 7 * 64
    assert counts.prompt_tokens == 8 * 66


def test_continuations_that_differ_in_the_last_token_take_one_pass() -> None:
    model = quantize(tiny_model(tiny_args(sliding_window=None), torch.bfloat16), "int8")
    inputs, context, done = scoring_engine(model, None), [1, *range(3, 40)], []
    pairs = [(context, [i]) for i in (3, 4, 5, 3)] + [(context, [9, i]) for i in (6, 7)]
    found = score(inputs, [pairs[i] for i in (4, 0, 1, 5, 2, 3)], done.append)
    assert inputs.engine.counts.computed_tokens == len(context) + 2  # the last one of the context twice
    assert sum(done) == len(pairs)
    alone = [score(scoring_engine(model, None), [pair])[0] for pair in pairs]
    assert found == [alone[i] for i in (4, 0, 1, 5, 2, 3)]
    assert len({each[-1].logprob for each in alone}) == len(pairs) - 1


def test_rounds_compute_each_prefix_before_it_is_shared() -> None:
    examples, a, b, other = [1, 2, 3, 4, 5], [6, 6, 6, 6], [7, 7, 7, 7], [9, 9, 9, 9]
    sequences = [[*examples, *middle, last] for middle in (a, b) for last in (8, 9)] + [other, [*other, 1]]
    assert list(rounds(sequences, 1000)) == [[0, 4], [1, 2, 5], [3]]
    assert list(rounds(sequences, 20)) == [
        [0],
        [1, 2],
        [3],
        [4],
        [5],
    ]  # prefixes count once
    assert list(rounds(sequences, 12)) == [[0], [1], [2], [3], [4], [5]]


def test_what_cannot_be_scored_is_refused() -> None:
    inputs = scoring_engine(tiny_model(tiny_args(sliding_window=None, max_seq_len=10)), None)
    for ids, start in (([1, 2], 0), ([1, 2], 2), ([], 0)):
        with refused(GenerationError, field="start"):
            inputs.scoring(ids, start, RequestOptions())
    for pairs in ([([1], [67])], [([1], [2]), ([1], [67])]):
        with refused(GenerationError, field="ids"):
            score(inputs, pairs)
    with refused(GenerationError, field="start"):
        score(inputs, [([1], [2]), ([1], [])])
    with refused(PromptTooLongError, field="ids"):
        score(inputs, [([1] * 6, [2] * 6)])
    assert len(score(inputs, [([1] * 6, [2] * 5)])[0]) == 5
