"""A quantized model is bit-identical to its plain PyTorch twin, and logits are batch-invariant."""

from __future__ import annotations

import functools

import pytest
import torch
from refusals import refused
from tiny import TINY, tiny_args, tiny_model, tokens_of
from torch import Tensor, nn

from mistral_7b.errors import CacheError
from mistral_7b.kernels.cpu.compiler import library
from mistral_7b.kernels.linear import block_linear_twin
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize, random_model
from mistral_7b.quantization.linear import BlockLinear, Int8Embedding
from mistral_7b.quantization.schemes import KINDS, compressed_bytes
from mistral_7b.surgery import replace_linears

SCHEMES = {name: Scheme(name) for name in KINDS}
ROWS = (1, 2, 3, 16, 17, 64, 300)
compiled = pytest.mark.skipif(library() is None, reason="without the kernel PyTorch's operators attend")
ARGS = tiny_args(max_seq_len=512)


@functools.cache
def model_of(scheme: str, window: int | None = TINY.sliding_window) -> Mistral7B:
    return quantize(tiny_model(tiny_args(max_seq_len=512, sliding_window=window), torch.bfloat16), SCHEMES[scheme])


class Twin(nn.Module):
    """The same product in plain PyTorch."""

    def __init__(self, of: BlockLinear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.of = of.in_features, of.out_features, of

    def forward(self, x: Tensor) -> Tensor:
        return block_linear_twin(x, self.of.codes, self.of.d, self.out_features, self.of.kind)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_model_is_bit_identical_to_its_twin(scheme: str) -> None:
    model = model_of(scheme)
    twin = quantize(tiny_model(ARGS, torch.bfloat16), SCHEMES[scheme])
    replaced = replace_linears(twin, lambda old, _: Twin(old), lambda _, m: isinstance(m, BlockLinear))  # type: ignore[arg-type]
    assert len(replaced) == 15
    tokens = tokens_of((2, 3 * 8))
    assert torch.equal(model(tokens)[0], twin(tokens)[0])


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_do_not_depend_on_the_chunk_size(scheme: str, window: int | None) -> None:
    """Chunks of 1 are decode, of 300 prefill, through attention and both caches."""
    model, tokens = model_of(scheme, window), tokens_of((1, 300))
    whole = model(tokens)[0]
    for size in ROWS:
        ring, grown, out = model.rolling_cache(1), None, []
        for part in tokens.split(size, dim=1):
            ours, _ = model(part, ring)
            theirs, grown = model(part, grown)
            assert torch.equal(ours, theirs)
            out.append(ours)
        assert torch.equal(torch.cat(out, 1), whole), size


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_do_not_depend_on_the_batch(scheme: str) -> None:
    """A batch with prompts of other lengths, in rings at other positions, decoded together."""
    model = model_of(scheme)
    tokens = tokens_of((max(ROWS), 30))
    alone, ring = [], model.rolling_cache(1)
    for part in (tokens[:1, :21], *tokens[:1, 21:].split(1, dim=1)):
        alone.append(model(part, ring)[0][:, -1])
    for size in ROWS:
        ring = model.rolling_cache(size)
        model(tokens[:1, :21], ring.rows(0, 1))
        for row in range(1, size):
            model(tokens[row : row + 1, : 1 + row % 20], ring.rows(row, row + 1))
        for i in range(21, 30):
            logits, _ = model(tokens[:size, i : i + 1], ring)
            assert torch.equal(logits[:1, -1], alone[i - 20]), (size, i)


@compiled
@torch.inference_mode()
def test_int8_kv_cache_is_exact_too() -> None:
    model, tokens = model_of("int4"), tokens_of((1, 60))
    ring = model.rolling_cache(1, kv_dtype=torch.int8)
    whole = model(tokens, ring)[0]
    assert not torch.equal(whole, model(tokens)[0])
    for size in (1, 7, 17):
        ring = model.rolling_cache(1, kv_dtype=torch.int8)
        assert torch.equal(torch.cat([model(part, ring)[0] for part in tokens.split(size, 1)], 1), whole)


@torch.inference_mode()
def test_packed_bfloat16_is_deterministic_on_request() -> None:
    args = tiny_args(dim=128, head_dim=32, hidden_dim=256, max_seq_len=512)
    model = quantize(tiny_model(args, torch.bfloat16), Scheme("bf16", deterministic=True))
    plain = quantize(tiny_model(args, torch.bfloat16), "bf16")
    tokens = tokens_of((1, 300), args)
    whole = model(tokens)[0]
    torch.testing.assert_close(plain(tokens)[0], whole, atol=0.3, rtol=0.1)
    if library() is not None:
        for size in (1, 3, 17, 64):
            ring = model.rolling_cache(1)
            assert torch.equal(torch.cat([model(part, ring)[0] for part in tokens.split(size, 1)], 1), whole)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_model_is_close_to_its_original(scheme: str, tied: bool) -> None:
    args = tiny_args(dim=128, hidden_dim=256, tie_embeddings=tied)
    original, tokens = tiny_model(args, torch.bfloat16), tokens_of((1, 40), args)
    wanted = original(tokens)[0]
    got = quantize(tiny_model(args, torch.bfloat16), SCHEMES[scheme])(tokens)[0]
    far = float((got - wanted).norm() / wanted.norm())
    assert 1e-4 < far < {"int8": 0.1, "q6_k": 0.2}.get(scheme, 0.7)  # random weights are the worst case


def test_the_embedding_is_dequantized_after_the_lookup() -> None:
    weight = torch.randn(19, 40).bfloat16()
    embedding = Int8Embedding.from_weight(weight)
    tokens = torch.tensor([[3, 18], [0, 3]])
    assert torch.equal(embedding(tokens), embedding.dequantized().bfloat16()[tokens])
    assert embedding(tokens).dtype == torch.bfloat16
    assert (embedding.dequantized() - weight.float()).abs().max() <= weight.float().abs().max() / 254 * 1.01


def test_a_random_model_has_the_shape_and_size_of_a_quantized_one() -> None:
    for name, scheme in SCHEMES.items():
        made, real = random_model(ARGS, scheme), model_of(name)
        assert [(n, t.shape, t.dtype) for n, t in made.state_dict().items()] == [
            (n, t.shape, t.dtype) for n, t in real.state_dict().items()
        ]
        assert compressed_bytes(made) == compressed_bytes(real)
        assert made(tokens_of((1, 20)))[0].isfinite().all()
    assert random_model(ARGS, "bf16")(tokens_of((1, 20)))[0].isfinite().all()
    assert random_model(ARGS, None)(tokens_of((1, 20)))[0].isfinite().all()


def test_a_ring_of_another_shape_is_refused_before_writing() -> None:
    other = tiny_model(tiny_args(n_kv_heads=1), torch.bfloat16).rolling_cache(1)
    with refused(CacheError, field="cache"):
        model_of("int4")(tokens_of((1, 5)), other)
