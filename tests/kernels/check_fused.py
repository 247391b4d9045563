"""Fused kernels and decode attention against their twins; run by test_triton_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import DEVICE
from tiny import tiny_args, tiny_model, tokens_of
from torch import Tensor

from mistral_7b.attention import attention, visible
from mistral_7b.cache import Stateless
from mistral_7b.kernels import elementwise
from mistral_7b.kernels.gpu import decode_attention as decode
from mistral_7b.kernels.gpu import elementwise as gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
launched: list[str] = []


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    launched.clear()
    for module in (gpu, decode):
        real = module._launch

        def launch(name: str, *rest: object, real: Any = real, **how: object) -> None:
            launched.append(name)
            real(name, *rest, **how)

        monkeypatch.setattr(module, "_launch", launch)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(actual: Tensor, wanted: Tensor, units: float = 2.0) -> None:
    """Within two roundings of the type, of values of size 1 and more."""
    assert actual.dtype == wanted.dtype
    bound = units * ULP[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 40), (2, 3, 300), (17, 64), (300, 7)])
def test_norm_and_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, up, weight = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    assert_close(gpu.rms_norm(x, weight, 1e-5), elementwise.rms_norm_twin(x, weight, 1e-5))
    assert_close(gpu.silu_mul(x, up), elementwise.silu_mul_twin(x, up))
    assert torch.equal(gpu.rms_norm(x, weight, 1e-5)[:1], gpu.rms_norm(x[:1], weight, 1e-5))
    assert {"rms_norm", "silu_mul"} == set(launched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 6, 9])
def test_rotation(heads: int, dtype: torch.dtype) -> None:
    x, angle = normal(2, 3, heads, 10, dtype=dtype), 10 * normal(2, 3, 1, 5)
    assert_close(gpu.rotate(x, angle.cos(), angle.sin()), elementwise.rotate_twin(x, angle.cos(), angle.sin()))
    shared = angle[0]  # (T, 1, K/2) for both rows
    assert_close(gpu.rotate(x, shared.cos(), shared.sin()), elementwise.rotate_twin(x, shared.cos(), shared.sin()))
    assert set(launched) == {"rotate"}


def reference_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """attention() of two tokens, which uses PyTorch."""
    return attention(q.repeat_interleave(2, 1), k, v, seen.repeat_interleave(2, 1))[:, :1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "S", "H", "G", "K"), [(1, 1, 6, 3, 10), (3, 300, 8, 2, 16), (2, 700, 20, 1, 40)])
def test_attention_of_one_token(B: int, S: int, H: int, G: int, K: int, dtype: torch.dtype) -> None:
    """A ring with more slots than visible positions, and NaN in all invisible slots."""
    q = normal(B, 1, H, K, dtype=dtype)
    k, v = (normal(B, S + 5, G, K, dtype=dtype)[:, :S] for _ in "kv")
    p_q = torch.arange(S, S + B, device=DEVICE)[:, None]
    p_k = torch.stack([torch.randperm(S + 40)[:S] for _ in range(B)]).to(DEVICE)  # a ring, shuffled
    p_k[:, 0] = p_q[:, 0]
    for window in (None, 7):
        seen = visible(p_q, p_k, window)  # (B, 1, S)
        wanted = decode.decode_attention_twin(q, k, v, seen)
        assert_close(wanted, reference_attention(q, k, v, seen), units=8)
        poisoned = [t.masked_fill(~seen[:, 0, :, None, None], float("nan")) for t in (k, v)]
        assert_close(decode.decode_attention(q, *poisoned, seen), wanted)
        for row in range(B):  # a single row equals the row of the batch
            alone = slice(row, row + 1)
            one = decode.decode_attention(q[alone], k[alone], v[alone], seen[alone])
            assert torch.equal(one, decode.decode_attention(q, k, v, seen)[alone])
    assert_close(decode.decode_attention(q, k, v, None), decode.decode_attention_twin(q, k, v, None))
    assert set(launched) == {"attend_split", "attend_merge"}


def test_all_partial_results_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers contain NaN: splits without visible keys must write their partial results too."""
    real, made = torch.empty, []

    def poisoned(*size: int, **how: object) -> Tensor:
        made.append(real(*size, **how).fill_(float("nan")))  # type: ignore[call-overload]
        return made[-1]

    B, S, G, R, K = 2, 1100, 2, 3, 16
    q, k, v = normal(B, 1, G * R, K), normal(B, S, G, K), normal(B, S, G, K)
    seen = torch.zeros(B, 1, S, dtype=torch.bool, device=DEVICE)
    seen[:, :, 600:650] = True  # two of the five splits contain all visible keys
    wanted = decode.decode_attention_twin(q, k, v, seen)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda t: poisoned(t.shape, dtype=t.dtype, device=t.device))
    assert_close(decode.decode_attention(q, k, v, seen), wanted)
    assert len(made) == 4
    assert not any(t.isnan().any() for t in made)


def test_the_capacity_of_the_ring_does_not_matter() -> None:
    B, S, G, R, K = 2, 300, 2, 3, 16
    q, k, v = normal(B, 1, G * R, K), normal(B, 900, G, K), normal(B, 900, G, K)
    seen = torch.arange(900, device=DEVICE).expand(B, 1, -1) < S
    near_full = decode.decode_attention(q, k[:, :S], v[:, :S], seen[..., :S])
    assert torch.equal(decode.decode_attention(q, k, v, seen), near_full)


@pytest.mark.parametrize("window", [8, None])
def test_decode_uses_the_kernel(window: int | None) -> None:
    """Rows at equal and different positions, static and not, beyond the window: logits of the uncached forward."""
    args = tiny_args(sliding_window=window)
    model = tiny_model(args, torch.float32).to(DEVICE)
    tokens = tokens_of((2, 22)).to(DEVICE)
    wanted, _ = model(tokens, Stateless(window))
    launched.clear()
    with torch.no_grad():
        for static in (False, True):
            cache = model.rolling_cache(2, 24, static=static)
            model(tokens[:1, :5], cache.rows(0, 1))
            model(tokens[1:, :9], cache.rows(1, 2))
            for step in range(12):
                at = torch.tensor([[5 + step], [9 + step]], device=DEVICE)
                logits, _ = model(tokens.gather(1, at), cache)
                for row in range(2):
                    torch.testing.assert_close(logits[row, 0], wanted[row, at[row, 0]], rtol=1e-4, atol=1e-4)
        _, grown = model(tokens[:, :12])
        logits, _ = model(tokens[:, 12:13], grown)
        torch.testing.assert_close(logits[:, 0], wanted[:, 12], rtol=1e-4, atol=1e-4)
    assert launched.count("attend_split") == args.n_layers * 25
