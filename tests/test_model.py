"""The model's parts against the papers' formulas, and its behaviour as a PyTorch module."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from refusals import refused
from tiny import TINY, close, tiny_args, tiny_model, tokens_of, truth
from torch import Tensor

from mistral_7b.cache import GrowingCache, Stateless
from mistral_7b.errors import ConfigError
from mistral_7b.model import Mistral7B, ModelArgs, RMSNorm, rope_phases, rotate

W = 8

# --- ModelArgs ---


def test_trap_08_constants_of_the_releases() -> None:
    body = {
        "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
        "norm_eps": 1e-5, "max_seq_len": 32768, "tie_embeddings": False, "rope_scaling": None,
    }  # fmt: skip
    v0_1 = body | {"vocab_size": 32000, "rope_theta": 10_000.0, "sliding_window": 4096}
    v0_2 = body | {"vocab_size": 32000, "rope_theta": 1_000_000.0, "sliding_window": None}
    v0_3 = body | {"vocab_size": 32768, "rope_theta": 1_000_000.0, "sliding_window": None}
    assert vars(ModelArgs()) == vars(ModelArgs.v0_1()) == v0_1
    assert vars(ModelArgs.v0_2()) == v0_2
    assert vars(ModelArgs.v0_3()) == v0_3


WHOLE = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
BAD = (
    [(name, value) for name in WHOLE for value in (0, -1, 1.5, "8", None, True)]
    + [("sliding_window", value) for value in (0, -4096, 4.5, "4096", True)]
    + [("norm_eps", value) for value in (0.0, -1.0, math.nan, math.inf, "1", True, None)]
    + [("rope_theta", value) for value in (0.0, -1.0, math.nan, math.inf, "1", True, None)]
    + [("tie_embeddings", value) for value in (0, 1, None, "no")]
    + [("rope_scaling", value) for value in (0, "linear", {"type": "linear", "factor": 2.0})]
)  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_bad_field_is_refused_by_name(field: str, value: object) -> None:
    with refused(ConfigError, field=field):
        tiny_args(**{field: value})


def test_fields_that_contradict_each_other_are_refused() -> None:
    with refused(ConfigError, field="n_heads"):
        tiny_args(n_kv_heads=4)
    with refused(ConfigError, field="head_dim"):
        tiny_args(head_dim=9)
    with pytest.raises(TypeError):
        ModelArgs(window=4096)  # type: ignore[call-arg]


def test_arguments_are_frozen() -> None:
    with pytest.raises(AttributeError):
        TINY.dim = 8  # type: ignore[misc]


# --- the parts ---


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, by its bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def test_trap_12_rms_norm_in_bfloat16_to_the_bit() -> None:
    """Normalise in float32, cast down, multiply: and the other order would have been seen."""
    rng = np.random.default_rng(0)
    x = to_bfloat16(rng.standard_normal((64, 40)).astype(np.float32) * 3)
    weight = to_bfloat16(1 + 0.3 * rng.standard_normal(40).astype(np.float32))
    norm = RMSNorm(40, 1e-5, dtype=torch.bfloat16)
    norm.weight.data = torch.from_numpy(weight).bfloat16()
    got = norm(torch.from_numpy(x).bfloat16()).float().detach().numpy()
    normed = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    assert np.array_equal(got, to_bfloat16(to_bfloat16(normed.astype(np.float32)) * weight))
    assert not np.array_equal(got, to_bfloat16((normed * weight).astype(np.float32)))


def test_trap_12_eps_is_that_of_mistral() -> None:
    assert ModelArgs().norm_eps == 1e-5
    x = torch.full((1, 40), 1e-3, dtype=torch.float64)  # a mean square of 1e-6: eps matters
    model = Mistral7B(tiny_args(), dtype=torch.float64)
    norms = [model.norm, *(n for layer in model.layers for n in (layer.attention_norm, layer.ffn_norm))]
    for norm in norms:
        close(norm(x), x / math.sqrt(1e-6 + 1e-5))


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trap_11_phases_at_the_last_position_are_exact(dtype: torch.dtype, theta: float) -> None:
    """Taken where the layers get them, in a model that was cast: nothing of them may be cast along."""
    args = tiny_args(rope_theta=theta, head_dim=128, n_layers=1)
    model = tiny_model(args, torch.float32).to(dtype)
    seen: list[tuple[Tensor, Tensor]] = []
    model.layers[0].attention.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    cache = GrowingCache(1, W)
    cache.length = 32767  # as if so many tokens had gone by
    model(tokens_of((1, 1)), cache)
    cos, sin = (t.flatten() for t in seen[0])
    assert cos.dtype == sin.dtype == torch.float32
    for i in range(64):
        angle = 32767 * theta ** (-2 * i / 128)
        assert abs(cos[i].item() - math.cos(angle)) < 1e-6
        assert abs(sin[i].item() - math.sin(angle)) < 1e-6


def test_rotation_turns_neighbouring_pairs_and_keeps_relative_angles() -> None:
    q, k = torch.randn(2, 5, 6, 10, dtype=torch.float64)
    turned = rotate(q, rope_phases(torch.arange(5), TINY, torch.float64))
    for p in range(5):
        for i in range(5):
            angle = p * 1e4 ** (-2 * i / 10)
            pair = torch.complex(q[p, :, 2 * i], q[p, :, 2 * i + 1]) * complex(math.cos(angle), math.sin(angle))
            close(turned[p, :, 2 * i], pair.real)
            close(turned[p, :, 2 * i + 1], pair.imag)
    near = [rope_phases(torch.full((5,), p), TINY, torch.float64) for p in (3, 1)]
    far = [rope_phases(torch.full((5,), p), TINY, torch.float64) for p in (30003, 30001)]
    close((rotate(q, near[0]) * rotate(k, near[1])).sum(-1), (rotate(q, far[0]) * rotate(k, far[1])).sum(-1))


def test_weights_have_mistrals_names_and_shapes() -> None:
    D, H, G, K, F, V = 40, 6, 3, 10, 56, 67
    layer = {
        "attention.wq": (H * K, D), "attention.wk": (G * K, D), "attention.wv": (G * K, D),
        "attention.wo": (D, H * K), "feed_forward.w1": (F, D), "feed_forward.w2": (D, F),
        "feed_forward.w3": (F, D), "attention_norm": (D,), "ffn_norm": (D,),
    }  # fmt: skip
    wanted = {f"layers.{n}.{name}.weight": shape for n in range(2) for name, shape in layer.items()}
    wanted |= {"tok_embeddings.weight": (V, D), "norm.weight": (D,), "output.weight": (V, D)}
    got = {name: tuple(p.shape) for name, p in Mistral7B(TINY).state_dict().items()}
    assert got == wanted


# --- the model as a module ---


def test_usage_of_the_design_page() -> None:
    from mistral_7b import Mistral7B, ModelArgs

    args = ModelArgs(dim=40, n_layers=2, head_dim=10, hidden_dim=56, n_heads=6, n_kv_heads=3,
                     norm_eps=1e-5, vocab_size=67)  # fmt: skip
    model = Mistral7B(args)
    tokens = torch.randint(0, args.vocab_size, (1, 10))
    logits, cache = model(tokens)
    assert logits.shape == (1, 10, 67)
    assert logits.dtype == torch.float32
    logits, cache = model(tokens[:, -1:], cache)
    assert logits.shape == (1, 1, 67)
    assert isinstance(cache, GrowingCache)
    assert cache.length == 11
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_are_float32_at_least(dtype: torch.dtype) -> None:
    logits, _ = tiny_model(dtype=dtype)(tokens_of((1, 3)))
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_is_the_model_to_that_types_precision(dtype: torch.dtype) -> None:
    model, tokens = tiny_model(), tokens_of((1, 2 * W + 3))
    wanted, _ = model(tokens)
    cast = copy.deepcopy(model).half() if dtype == torch.float16 else copy.deepcopy(model).to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    got, cache = cast(tokens[:, :-1])
    last, _ = cast(tokens[:, -1:], cache)
    error = (torch.cat([got, last], dim=1) - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < 8 * torch.finfo(dtype).eps
    back, _ = cast.float()(tokens)
    assert back.dtype == torch.float32


def test_hidden_and_logits_are_the_two_halves_of_forward() -> None:
    model, tokens = tiny_model(dtype=torch.float64), tokens_of((2, 2 * W + 3))
    hidden = model.hidden(tokens, Stateless(W))
    assert hidden.shape == (2, 2 * W + 3, TINY.dim)
    close(model.logits(hidden[:, -1]), model(tokens)[0][:, -1])  # only the rows that are wanted


def test_meta_allocates_nothing_even_at_full_size() -> None:
    for model in (Mistral7B(device="meta"), _under_meta()):
        assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert sum(p.numel() for p in model.parameters()) == 7_241_732_096
    assert torch.get_default_device().type == "cpu"


def _under_meta() -> Mistral7B:
    with torch.device("meta"):
        return Mistral7B()


def test_a_model_on_meta_says_what_shapes_it_would_give() -> None:
    model = Mistral7B(ModelArgs(), device="meta")
    logits, cache = model(torch.zeros(1, 10, dtype=torch.long, device="meta"))
    assert logits.is_meta
    assert logits.shape == (1, 10, 32000)
    assert logits.dtype == torch.float32
    assert cache.layers[31].k.shape == (1, 10, 8, 128)


def test_a_model_from_meta_is_filled_by_its_weights() -> None:
    source, tokens = tiny_model(), tokens_of((1, 5))
    for built in (Mistral7B(TINY, dtype=torch.float32, device="meta"), _tiny_from_meta_context()):
        built.load_state_dict(source.state_dict(), assign=True)
        assert torch.equal(built(tokens)[0], source(tokens)[0])


def _tiny_from_meta_context() -> Mistral7B:
    with torch.device("meta"):
        return Mistral7B(TINY, dtype=torch.float32)


def test_an_explicit_device_beats_the_ambient_one() -> None:
    with torch.device("meta"):
        model = Mistral7B(TINY, device="cpu")
    assert not any(p.is_meta for p in model.parameters())


def test_fresh_weights() -> None:
    args = tiny_args(dim=320, hidden_dim=448, n_layers=3)
    torch.manual_seed(5)
    model = Mistral7B(args, dtype=torch.float32)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p))
        else:
            wanted = 0.02 / math.sqrt(6) if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert p.std().item() == pytest.approx(wanted, rel=0.05)
            assert abs(p.mean().item()) < wanted / 10
    torch.manual_seed(5)
    again = Mistral7B(args, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_built_and_run_in_any_mode(mode: type[torch.no_grad]) -> None:
    with mode():
        model, tokens = Mistral7B(TINY), tokens_of((1, 2 * W + 3))
        logits, cache = model(tokens)
        assert torch.equal(model(tokens[:, -1:], cache)[0], model(tokens[:, -1:], cache)[0])
        model(tokens, model.rolling_cache())
    assert torch.isfinite(logits).all()
    assert not logits.requires_grad


def test_tied_embeddings_are_one_tensor_wherever_they_go() -> None:
    args = tiny_args(tie_embeddings=True)
    model = tiny_model(args, torch.float64)
    tokens = tokens_of((1, 5))
    assert len(list(model.parameters())) == len(list(Mistral7B(TINY).parameters())) - 1
    close(model(tokens)[0], model.hidden(tokens, Stateless(W)) @ model.tok_embeddings.weight.T)
    close(model(tokens)[0], truth(model, tokens))
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).half(), Mistral7B(args, device="meta")):
        assert moved.output.weight is moved.tok_embeddings.weight
    untied = Mistral7B(TINY)
    assert untied.output.weight is not untied.tok_embeddings.weight


# --- gradients ---


def test_gradients_are_those_of_finite_differences() -> None:
    args = ModelArgs(dim=4, n_layers=1, head_dim=2, hidden_dim=3, n_heads=2, n_kv_heads=1, vocab_size=5,
                     sliding_window=2)  # fmt: skip
    model = tiny_model(args, torch.float64)
    names = [name for name, _ in model.named_parameters()]
    weights = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
    tokens, ids = torch.tensor([1, 4, 0, 2, 2, 3]), torch.tensor([7, 7, 7, 7, 3, 3])

    def run(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, named, (tokens, Stateless(2), ids))[0]

    assert torch.autograd.gradcheck(run, weights)


@pytest.mark.parametrize("chunks", [(19,), (1,) * 19, (5, 9, 1, 4), (17, 2)])
@pytest.mark.parametrize("window", [None, W])
def test_gradients_through_a_growing_cache_are_those_without(chunks: tuple[int, ...], window: int | None) -> None:
    tokens = tokens_of((2, 2 * W + 3))
    weight_of_each = torch.randn(2, 2 * W + 3, TINY.vocab_size, dtype=torch.float64)

    def gradients(cached: bool) -> list[Tensor]:
        model = tiny_model(tiny_args(sliding_window=window), torch.float64).requires_grad_(True)
        out, cache = [], None
        for part in tokens.split(chunks, dim=1) if cached else (tokens,):
            logits, cache = model(part, cache if cached else Stateless(window))
            out.append(logits)
        (torch.cat(out, dim=1) * weight_of_each).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    cached, plain = gradients(True), gradients(False)
    assert len(cached) == len(plain) == 21
    for a, b in zip(cached, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-10)  # gradients here reach some hundreds


# --- packing ---


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["packed", "rectangle", "growing", "interleaved"])
def test_trap_20_editing_one_document_leaves_the_others_bit_equal(
    how: str, dtype: torch.dtype, window: int | None
) -> None:
    model = tiny_model(tiny_args(sliding_window=window), dtype)
    ids = torch.arange(38) % 2 if how == "interleaved" else torch.arange(38) // 19
    one = tokens_of((38,))
    two = torch.where(ids == 0, (one + 1) % TINY.vocab_size, one)

    def logits(tokens: Tensor) -> Tensor:
        if how == "rectangle":
            return model(tokens[None], Stateless(window), ids[None])[0][0]
        return model(tokens, Stateless(window) if how == "packed" else None, ids)[0]

    before, after = logits(one), logits(two)
    assert torch.equal(before[ids == 1], after[ids == 1])
    assert not torch.equal(before[ids == 0], after[ids == 0])


def test_trap_20_no_gradient_crosses_from_one_document_to_another() -> None:
    model = tiny_model(dtype=torch.float64).requires_grad_(True)
    ids = torch.arange(38) // 19
    tokens = torch.arange(38)  # each its own row of the embedding
    model(tokens, Stateless(W), ids)[0][ids == 1].sum().backward()
    reached = model.tok_embeddings.weight.grad[:38].abs().amax(-1) > 0  # type: ignore[index]
    assert reached.tolist() == (ids == 1).tolist()


# --- torch.compile ---


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", ["stateless", "default", "packed"])
def test_no_graph_break(kind: str) -> None:
    model, ids = tiny_model(), torch.arange(19) // 10
    given = {
        "stateless": (tokens_of((1, 19)), Stateless(W)),
        "default": (tokens_of((1, 19)),),
        "packed": (tokens_of((19,)), Stateless(W), ids),
    }[kind]
    found = torch._dynamo.explain(model)(*given)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_is_eager() -> None:
    """Through every cache, the whole call as one graph; the backend keeps PyTorch's own kernels."""
    model, tokens = tiny_model(), tokens_of((1, 2 * W + 3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = truth(model, tokens)
    close(compiled(tokens, Stateless(W))[0], wanted)
    first, cache = compiled(tokens[:, : W + 3])
    second, _ = compiled(tokens[:, W + 3 :], cache)
    close(torch.cat([first, second], dim=1), wanted)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_static_ring_decodes_compiled_without_compiling_again() -> None:
    model, tokens = tiny_model(), tokens_of((1, 5 * W))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ring = model.rolling_cache(static=True)
    got = [model(tokens[:, :3], ring)[0], compiled(tokens[:, 3:4], ring)[0]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += [compiled(tokens[:, i : i + 1], ring)[0] for i in range(4, 5 * W)]
    close(torch.cat(got, dim=1), truth(model, tokens))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_by_inductor_is_eager() -> None:
    model, tokens = tiny_model(tiny_args(n_layers=1)), tokens_of((1, 2 * W + 3))
    close(torch.compile(model, fullgraph=True)(tokens, Stateless(W))[0], truth(model, tokens))
