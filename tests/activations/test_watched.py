"""A watched model computes the same bits, also where its blocks would run in one kernel call."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, tiny_args, tiny_model, tokens_of

from mistral_7b.activations.points import places_of
from mistral_7b.activations.recorder import Recorder
from mistral_7b.activations.watched import Part, Taps, Watched
from mistral_7b.cache import GrowingCache, Stateless
from mistral_7b.kernels.backend import BLOCK, LAYERS, Backend, uses
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import quantize

WIDE = tiny_args(dim=288, head_dim=32, hidden_dim=320, n_heads=6, n_kv_heads=2)  # several blocks of every format


def watched(model: Mistral7B) -> tuple[Mistral7B, Recorder]:
    recorder = Recorder(places_of((), None, model.args.n_layers))
    return Watched(model, Taps([Part(..., [recorder])])), recorder


@torch.inference_mode()
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("args", [TINY, WIDE], ids=["tiny", "wide"])
def test_a_quantized_model_keeps_its_bits(scheme: str, dtype: torch.dtype, args: object) -> None:
    """Of logits and of cached keys and values, in prefill, chunks and decode, with every cache."""
    model = quantize(tiny_model(args, dtype), scheme)  # type: ignore[arg-type]
    x = model.norm.weight
    assert uses(Backend.CPU, BLOCK, x) or not uses(Backend.CPU, LAYERS, x)  # no kernels: nothing is fused
    seen, recorder = watched(model)
    for length in (1, 3, 33):
        tokens = tokens_of((2, length + 3), model.args)
        for make in (
            lambda: Stateless(8),
            lambda: GrowingCache(2, 8),
            lambda: model.rolling_cache(2),
            lambda: model.rolling_cache(2, kv_dtype=torch.int8),
        ):
            mine, theirs = make(), make()
            for part in (tokens[:, :length], *tokens[:, length:].split(1, 1)):
                wanted, mine = model(part, mine)  # type: ignore[assignment]
                got, theirs = seen(part, theirs)  # type: ignore[assignment]
                assert torch.equal(got, wanted)
            if not isinstance(mine, Stateless):
                for a, b in zip(mine.layers, theirs.layers, strict=True):
                    assert all(torch.equal(s, t) for s, t in zip(a.entries, b.entries, strict=True))
    assert all(recorder.kept.values())


def test_the_model_that_is_watched_is_not_changed() -> None:
    model = tiny_model()
    before = {name: (module, dict(vars(module))) for name, module in model.named_modules()}
    seen, _ = watched(model)
    seen(tokens_of((1, 9)))
    assert {p.data_ptr() for p in seen.parameters()} == {p.data_ptr() for p in model.parameters()}
    for name, module in model.named_modules():
        assert module is before[name][0]
        assert vars(module).keys() == before[name][1].keys()
        assert all(v is before[name][1][key] for key, v in vars(module).items())
