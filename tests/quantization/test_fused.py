"""Fused blocks share the parameters of a model, with the same names and results."""

from __future__ import annotations

import copy

import torch
from tiny import TINY, tiny_model, tokens_of

from mistral_7b.cache import Stateless
from mistral_7b.model import Attention, FeedForward, Layers, RMSNorm, TransformerBlock
from mistral_7b.quantization import quantize
from mistral_7b.quantization.fused import FusedBlock, FusedLayers, FusedRMSNorm, fuse, fused


def test_fused_blocks_share_the_models_parameters() -> None:
    model = tiny_model(TINY, torch.float32)
    layers, norm, before = model.layers, model.norm, dict(model.named_parameters())
    blocks, parts = list(layers), [(b.attention, b.feed_forward, b.ffn_norm) for b in layers]
    fuse(model)
    assert type(model.layers) is FusedLayers
    assert type(model.norm) is FusedRMSNorm
    assert all(type(block) is FusedBlock for block in model.layers)
    # The original modules are unchanged, but no longer part of a model.
    assert type(layers) is Layers
    assert type(norm) is RMSNorm
    assert all(type(block) is TransformerBlock for block in blocks)
    assert all([type(p) for p in some] == [Attention, FeedForward, RMSNorm] for some in parts)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_fused_blocks_match_the_model() -> None:
    plain, model = tiny_model(TINY, torch.float32), tiny_model(TINY, torch.float32)
    fuse(model)
    tokens = tokens_of((2, 20))
    wanted, _ = plain(tokens, Stateless(TINY.sliding_window))
    torch.testing.assert_close(model(tokens)[0], wanted, rtol=1e-4, atol=1e-4)


def test_unknown_modules_are_kept_and_fusing_is_idempotent() -> None:
    class Own(FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = tiny_model()
    model.layers[0].feed_forward = own = Own(TINY)
    fuse(model)
    assert model.layers[0].feed_forward is own
    blocks = list(model.layers)
    fuse(model)
    assert all(a is b for a, b in zip(blocks, model.layers, strict=True))
    assert fused(own) is own


@torch.inference_mode()
def test_a_copy_has_its_own_descriptor() -> None:
    """A descriptor contains pointers, which are not valid in a copy."""
    model, tokens = quantize(tiny_model(TINY, torch.bfloat16), "int4"), tokens_of((1, 12))
    wanted = model(tokens, model.rolling_cache())[0]
    other = copy.deepcopy(model)
    assert all(block._description is None for block in other.layers)
    assert torch.equal(other(tokens, other.rolling_cache())[0], wanted)
    scale = other.layers[0].attention.wq.d
    scale.mul_(2)
    assert not torch.equal(other(tokens, other.rolling_cache())[0], wanted)
    assert torch.equal(model(tokens, model.rolling_cache())[0], wanted)
