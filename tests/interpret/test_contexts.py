"""Recording, patching and steering: exact, confined to the `with` block and to its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from reference import linear, rms_norm
from refusals import refused
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
