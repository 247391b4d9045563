"""Trainable adapters: their gradients, and that what is trained is what is served."""

from __future__ import annotations

import copy
import json
import pathlib

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft_models import theirs as peft_base
from refusals import refused
from test_adapters import adapter_of
from tiny import TINY, close, tiny_args, tiny_model, tokens_of
from torch import Tensor, nn

from mistral_7b.cache import Stateless
from mistral_7b.errors import AdapterError
from mistral_7b.lora.adapters import Adapters
from mistral_7b.lora.files import Adapter, Factors, read_adapter, save_adapter
from mistral_7b.lora.trainable import LINEARS, LoraArgs, TrainableLinear, adapt, trained_adapter
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize

ARGS = tiny_args(dim=64, hidden_dim=96)
TOKENS = tokens_of((2, 21))
SCHEMES = {None: torch.float32, "int8": torch.bfloat16, "int4": torch.bfloat16, "bf16": torch.bfloat16}


def opened(scheme: str | None) -> Mistral7B:
    model = tiny_model(ARGS, SCHEMES[scheme])
    return model if scheme is None else quantize(model, Scheme(scheme))


def logits_of(model: Mistral7B, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens, Stateless(ARGS.sliding_window))[0]


def loss_of(model: Mistral7B) -> Tensor:
    return F.cross_entropy(logits_of(model)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_gradients_of_the_factors_and_of_x(shape: tuple[int, ...]) -> None:
    base = nn.Linear(12, 7, bias=False, dtype=torch.float64).requires_grad_(False)
    linear = TrainableLinear(base, Factors(torch.randn(3, 12), torch.randn(7, 3), 0.7)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = F.linear(x, base.weight + 0.7 * linear.b @ linear.a)
    torch.testing.assert_close(linear(x), wanted)
    assert torch.autograd.gradcheck(lambda x, a, b: linear(x), (x, linear.a, linear.b))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_trained_adapter_is_served_as_it_was_trained(scheme: str | None, tmp_path: pathlib.Path) -> None:
    served, model = opened(scheme), opened(scheme)
    before = logits_of(model)
    parameters = adapt(model, LoraArgs(rank=4, targets=(*LINEARS, "output")), seed=3)
    assert torch.equal(logits_of(model), before), "B is zero at first"
    optimizer, losses = torch.optim.AdamW(parameters, lr=2e-2), []
    for _ in range(4):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits_of(model.eval()).detach()
    assert losses[-1] < losses[0] - 0.5
    save_adapter(trained_adapter(model), tmp_path / "adapter", ARGS)
    adapters = Adapters(served)
    adapters.load("it", tmp_path / "adapter")
    with torch.inference_mode(), adapters.over([("it", TOKENS.numel())]) as adapted:
        got = logits_of(adapted)
    if scheme is None:
        close(got, trained)
    else:  # the two add the update in another order, which bfloat16 rounds
        assert (got - trained).norm() < 0.02 * trained.norm()
        assert (got - before).norm() > 0.2 * before.norm()


@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16"])
def test_gradients_on_a_quantized_base_are_those_of_its_dequantized_weights(scheme: str) -> None:
    model, plain = quantize(tiny_model(ARGS, torch.float32), Scheme(scheme)), tiny_model(ARGS)
    if scheme == "bf16":  # one type for all of its modules
        model, plain = opened(scheme), plain.bfloat16()
    else:
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(model.get_submodule(name).dequantized())  # type: ignore[operator]
        plain.tok_embeddings.weight.copy_(model.tok_embeddings.dequantized())  # type: ignore[operator]
    start = adapter_of(ARGS, 4, 3)
    found = []
    for one in (model, plain):
        parameters = adapt(one, LoraArgs(), 0, start)
        loss_of(one).backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert len(found[0]) == sum(f.a.numel() + f.b.numel() for f in start.targets.values())
    # The forward rounds activations to 8 bits; bfloat16 sums in another order.
    assert F.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_packed_documents_have_the_gradients_of_rows(scheme: str | None) -> None:
    model, gradients = opened(scheme), []
    parameters = adapt(model, LoraArgs(), 0, adapter_of(ARGS, 4, 3))
    ids = torch.arange(2).repeat_interleave(21)
    for tokens, isolated in ((TOKENS, None), (TOKENS.flatten(), ids)):
        logits = model(tokens, Stateless(ARGS.sliding_window), isolated)[0].view(2, 21, -1)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        gradients.append([p.grad for p in parameters])
        model.zero_grad(set_to_none=True)
    for rows, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, rows, atol=1e-5 if scheme is None else 3e-2, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_opens_a_trained_adapter_with_the_same_logits(rslora: bool, tmp_path: pathlib.Path) -> None:
    tiny_model(ARGS).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"of": "base"}')
    model = Mistral7B.from_pretrained(tmp_path / "base", dtype=torch.float32)
    parameters = adapt(model, LoraArgs(rank=4, rslora=rslora), seed=3)
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
    save_adapter(trained_adapter(model), tmp_path / "adapter", ARGS)
    assert (tmp_path / "adapter" / "tokenizer_config.json").read_text() == '{"of": "base"}'
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = PeftModel.from_pretrained(peft_base(pathlib.Path(named)), tmp_path / "adapter").eval()
    close(theirs(TOKENS).logits, logits_of(model))


def test_only_the_chosen_linears_are_trained() -> None:
    model = tiny_model()
    parameters = adapt(model, LoraArgs(rank=3, alpha=6, targets=("wq", "w2"), rslora=True), seed=0)
    adapter = trained_adapter(model)
    assert set(adapter.targets) == {
        f"layers.{n}.{name}" for n in range(2) for name in ("attention.wq", "feed_forward.w2")
    }
    assert {f.scale for f in adapter.targets.values()} == {6 / 3**0.5}
    loss_of(model).backward()
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with refused(AdapterError, field="model"):
        adapt(model, LoraArgs(), seed=0)
    with refused(AdapterError, field="model"):
        trained_adapter(tiny_model())


def test_trap_30_the_seed_alone_draws_the_adapter() -> None:
    def drawn(seed: int, noise: int) -> list[Tensor]:
        torch.manual_seed(noise)
        return [p.detach() for p in adapt(tiny_model(), LoraArgs(), seed)]

    first, same, other = drawn(1, 0), drawn(1, 5), drawn(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert float(first[0].abs().max()) == pytest.approx(TINY.dim**-0.5, rel=0.01)


def test_an_adapter_is_continued_with_its_own_ranks_and_scales(tmp_path: pathlib.Path) -> None:
    start = adapter_of(TINY, 4, 3, lambda name: "wk" in name)
    save_adapter(start, tmp_path / "start", TINY)
    model = tiny_model()
    adapt(model, LoraArgs(rank=9), seed=0, start=read_adapter(tmp_path / "start", TINY))
    again = trained_adapter(model)
    assert again.targets.keys() == start.targets.keys()
    for name, (a, b, scale) in again.targets.items():
        assert torch.equal(a, start.targets[name].a)
        assert torch.equal(b, start.targets[name].b)
        assert scale == start.targets[name].scale
    with refused(AdapterError, field="layers.0.attention.wk"):
        adapt(tiny_model(ARGS), LoraArgs(), seed=0, start=start)
    with refused(AdapterError, field="start"):
        adapt(tiny_model(), LoraArgs(), 0, Adapter({}, weights={"norm.weight": torch.ones(TINY.dim)}))


def test_dropout_acts_in_training_alone() -> None:
    model = tiny_model()
    adapt(model, LoraArgs(dropout=0.5), 0, adapter_of(TINY, 4, 3))
    evaluated = [logits_of(model.eval()) for _ in range(2)]
    assert torch.equal(*evaluated)
    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seeds.append(logits_of(model.train()))
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[1], seeds[2])
    assert not torch.equal(seeds[0], evaluated[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("alpha", 0.0), ("alpha", float("inf")), ("dropout", 1.0), ("targets", ()), ("targets", ("q",))],
)
def test_impossible_shapes_are_refused(field: str, value: object) -> None:
    with refused(AdapterError, field=field):
        LoraArgs(**{field: value})  # type: ignore[arg-type]


def test_a_model_and_its_copy_are_trained_apart() -> None:
    model = tiny_model()
    first = adapt(model, LoraArgs(), seed=0)
    second = list(copy.deepcopy(model).parameters())
    assert not {p.data_ptr() for p in first} & {p.data_ptr() for p in second}
