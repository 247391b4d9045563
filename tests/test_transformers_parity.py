"""The same weights in transformers' MistralForCausalLM give the same logits.

transformers keeps the two halves of a head's rotation apart where Mistral interleaves them. The rows
are permuted here by an index written out for the purpose, independent of the checkpoint room's.
"""

from __future__ import annotations

import pytest
import torch
from tiny import close, tiny_model, tokens_of, truth
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from mistral_7b.cache import Stateless
from mistral_7b.model import Mistral7B, ModelArgs

# Head counts, key/value heads, head_dim / 2 and widths all differ, and n_heads * head_dim is not dim.
CONFIGS = {
    "window-8": ModelArgs(dim=40, n_layers=2, head_dim=10, hidden_dim=56, n_heads=6, n_kv_heads=3,
                          vocab_size=67, sliding_window=8),
    "window-5": ModelArgs(dim=24, n_layers=3, head_dim=14, hidden_dim=50, n_heads=4, n_kv_heads=2,
                          vocab_size=71, sliding_window=5, rope_theta=1e6, norm_eps=1e-6),
    "no-window": ModelArgs(dim=36, n_layers=2, head_dim=6, hidden_dim=44, n_heads=8, n_kv_heads=2,
                           vocab_size=53, sliding_window=None, rope_theta=1e6),
    "one-kv-head": ModelArgs(dim=30, n_layers=1, head_dim=16, hidden_dim=20, n_heads=5, n_kv_heads=1,
                             vocab_size=61, sliding_window=7),
    "tied": ModelArgs(dim=28, n_layers=2, head_dim=8, hidden_dim=34, n_heads=6, n_kv_heads=2,
                      vocab_size=59, sliding_window=3, tie_embeddings=True),
}  # fmt: skip


def half_split(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """Rows of q or k from (0, 1), (2, 3)... pairs to all firsts, then all seconds, head by head."""
    rows = [h * head_dim + 2 * i + part for h in range(heads) for part in (0, 1) for i in range(head_dim // 2)]
    return weight[rows]


def same_in_transformers(model: Mistral7B) -> MistralForCausalLM:
    args = model.args
    config = MistralConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim, rms_norm_eps=args.norm_eps, sliding_window=args.sliding_window,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=args.tie_embeddings, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    other = MistralForCausalLM(config).eval().requires_grad_(False).to(model.norm.weight.dtype)

    def put(target: nn.Module, value: Tensor) -> None:
        assert target.weight.shape == value.shape
        target.weight.copy_(value)

    put(other.model.embed_tokens, model.tok_embeddings.weight)
    put(other.model.norm, model.norm.weight)
    put(other.lm_head, model.output.weight)
    for theirs, ours in zip(other.model.layers, model.layers, strict=True):
        put(theirs.self_attn.q_proj, half_split(ours.attention.wq.weight, args.n_heads, args.head_dim))
        put(theirs.self_attn.k_proj, half_split(ours.attention.wk.weight, args.n_kv_heads, args.head_dim))
        put(theirs.self_attn.v_proj, ours.attention.wv.weight)
        put(theirs.self_attn.o_proj, ours.attention.wo.weight)
        put(theirs.mlp.gate_proj, ours.feed_forward.w1.weight)
        put(theirs.mlp.down_proj, ours.feed_forward.w2.weight)
        put(theirs.mlp.up_proj, ours.feed_forward.w3.weight)
        put(theirs.input_layernorm, ours.attention_norm.weight)
        put(theirs.post_attention_layernorm, ours.ffn_norm.weight)
    return other


@pytest.mark.parametrize("name", CONFIGS)
def test_trap_09_logits_agree_with_transformers(name: str) -> None:
    args = CONFIGS[name]
    model = tiny_model(args, seed=len(name))
    other = same_in_transformers(model)
    tokens = tokens_of((2, 21), args)
    assert args.sliding_window is None or 2 * args.sliding_window < 21
    wanted = other(tokens).logits
    close(model(tokens, Stateless(args.sliding_window))[0], wanted)
    close(model(tokens)[0], wanted)
    close(wanted, truth(model, tokens))  # all three agree, so that none is right by accident

    ring, got = model.rolling_cache(batch=2), []
    for part in (tokens[:, :9], *tokens[:, 9:].split(1, dim=1)):
        got.append(model(part, ring)[0])
    close(torch.cat(got, dim=1), wanted)


def test_trap_09_unpermuted_rows_would_be_seen() -> None:
    model = tiny_model(CONFIGS["window-8"])
    other, tokens = same_in_transformers(model), tokens_of((1, 21))
    for theirs, ours in zip(other.model.layers, model.layers, strict=True):
        theirs.self_attn.k_proj.weight.copy_(ours.attention.wk.weight)
    assert (other(tokens).logits - model(tokens)[0]).abs().max() > 1e-2


def test_trap_10_swapped_norms_would_be_seen() -> None:
    """Norm weights are random and all differ, so the parity above does tell the two apart."""
    model = tiny_model(CONFIGS["window-8"])
    other, tokens = same_in_transformers(model), tokens_of((1, 21))
    close(model(tokens)[0], other(tokens).logits)
    for layer in other.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = (
            layer.post_attention_layernorm,
            layer.input_layernorm,
        )
    assert (other(tokens).logits - model(tokens)[0]).abs().max() > 1e-2


def test_trap_01_the_window_of_transformers_is_this_window() -> None:
    """Its eager attention weights, counted: W keys to a row, the query's own included."""
    model = tiny_model(CONFIGS["window-8"])
    weights = same_in_transformers(model)(tokens_of((1, 21)), output_attentions=True).attentions
    for layer in weights:
        assert (layer[0, 0] > 0).sum(-1).tolist() == [min(i + 1, 8) for i in range(21)]
