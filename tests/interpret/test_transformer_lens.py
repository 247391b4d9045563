"""Code written for TransformerLens: its names and its two calls."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from tiny import TINY, tiny_model, tokens_of
from torch import Tensor

from mistral_7b.activations.points import POINTS, hook_name, place_of
from mistral_7b.errors import InterpretError
from mistral_7b.interpret.transformer_lens import HookPoint, run_with_cache, run_with_hooks
from mistral_7b.model import Mistral7B

# From TransformerLens's documentation of HookedTransformer.
NAMES = {
    "hook_embed": ("embedding", None), "blocks.1.hook_resid_pre": ("residual_before", 1),
    "blocks.1.ln1.hook_normalized": ("attention_norm", 1), "blocks.1.attn.hook_q": ("q", 1),
    "blocks.1.attn.hook_k": ("k", 1), "blocks.1.attn.hook_v": ("v", 1),
    "blocks.1.attn.hook_rot_q": ("rotated_q", 1), "blocks.1.attn.hook_rot_k": ("rotated_k", 1),
    "blocks.1.attn.hook_pattern": ("attention", 1), "blocks.1.attn.hook_z": ("z", 1),
    "blocks.1.hook_attn_out": ("attn_out", 1), "blocks.1.hook_resid_mid": ("residual_mid", 1),
    "blocks.1.ln2.hook_normalized": ("ffn_norm", 1), "blocks.1.mlp.hook_post": ("ffn", 1),
    "blocks.1.hook_mlp_out": ("ffn_out", 1), "blocks.1.hook_resid_post": ("residual", 1),
    "ln_final.hook_normalized": ("norm", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Mistral7B:
    return tiny_model(TINY)


def test_every_name_leads_to_its_place_and_back(model: Mistral7B) -> None:
    tokens = tokens_of((2, 21))
    logits, cache = run_with_cache(model, tokens)
    assert torch.equal(logits, model(tokens)[0])
    for name, place in NAMES.items():
        assert place_of(name, None, 2) == place
        assert hook_name(*place) == name
        assert torch.equal(cache[name], cache[place])
    assert {point for point, _ in NAMES.values()} | {"logits"} == set(POINTS)
    assert torch.equal(cache["pattern", 1], cache["attention", 1])
    assert torch.equal(cache["resid_post", -1], cache["residual", 1])
    for name in ("blocks.2.hook_resid_post", "blocks.1.hook_embed", "hook_resid_post", "blocks.x.hook_z", 3):
        with refused(InterpretError):
            cache[name]  # type: ignore[index]


def test_a_filter_names_what_is_cached(model: Mistral7B) -> None:
    _, cache = run_with_cache(model, tokens_of((2, 5)), names_filter=lambda name: name.endswith("hook_z"))
    assert list(cache) == [("z", 0), ("z", 1)]
    _, cache = run_with_cache(model, tokens_of((2, 5)), names_filter=["hook_embed", "blocks.1.attn.hook_pattern"])
    assert list(cache) == [("embedding", None), ("attention", 1)]
    with refused(InterpretError, field="name"):
        run_with_cache(model, tokens_of((2, 5)), names_filter="blocks.1.hook_resid")


def test_hooks_see_and_replace_in_their_shapes(model: Mistral7B) -> None:
    tokens, seen = tokens_of((2, 12)), []

    def look(value: Tensor, hook: HookPoint) -> None:
        seen.append((hook.name, hook.layer(), tuple(value.shape)))

    def ablate(z: Tensor, hook: HookPoint) -> Tensor:
        z[:, :, 2] = 0
        return z

    def in_place(z: Tensor, hook: HookPoint) -> None:
        z[:, :, 2] = 0

    def own_key(pattern: Tensor, hook: HookPoint) -> None:
        pattern[:, 2:4] = torch.eye(12)

    run_with_hooks(model, tokens, fwd_hooks=[(lambda name: name.endswith("pattern"), look)])
    assert seen == [(f"blocks.{n}.attn.hook_pattern", n, (2, 6, 12, 12)) for n in (0, 1)]
    with model.patch({("z", 1): 0.0}, heads=2):
        wanted = model(tokens)[0]
    for fn in (ablate, in_place):
        assert torch.equal(run_with_hooks(model, tokens, fwd_hooks=[("blocks.1.attn.hook_z", fn)]), wanted)
    with model.record("z", "v") as tape:
        run_with_hooks(model, tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", own_key)])
    torch.testing.assert_close(tape["z", 1][:, :, 2], tape["v", 1][:, :, 1])
    with refused(InterpretError):
        run_with_hooks(model, tokens, fwd_hooks=[("hook_embed", lambda x, hook: x[:1])])
    with refused(InterpretError):
        HookPoint("hook_embed", None).layer()
