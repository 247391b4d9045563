"""The table of names compared with the model, and the permutation of wq and wk."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, tiny_args

from mistral_7b.checkpoint import names
from mistral_7b.model import Mistral7B


def test_the_name_table_equals_the_models_tensors() -> None:
    args = tiny_args(n_layers=3)
    state = Mistral7B(args, device="meta").state_dict()
    assert dict(names.expected(args)) == {name: tuple(t.shape) for name, t in state.items()}


@pytest.mark.parametrize("format", names.FORMATS)
def test_names_round_trip_through_every_format(format: str) -> None:
    args = tiny_args(n_layers=12)
    ours = [name for name, _ in names.expected(args)]
    theirs = [names.rename(name, "mistral", format) for name in ours]
    assert None not in theirs
    assert len(set(theirs)) == len(ours)
    assert [names.rename(name, format, "mistral") for name in theirs if name] == ours
    assert names.layout_of([name for name in theirs if name]) == format


@pytest.mark.parametrize(
    "name",
    [
        "", "weight", ".weight", "norm", "norm.bias", "norm.weight.weight", "layers.weight",
        "layers.01.attention.wq.weight", "layers.{}.attention.wq.weight", "layers.-1.attention.wq.weight",
        "layers.0.attention.wq", "layers.0.norm.weight",
    ],
)  # fmt: skip
def test_unknown_names_are_rejected(name: str) -> None:
    assert names.rename(name, "mistral", "huggingface") is None


def test_names_of_released_files() -> None:
    pairs = {
        "layers.7.attention_norm.weight": ("model.layers.7.input_layernorm.weight", "blk.7.attn_norm.weight"),
        "layers.31.ffn_norm.weight": ("model.layers.31.post_attention_layernorm.weight", "blk.31.ffn_norm.weight"),
        "layers.0.feed_forward.w2.weight": ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        "output.weight": ("lm_head.weight", "output.weight"),
    }
    for ours, theirs in pairs.items():
        assert (names.rename(ours, "mistral", "huggingface"), names.rename(ours, "mistral", "gguf")) == theirs


def test_trap_09_the_permutation_of_a_small_example() -> None:
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15])[:, None]  # two heads of three pairs
    assert names.half_split(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15]


@pytest.mark.parametrize(("heads", "head_dim"), [(6, 10), (3, 10), (1, 2), (5, 14)])
def test_trap_09_the_permutation_round_trips_bit_identical(heads: int, head_dim: int) -> None:
    w = torch.randn(heads * head_dim, 7, dtype=torch.bfloat16)
    assert torch.equal(names.interleaved(names.half_split(w, heads), heads), w)
    assert torch.equal(names.half_split(names.interleaved(w, heads), heads), w)
    if head_dim > 4:
        assert not torch.equal(names.half_split(w, heads), w)
        assert not torch.equal(names.half_split(names.half_split(w, heads), heads), w)


def test_trap_09_q_has_n_heads_and_k_n_kv_heads() -> None:
    heads = {name: names.rotated_heads(name, TINY) for name, _ in names.expected(TINY)}
    assert {n.split(".", 2)[2]: h for n, h in heads.items() if h and n.startswith("layers.1.")} == {
        "attention.wq.weight": TINY.n_heads,
        "attention.wk.weight": TINY.n_kv_heads,
    }
