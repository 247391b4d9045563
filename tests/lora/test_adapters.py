"""Adapters side by side: a row's result is its own, whatever other rows have, and the model's if it has none."""

from __future__ import annotations

import functools

import pytest
import torch
from refusals import refused
from tiny import TINY, close, tiny_args, tiny_model, tokens_of
from torch import Tensor, nn

from mistral_7b.cache import Stateless
from mistral_7b.checkpoint.names import expected
from mistral_7b.errors import AdapterError, CheckpointError
from mistral_7b.kernels.cpu.compiler import library
from mistral_7b.lora.adapters import Adapters, Run
from mistral_7b.lora.files import Adapter, Factors
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.quantization.fused import FusedBlock, FusedLayers

compiled = pytest.mark.skipif(library() is None, reason="without the kernels rows depend on their neighbours")
SCHEMES = {
    "int8": Scheme("int8"),
    "int4": Scheme("int4"),
    "bf16": Scheme("bf16", deterministic=True),
}
RANKS = {"narrow": 1, "wide": 16, "odd": 5}
WINDOW, LENGTH = 8, 21
ARGS = tiny_args(dim=128, head_dim=32, hidden_dim=256, max_seq_len=512)


def adapter_of(args, rank: int, seed: int, targets=lambda name: True) -> Adapter:  # type: ignore[no-untyped-def]
    draw = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in expected(args):
        linear = name.removesuffix(".weight")
        if len(shape) == 2 and linear.startswith(("layers", "output")) and targets(linear):
            a = torch.randn(rank, shape[1], generator=draw) / shape[1] ** 0.5
            out[linear] = Factors(a, torch.randn(shape[0], rank, generator=draw) / rank**0.5, 0.5)
    return Adapter(out)


def loaded(model: Mistral7B) -> Adapters:
    """The three of RANKS; one of them in some layers and Linears only, and in the output."""
    adapters = Adapters(model)
    for seed, (name, rank) in enumerate(RANKS.items()):
        some = {"odd": lambda n: "wo" in n or "1.feed" in n or n == "output"}.get(name, lambda n: n != "output")
        adapters.load(name, adapter_of(model.args, rank, seed, some))
    return adapters


@functools.cache
def quantized(scheme: str) -> tuple[Mistral7B, Adapters]:
    model = quantize(tiny_model(ARGS, torch.bfloat16), SCHEMES[scheme])
    return model, loaded(model)


def logits(adapters: Adapters, names: list[str | None], tokens: Tensor, chunk: int, ring: bool = True) -> Tensor:
    """Rows of tokens (B, T), each with its adapter, in chunks."""
    cache = adapters.model.rolling_cache(len(names)) if ring else None
    out = []
    for part in tokens.split(chunk, dim=1):
        with adapters.over([(name, part.shape[1]) for name in names]) as model:
            got, cache = model(part, cache)
        out.append(got)
    return torch.cat(out, dim=1)


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_has_the_same_bits_in_any_mixture_and_any_chunks(scheme: str) -> None:
    model, adapters = quantized(scheme)
    names = ["wide", None, "odd", "wide", "narrow", None, *["narrow"] * 14]
    tokens = tokens_of((len(names), LENGTH), ARGS)
    together = logits(adapters, names, tokens, 1)
    for size in (7, LENGTH):
        assert torch.equal(logits(adapters, names, tokens, size), together), size
    assert torch.equal(logits(adapters, names, tokens, LENGTH, ring=False), together)
    for row, name in list(enumerate(names))[:8]:
        own = tokens[row : row + 1]
        assert torch.equal(logits(adapters, [name], own, 4)[0], together[row]), name
        plain = model(own)[0][0]
        assert torch.equal(plain, together[row]) == (name is None)


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_blocks_stay_in_one_call_and_in_parts_have_the_same_bits(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapters = quantized(scheme)
    names, tokens = ["wide", None, "odd"], tokens_of((3, LENGTH), ARGS)
    with adapters.over([("wide", 1)]) as adapted:
        assert isinstance(adapted.layers, FusedLayers)
        x = torch.empty(1, ARGS.dim, dtype=torch.bfloat16)
        assert adapted.layers.described(x, adapted.rolling_cache()) is not None
    together = logits(adapters, names, tokens, 5)
    with monkeypatch.context() as patch:
        patch.setattr(FusedBlock, "described", lambda self, dtype: None)
        assert torch.equal(logits(adapters, names, tokens, 5), together)


@compiled
@torch.inference_mode()
def test_weights_that_change_under_an_adapter_are_noticed() -> None:
    """A block is described to the kernels once, by the addresses of its tensors."""
    model = quantize(tiny_model(ARGS, torch.bfloat16), "int4")
    adapters, tokens = loaded(model), tokens_of((1, LENGTH), ARGS)
    before = logits(adapters, ["wide"], tokens, 5)
    linear = model.layers[0].attention.wq
    kept, linear.d = linear.d, linear.d * 2
    assert not torch.equal(logits(adapters, ["wide"], tokens, 5), before)
    linear.d = kept
    assert torch.equal(logits(adapters, ["wide"], tokens, 5), before)


def merged(model: Mistral7B, adapter: Adapter) -> Mistral7B:
    out = tiny_model(model.args, model.norm.weight.dtype)
    for name, (a, b, scale) in adapter.targets.items():
        linear = out.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight += (scale * (b.double() @ a.double())).to(linear.weight.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_sequence_is_that_of_its_merged_model(dtype: torch.dtype) -> None:
    """Packed in one row of tokens, some sequences longer than twice the window."""
    model = tiny_model(TINY, dtype)
    adapters, own = Adapters(model), {}
    for seed, name in enumerate(RANKS):
        own[name] = adapter_of(TINY, RANKS[name], seed)
        adapters.load(name, own[name])
    runs: list[Run] = [("wide", 19), (None, 3), ("odd", 1), ("wide", 5), (None, 18), ("narrow", 20)]
    tokens = tokens_of((sum(n for _, n in runs),))
    ids = torch.tensor([i for i, (_, n) in enumerate(runs) for _ in range(n)])
    with adapters.over(runs) as adapted:
        got = adapted(tokens, Stateless(WINDOW), ids)[0]
    wanted = [
        (model if name is None else merged(model, own[name]))(part[None])[0][0]
        for (name, _), part in zip(runs, tokens.split([n for _, n in runs]), strict=True)
    ]
    close(got, torch.cat(wanted))
    assert (got - model(tokens, Stateless(WINDOW), ids)[0]).abs().max() > 0.1


def test_the_model_itself_is_never_changed() -> None:
    model = tiny_model()
    before, modules = {name: t.clone() for name, t in model.state_dict().items()}, dict(model.named_modules())
    parameters = [id(t) for t in model.parameters()]
    adapters = loaded(model)
    with adapters.over([("wide", 20)]) as adapted:
        adapted(tokens_of((1, 20)))
    assert adapted is not model
    assert dict(model.named_modules()) == modules
    assert [id(t) for t in model.parameters()] == parameters
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {id(t) for t in adapted.parameters()} == set(parameters)  # no copy of the weights
    for runs in ([(None, 20)], [], [("wide", 0), (None, 20)]):
        with adapters.over(runs) as chosen:
            assert chosen is model


@compiled
@torch.inference_mode()
def test_adapters_come_and_go() -> None:
    model = quantize(tiny_model(ARGS, torch.bfloat16), "int4")
    adapters, tokens = loaded(model), tokens_of((2, LENGTH), ARGS)
    names: list[str | None] = ["narrow", "wide"]
    before = logits(adapters, names, tokens, 5)
    assert [adapters.loading(name) for name in (None, "narrow", "wide")] == [0, 1, 2]
    adapters.unload("odd")
    assert adapters.names == ("narrow", "wide")
    assert torch.equal(logits(adapters, names, tokens, 5), before)
    adapters.unload("narrow")
    with refused(AdapterError, field="adapter"):
        logits(adapters, names, tokens, 5)
    adapters.load("narrow", adapter_of(ARGS, 1, 0, lambda n: n != "output"))  # behind the other now
    assert [adapters.loading(name) for name in ("narrow", "wide")] == [4, 2]
    assert torch.equal(logits(adapters, names, tokens, 5), before)
    for name in ("narrow", "wide"):
        adapters.unload(name)
    with refused(AdapterError, field="adapter"):
        adapters.unload("wide")
    assert torch.equal(logits(adapters, [None, None], tokens, 5), model(tokens)[0])


def test_what_cannot_be_loaded_changes_nothing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model()
    adapters = Adapters(model, max_adapters=2, max_rank=16)
    adapters.load("one", adapter_of(TINY, 4, 0))
    tokens = tokens_of((1, 20))

    def now() -> Tensor:
        with adapters.over([("one", 20)]) as adapted:
            return adapted(tokens)[0]

    before = now()
    wrong = Factors(torch.zeros(4, 41), torch.zeros(60, 4), 1.0)
    good = adapter_of(TINY, 4, 1)
    for name, source, error, field in (
        ("one", good, AdapterError, "name"),
        ("", good, AdapterError, "name"),
        ("two", adapter_of(TINY, 17, 1), AdapterError, "max_rank"),
        ("two", Adapter({"layers.0.attention.wq": wrong}), AdapterError, "layers.0.attention.wq"),
        ("two", Adapter({"layers.2.attention.wq": wrong}), AdapterError, "layers.2.attention.wq"),
        ("two", Adapter({"tok_embeddings": wrong}), AdapterError, "tok_embeddings"),
        ("two", tmp_path, CheckpointError, None),
    ):
        with refused(error, field=field):
            adapters.load(name, source)  # type: ignore[arg-type]
        assert adapters.names == ("one",)
        assert torch.equal(now(), before)
    adapters.load("two", good)
    with refused(AdapterError, field="max_adapters"):
        adapters.load("three", good)


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_another_number_of_rows_is_an_error(scheme: str | None) -> None:
    model = tiny_model(ARGS, torch.bfloat16)
    adapters = loaded(model if scheme is None else quantize(model, scheme))
    tokens = tokens_of((1, 20), ARGS)
    with (
        pytest.raises(AdapterError),
        adapters.over([("wide", 3)]) as m,
    ):
        m.hidden(tokens, m.rolling_cache())
    with adapters.over([("wide", 20)]) as m:  # and the next call is none the worse for it
        hidden = m.hidden(tokens, m.rolling_cache())
        with pytest.raises(AdapterError), adapters.over([("odd", 1)]):
            pass
    with adapters.over([("odd", 1)]) as m:  # the rows of which logits are wanted are a call of their own
        assert not torch.equal(m.logits(hidden[0, -1:]), adapters.model.logits(hidden[0, -1:]))
