"""Recording, patching and steering: exact, confined to the `with` block and to its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from reference import linear, rms_norm
from refusals import refused
from test_transformers_parity import same_in_transformers
from tiny import TINY, close, tiny_model, tokens_of, truth
from torch import Tensor

from mistral_7b.cache import Cache, GrowingCache, Stateless
from mistral_7b.errors import InterpretError
from mistral_7b.model import Mistral7B

WINDOW = 8
CACHES: dict[str, Callable[[Mistral7B], Cache]] = {
    "stateless": lambda m: Stateless(WINDOW),
    "growing": lambda m: GrowingCache(2, WINDOW),
    "rolling": lambda m: m.rolling_cache(batch=2),
}


@pytest.fixture(scope="module")
def model() -> Mistral7B:
    return tiny_model(TINY, torch.float64)


def same(model: Mistral7B, wanted: Tensor, tokens: Tensor) -> None:
    """The model is as it was: its results, and its attributes."""
    assert not {"hidden", "logits"} & set(vars(model))
    assert torch.equal(model(tokens)[0], wanted)


@pytest.mark.parametrize("name", CACHES)
def test_everything_recorded_leads_to_the_logits_of_the_reference(model: Mistral7B, name: str) -> None:
    """Each point is computed again from the ones before it, and the last is the reference's."""
    tokens = tokens_of((2, 21))
    with model.record() as tape:
        logits, _ = model(tokens, CACHES[name](model))
    close(tape["logits"], truth(model, tokens))
    assert torch.equal(tape["logits"], logits)
    w, eps = model.state_dict(), TINY.norm_eps
    assert torch.equal(tape["embedding"], w["tok_embeddings.weight"][tokens])
    for n in range(TINY.n_layers):

        def at(point: str, n: int = n) -> Tensor:
            return tape[point, n][1, :, 20] if point == "attention" else tape[point, n][1, 20]  # of one token

        def of(module: str, x: Tensor, n: int = n) -> Tensor:
            weight = w[f"layers.{n}.{module}.weight"].numpy()
            found = rms_norm(x.numpy(), weight, eps) if weight.ndim == 1 else linear(weight, x.numpy())
            return torch.from_numpy(found)

        before = tape["residual", n - 1] if n else tape["embedding"]
        assert torch.equal(tape["residual_before", n], before)
        close(at("attention_norm"), of("attention_norm", at("residual_before")))
        for point, module in (("q", "attention.wq"), ("k", "attention.wk"), ("v", "attention.wv")):
            close(at(point).flatten(), of(module, at("attention_norm")))
        assert (at("attention") > 0).sum(-1).tolist() == [WINDOW] * 6
        values = tape["v", n][1].repeat_interleave(2, dim=1)  # (T, H, K)
        close(at("z"), torch.einsum("hs,shk->hk", tape["attention", n][1, :, 20], values))
        close(at("attn_out"), of("attention.wo", at("z").flatten()))
        close(at("residual_mid"), at("residual_before") + at("attn_out"))
        close(at("ffn_norm"), of("ffn_norm", at("residual_mid")))
        gate, up = (of(f"feed_forward.{name}", at("ffn_norm")) for name in ("w1", "w3"))
        close(at("ffn"), torch.nn.functional.silu(gate) * up)
        close(at("ffn_out"), of("feed_forward.w2", at("ffn")))
        close(at("residual"), at("residual_mid") + at("ffn_out"))
    same(model, model(tokens)[0], tokens)


def test_weights_and_states_are_those_of_transformers() -> None:
    """On a prompt of more than two windows; its softmax is in float32."""
    model, tokens = tiny_model(TINY, torch.float32), tokens_of((2, 21))
    other = same_in_transformers(model)(tokens, output_attentions=True, output_hidden_states=True)
    with model.record("attention", "residual_before", "norm") as tape:
        model(tokens)
    for n, weights in enumerate(other.attentions):
        close(tape["attention", n], weights)
        close(tape["residual_before", n], other.hidden_states[n])
    close(tape["norm"], other.hidden_states[-1])


@pytest.mark.parametrize("name", CACHES)
def test_a_tape_of_several_calls_is_that_of_one(model: Mistral7B, name: str) -> None:
    tokens, cache = tokens_of((2, 21)), CACHES[name](model)
    with model.record() as whole:
        model(tokens)
    with model.record() as tape:
        for part in (tokens,) if name == "stateless" else (tokens[:, :11], *tokens[:, 11:].split(1, dim=1)):
            _, cache = model(part, cache)
    assert list(tape) == list(whole)
    for place in whole:
        close(tape[place], whole[place])


def test_only_what_follows_a_prefix_is_recorded(model: Mistral7B) -> None:
    """The columns of its weights are positions, from the first on."""
    tokens = tokens_of((2, 21))
    with model.record("attention") as whole:
        model(tokens)
    for name in ("growing", "rolling"):
        cache = model(tokens[:, :13], CACHES[name](model))[1]
        with model.record("attention") as tape:
            model(tokens[:, 13:], cache)
        close(tape["attention", 1], whole["attention", 1][:, :, 13:])


def test_packed_sequences_are_recorded_each_with_its_own_positions(model: Mistral7B) -> None:
    lengths = (12, 1, 10)
    tokens, ids = tokens_of((23,)), torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    for cache in (Stateless(WINDOW), GrowingCache(2, WINDOW)):
        with model.record("attention", "residual", layers=[1]) as packed:
            model(tokens, cache, ids)
        parts = (packed["attention", 1].split(lengths, 1), packed["residual", 1].split(lengths))
        for own, weights, states in zip(tokens.split(lengths), *parts, strict=True):
            with model.record("attention", "residual", layers=[1]) as tape:
                model(own)
            close(weights[..., : len(own)], tape["attention", 1])
            assert not weights[..., len(own) :].any()
            close(states, tape["residual", 1])


def test_rows_of_different_lengths_and_int8_keys(model: Mistral7B) -> None:
    tokens, ring = tokens_of((2, 21)), model.rolling_cache(batch=2)
    model(tokens[:1, :12], ring.rows(0, 1))
    model(tokens[1:, :5], ring.rows(1, 2))
    with model.record("attention") as tape, model.record("attention") as alone:
        model(tokens[:, 12:13], ring)
    assert tape["attention", 0].shape == (2, 6, 1, 13)
    assert (tape["attention", 0][:, 0, 0] > 0).sum(-1).tolist() == [8, 6]
    assert torch.equal(alone["attention", 0], tape["attention", 0])
    coarse = model.rolling_cache(batch=2, kv_dtype=torch.int8)
    with model.record("attention", "z", "v") as tape:
        model(tokens[:, :12], coarse)
    values = tape["v", 0].repeat_interleave(2, dim=2)
    torch.testing.assert_close(
        torch.einsum("bhts,bshk->bthk", tape["attention", 0], values), tape["z", 0], rtol=0, atol=0.05
    )


def test_in_bfloat16_the_model_is_the_same_while_recorded() -> None:
    model, tokens = tiny_model(TINY, torch.bfloat16), tokens_of((2, 21))
    wanted, exact = model(tokens)[0], tiny_model(TINY, torch.float64)
    with model.record("attention", "residual") as tape, exact.record("attention") as truly:
        got = model(tokens)[0]
        exact(tokens)
    assert torch.equal(got, wanted)
    assert tape["residual", 0].dtype == torch.bfloat16
    assert tape["attention", 0].dtype == torch.float32
    torch.testing.assert_close(tape["attention", 0].double(), truly["attention", 0], rtol=0, atol=0.1)


# ---------------------------------------------------------------------- patching and steering


def test_patching_with_the_same_values_changes_nothing(model: Mistral7B) -> None:
    tokens = tokens_of((2, 21))
    with model.record() as tape:
        wanted = model(tokens)[0]
    for point, layer in tape:
        value = tape[point, layer]
        value = value.transpose(-3, -2) if point == "attention" else value
        for positions in (None, slice(3, 17)):
            part = value if positions is None else value[:, positions]
            with model.patch({(point, layer): part}, positions=positions):
                close(model(tokens)[0], wanted)
    same(model, wanted, tokens)


def test_a_patch_carries_over_what_another_prompt_computed(model: Mistral7B) -> None:
    """All positions of a layer's residual stream decide the logits; those of one position only later ones."""
    clean, other = tokens_of((1, 21), seed=1), tokens_of((1, 21), seed=2)
    wanted = model(clean)[0]
    with model.record("residual", "z") as tape:
        model(clean)
    with model.patch({("residual", 0): tape["residual", 0]}):
        close(model(other)[0], wanted)
    before = model(other)[0]
    with (
        model.patch({("residual", 0): tape["residual", 0][:, 9:11]}, positions=[9, 10]),
        model.record("residual") as got,
    ):
        after = model(other)[0]
    assert torch.equal(after[:, :9], before[:, :9])
    assert (after[:, 9] - before[:, 9]).abs().max() > 1e-3
    assert torch.equal(got["residual", 0][:, 9:11], tape["residual", 0][:, 9:11])


@pytest.mark.parametrize("name", ["growing", "rolling"])
def test_positions_are_absolute_with_every_cache(model: Mistral7B, name: str) -> None:
    tokens, value = tokens_of((2, 21)), torch.randn(2, 3, 40, dtype=torch.float64)
    with model.patch({("residual", 0): value}, positions=[4, 12, 15]):
        wanted, cache, got = model(tokens, Stateless(WINDOW))[0], CACHES[name](model), []
        for part in (tokens[:, :10], *tokens[:, 10:].split(1, dim=1)):
            logits, cache = model(part, cache)
            got.append(logits)
    close(torch.cat(got, 1), wanted)


def test_heads_are_patched_alone_and_by_functions(model: Mistral7B) -> None:
    tokens = tokens_of((2, 21))
    with model.record("z") as plain:
        model(tokens)
    for positions in (None, [20]):
        with model.patch({("z", 1): 0.0}, heads=[2, 5], positions=positions), model.record("z") as tape:
            model(tokens)
        with (
            model.patch({("z", 1): lambda z: z * 0}, heads=[2, 5], positions=positions),
            model.record("z") as same_,
        ):
            model(tokens)
        assert torch.equal(tape["z", 1], same_["z", 1])
        rows = slice(None) if positions is None else slice(20, 21)
        assert not tape["z", 1][:, rows, [2, 5]].any()
        assert torch.equal(tape["z", 1][:, rows, [0, 1, 3, 4]], plain["z", 1][:, rows, [0, 1, 3, 4]])
        if positions:
            assert torch.equal(tape["z", 1][:, :20], plain["z", 1][:, :20])


@pytest.mark.parametrize("name", CACHES)
def test_patched_weights_are_those_that_values_are_summed_with(model: Mistral7B, name: str) -> None:
    """All weight on the query's own key: each head then gives its own value."""
    tokens, own = tokens_of((2, 12)), torch.eye(12, dtype=torch.float64)[:, None]  # (T, 1, S)
    with model.patch({("attention", 0): own}), model.record("z", "v") as tape:
        model(tokens, CACHES[name](model))
    close(tape["z", 0], tape["v", 0].repeat_interleave(2, dim=2))


def test_steering_adds_the_vector_where_it_is_told(model: Mistral7B) -> None:
    tokens, vector = tokens_of((2, 21)), torch.randn(40, dtype=torch.float64)
    with model.record("residual", layers=[0]) as plain:
        model(tokens)
    for positions, rows in (
        (None, slice(None)),
        (slice(5, 9), slice(5, 9)),
        (7, [7]),
        (slice(5, None), slice(5, None)),
    ):
        with model.record("residual", layers=[0]) as tape, model.steer(0, vector, scale=-2, positions=positions):
            model(tokens)
        wanted = plain["residual", 0].clone()
        wanted[:, rows] -= 2 * vector
        close(tape["residual", 0], wanted)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 7e4), (torch.bfloat16, 1e25), (torch.float32, 1e25)])
def test_a_steering_vector_that_overflows_is_named(dtype: torch.dtype, value: float) -> None:
    small = tiny_model(TINY, dtype)
    with refused(InterpretError, field="vector"), small.steer(0, torch.full((40,), value)):
        small(tokens_of((1, 9)))


def test_an_overflow_after_a_later_layer_is_the_steering_vectors_too() -> None:
    small = tiny_model(TINY, torch.float16)
    with (
        refused(InterpretError, field="vector"),
        small.patch({("ffn_out", 1): 6e4}),
        small.steer(0, torch.full((40,), 3e4)),
    ):
        small(tokens_of((1, 9)))


def test_gradients_reach_what_is_recorded(model: Mistral7B) -> None:
    tokens, start = tokens_of((1, 12)), torch.zeros(40, dtype=torch.float64, requires_grad=True)
    with model.steer(0, start), model.record("residual", "attention") as tape:
        logits, _ = model(tokens, Stateless(WINDOW))
    wanted, weights = torch.autograd.grad(logits[0, -1, 3], (start, tape["residual", 0]))
    close(wanted, weights.sum((0, 1)))
    assert weights.abs().max() > 0


# ---------------------------------------------------------------------- the model afterwards


def test_contexts_nest_and_leave_nothing_even_after_errors(model: Mistral7B) -> None:
    tokens, vector = tokens_of((2, 21)), torch.ones(40, dtype=torch.float64)
    wanted = model(tokens)[0]
    with model.record("logits") as outer, model.steer(0, vector):
        steered = model(tokens)[0]
        with model.steer(1, vector), model.record("residual") as inner:
            twice = model(tokens)[0]
        assert torch.equal(model(tokens)[0], steered)
        with pytest.raises(ZeroDivisionError), model.steer(1, vector):
            1 / 0  # noqa: B018
        assert torch.equal(model(tokens)[0], steered)
    assert len(outer.kept["logits", None]) == 4
    assert len(inner.kept["residual", 0]) == 1
    assert not torch.equal(steered, wanted)
    assert not torch.equal(twice, steered)
    same(model, wanted, tokens)


def test_other_threads_and_other_models_are_not_concerned(model: Mistral7B) -> None:
    tokens, found = tokens_of((2, 21)), []
    wanted, other = model(tokens)[0], tiny_model(TINY, torch.float64, seed=3)
    ready, go = threading.Event(), threading.Event()

    def steered() -> None:
        with model.steer(0, torch.ones(40, dtype=torch.float64)), model.record("residual") as tape:
            ready.set()
            go.wait(20)
            found.append((model(tokens)[0], len(tape.kept["residual", 0])))

    thread = threading.Thread(target=steered)
    thread.start()
    assert ready.wait(20)
    with model.record("residual") as mine:
        assert torch.equal(model(tokens)[0], wanted)
        other(tokens)
        go.set()
        thread.join(20)
        assert torch.equal(model(tokens)[0], wanted)
    assert not torch.equal(found[0][0], wanted)
    assert (len(mine.kept["residual", 0]), found[0][1]) == (2, 1)
    same(model, wanted, tokens)


def test_what_cannot_be_is_refused_with_its_field(model: Mistral7B) -> None:
    tokens, vector = tokens_of((2, 5)), torch.ones(40)
    for field, context in {
        "name": lambda: model.record("residul"),
        "layer": lambda: model.record("residual", layers=[2]),
        "positions": lambda: model.patch({("z", 0): 0.0}, positions=-1),
        "heads": lambda: model.patch({("k", 0): 0.0}, heads=3),
        "vector": lambda: model.steer(0, torch.ones(39)),
    }.items():
        with refused(InterpretError, field=field), context():
            pass
    with refused(InterpretError, field="heads"), model.patch({("residual", 0): 0.0}, heads=0):
        pass
    with refused(InterpretError, field="vector"), model.steer(0, vector * float("nan")):
        pass
    with refused(InterpretError, field="positions"), model.patch({("z", 0): 0.0}, positions=slice(3, None)):
        pass
    with refused(InterpretError, field="values"), model.patch({("residual", 0): torch.ones(3)}):
        model(tokens)
    with refused(InterpretError, field="values"), model.patch({("residual", 0): lambda x: x[:1]}, positions=2):
        model(tokens)
    with model.record("residual", layers=[1]) as tape:
        model(tokens)
        model(tokens[:1])
    for key in ("residual", ("residual", 0), "z", ("z", 1), ("logits", 0)):
        with refused(InterpretError):
            tape[key]
    assert ("residual", 1) in tape
    assert ("residual", 0) not in tape
    same(model, model(tokens)[0], tokens)
