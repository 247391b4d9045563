"""Mistral 7B in the order of the paper (arXiv:2310.06825).

    x = E[tokens];   N times: x += Attention(norm(x)), x += FeedForward(norm(x));   logits = W norm(x)

B sequences · T new tokens · D width · H query heads · G key/value heads
K head width · F feed-forward width · W window · V vocabulary · N layers
"..." is (B, T) for a rectangle, (T,) for a packed batch; only attend() treats the two differently.

Modules hold no state between calls: only the cache that is passed in is changed (cache/). Which keys a
query sees is decided in attention.py.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Cache, GrowingCache, Memory, RollingCache, check_fit
from .errors import ConfigError
from .rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """The shape of a model, in the names of Mistral's own `params.json` (paper, table 1).

    With no arguments it is Mistral 7B v0.1. Raises ConfigError, naming the field, if it cannot be.
    """

    dim: int = 4096  # D
    n_layers: int = 32  # N
    head_dim: int = 128  # K
    hidden_dim: int = 14336  # F
    n_heads: int = 32  # H
    n_kv_heads: int = 8  # G
    norm_eps: float = 1e-5
    vocab_size: int = 32000  # V
    rope_theta: float = 10_000.0
    sliding_window: int | None = 4096  # W; None: full causal attention
    max_seq_len: int = 32768
    tie_embeddings: bool = False
    rope_scaling: RopeScaling | None = None  # of fine-tunes for longer contexts; not in the paper

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name == "tie_embeddings":
                good, wanted = isinstance(value, bool), "true or false"
            elif name == "rope_scaling":
                good, wanted = isinstance(value, RopeScaling | None), "a RopeScaling or None"
            elif name in ("norm_eps", "rope_theta"):
                good, wanted = number and math.isfinite(value) and value > 0, "a finite number above 0"
            else:
                good, wanted = number and isinstance(value, int) and value >= 1, "a whole number of at least 1"
                if name == "sliding_window":
                    good, wanted = good or value is None, wanted + " (or None for full attention)"
            if not good:
                raise ConfigError(f"ModelArgs.{name} must be {wanted}, not {value!r}", field=name)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"ModelArgs.n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})",
                field="n_heads",
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"ModelArgs.head_dim must be even to be rotated in pairs, not {self.head_dim}",
                field="head_dim",
            )

    @classmethod
    def v0_1(cls) -> ModelArgs:
        """Mistral 7B v0.1, base and instruct: window 4096, theta 1e4."""
        return cls()

    @classmethod
    def v0_2(cls) -> ModelArgs:
        """Mistral 7B v0.2, base and instruct: no window, theta 1e6."""
        return cls(rope_theta=1e6, sliding_window=None)

    @classmethod
    def v0_3(cls) -> ModelArgs:
        """Mistral 7B v0.3, base and instruct: as v0.2, with 768 more tokens for tools."""
        return cls(rope_theta=1e6, sliding_window=None, vocab_size=32768)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: normalised in float32, cast down, then multiplied."""

    def __init__(self, dim: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


Rope = tuple[Tensor, Tensor]  # cos and sin of p * theta^(-2i/K), each (..., 1, K/2)


def rope_phases(positions: Tensor, args: ModelArgs, dtype: torch.dtype) -> Rope:
    """cos and sin of the rotary angles (arXiv:2104.09864, eq. 15) at positions (...): (..., 1, K/2).

    Angles are computed wide from exact positions whatever the weights' dtype: in bfloat16 position
    32767 would be off by whole turns. `dtype` is that of the result, float32 at least.
    """
    exact = torch.float32 if positions.device.type == "mps" else torch.float64  # MPS has no float64
    pair = torch.arange(0, args.head_dim, 2, dtype=exact, device=positions.device)
    frequency, gain = args.rope_theta ** (-pair / args.head_dim), 1.0
    if args.rope_scaling is not None:
        frequency, gain = args.rope_scaling.apply(frequency, args.rope_theta, args.max_seq_len)
    angle = positions.to(exact)[..., None, None] * frequency
    dtype = torch.promote_types(dtype, torch.float32)
    return (angle.cos() * gain).to(dtype), (angle.sin() * gain).to(dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate neighbouring pairs of x (..., heads, K), Mistral's own interleaved layout."""
    cos, sin = rope
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G keys and values (paper, section 2)."""

    def __init__(self, args: ModelArgs, **factory: Any) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False, **factory)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False, **factory)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False, **factory)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False, **factory)

    def forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # x: (..., D)
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        out = memory.attend(rotate(q, rope), rotate(k, rope), v)  # (..., H, K)
        return self.wo(out.flatten(-2))  # (..., D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), arXiv:2002.05202."""

    def __init__(self, args: ModelArgs, **factory: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False, **factory)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False, **factory)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Pre-normalised residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, args: ModelArgs, **factory: Any) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, **factory)
        self.attention = Attention(args, **factory)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, **factory)
        self.feed_forward = FeedForward(args, **factory)

    def forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # (..., D)
        x = x + self.attention(self.attention_norm(x), rope, memory)
        return x + self.feed_forward(self.ffn_norm(x))


class Layers(nn.ModuleList):
    """N blocks, one after another, each over its own layer of the cache."""

    def forward(self, x: Tensor, rope: Rope, cache: Cache) -> Tensor:  # (..., D)
        for layer, memory in zip(self, cache.layers, strict=False):  # a cache may have more of them
            x = layer(x, rope, memory)
        return x


class Mistral7B(nn.Module):
    """The whole model: embedding, N blocks, norm, and the projection onto the vocabulary.

        logits, cache = model(tokens)               # tokens (B, T) or (T,), logits (..., V) float32
        logits, cache = model(tokens[:, -1:], cache)

    `dtype` is that of the weights (bfloat16 as released). On `torch.device("meta")` nothing is
    allocated. Fresh weights are random; `from_pretrained` opens released or saved ones.
    """

    __call__: Callable[..., tuple[Tensor, Cache]]  # of `forward`, for type checkers

    def __init__(
        self, args: ModelArgs | None = None, *, dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.args = args = args or ModelArgs()
        self.source: pathlib.Path | None = None  # the folder or file it was opened from, tokenizer and all
        meta: dict[str, Any] = {"dtype": dtype, "device": "meta"}  # numbers are drawn once, below, not by layers
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim, **meta), False)
        self.layers = Layers(TransformerBlock(args, **meta) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps, **meta)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False, **meta)
        self.tie()
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.tie()
            self.reset_parameters()

    def tie(self) -> None:
        """With `tie_embeddings`, make output and embedding one tensor (again, after moving from meta)."""
        if self.args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def reset_parameters(self) -> None:
        """Draw fresh weights, uniform of deviation 0.02; smaller for those that write to the residual stream.

        Each tensor has its own generator, seeded from torch's, so tensors can be initialized in parallel.
        """
        weights = [(name, p) for name, p in self.named_parameters() if p.dim() == 2]
        seeds = torch.randint(2**62, (len(weights),), device="cpu").tolist()

        def draw(named: tuple[str, nn.Parameter], seed: int) -> None:
            name, p = named
            std = 0.02 / math.sqrt(2 * self.args.n_layers) if name.endswith(("wo.weight", "w2.weight")) else 0.02
            bound = std * math.sqrt(3)
            with torch.inference_mode(p.is_inference()):  # a mode does not reach the caller's threads
                nn.init.uniform_(p, -bound, bound, generator=torch.Generator(p.device).manual_seed(seed))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(draw, weights, seeds))
        for p in self.parameters():
            if p.dim() == 1:
                nn.init.ones_(p)

    def __repr__(self) -> str:
        a, p = self.args, self.norm.weight
        return f"Mistral7B(dim={a.dim}, n_layers={a.n_layers}, {p.dtype}, {p.device}, source={self.source})"

    def hidden(self, tokens: Tensor, cache: Cache, sequence_ids: Tensor | None = None) -> Tensor:
        """Final normalised states of tokens (...): (..., D). Writes into `cache`."""
        check_fit(cache, len(self.layers), tokens, sequence_ids)
        positions = cache.extend(tokens, sequence_ids)
        x = self.tok_embeddings(tokens)  # (..., D)
        rope = rope_phases(positions, self.args, x.dtype)
        return self.norm(self.layers(x, rope, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (..., D), in float32 at least: (..., V)."""
        out = self.output(hidden)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def forward(
        self, tokens: Tensor, cache: Cache | None = None, sequence_ids: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """Logits (..., V) of every token, in float32, and the cache that continues from them.

        tokens        (B, T), a rectangle of sequences of equal length, or (T,), a packed batch
        cache         what came before; none begins at position 0. A GrowingCache (the default) is not
                      changed and stays valid; a RollingCache is written in place.
        sequence_ids  (T,), for packed tokens: which sequence each belongs to. With Stateless also (B, T).
        """
        if cache is None:
            cache = GrowingCache(self.args.n_layers, self.args.sliding_window)
        cache = cache.writable()
        return self.logits(self.hidden(tokens, cache, sequence_ids)), cache

    def rolling_cache(
        self, batch: int = 1, max_seq_len: int | None = None, static: bool = False, slack: int = 0,
        kv_dtype: torch.dtype | None = None,
    ) -> RollingCache:  # fmt: skip
        """An empty ring for `batch` sequences of up to `max_seq_len` tokens (endless with a window).

        Up to `slack` tokens can be rolled back. With `kv_dtype` torch.int8, keys and values take half the bytes.
        """
        args, p = self.args, self.norm.weight
        return RollingCache(
            args.n_layers, args.n_kv_heads, args.head_dim, args.sliding_window,
            batch=batch, max_seq_len=max_seq_len or args.max_seq_len, dtype=p.dtype, device=p.device,
            static=static, slack=slack, kv_dtype=kv_dtype,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] = "demo", *, dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str = "cpu", quantization: str | None = None, mmap: bool = True,
    ) -> Mistral7B:  # fmt: skip
        """Open a folder, file or hub id in any known format; see `checkpoint.load`.

        `quantization` ("int8", "int4", "bf16", "fp8") rounds the weights while they are read. `mmap=False` copies
        quantized ones from their file into memory, for speed.
        """
        from .checkpoint import load  # the one door upwards: files know the model, not the other way

        return load(source, dtype=dtype, device=device, quantization=quantization, mmap=mmap)

    def save_pretrained(
        self, path: str | os.PathLike[str], format: str = "huggingface", max_shard_size: int | str = "5GB",
        type: str | None = None, distance: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write the model as others load it, or "quantized"; see `checkpoint.save`."""
        from .checkpoint import save

        save(self, path, format, max_shard_size, type=type, distance=distance, calibration=calibration)

    def record(self, *points: str, **options: Any) -> Any:
        """Keep activations of the calls within; see `interpret.record`."""
        from .interpret import record

        return record(self, *points, **options)

    def patch(self, values: Mapping[Any, Any], **options: Any) -> Any:
        """Replace activations of the calls within; see `interpret.patch`."""
        from .interpret import patch

        return patch(self, values, **options)

    def steer(self, layer: int, vector: Tensor, **options: Any) -> Any:
        """Add a vector to the residual stream of the calls within; see `interpret.steer`."""
        from .interpret import steer

        return steer(self, layer, vector, **options)
