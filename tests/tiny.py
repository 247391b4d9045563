"""Small models for the tests, and the truth about them (reference.py)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from reference import reference_logits
from torch import Tensor

from mistral_7b.model import Mistral7B, ModelArgs

# No two sizes are alike, so that a transposed or mistaken dimension cannot fit by chance;
# n_heads * head_dim is not dim either.
TINY = ModelArgs(
    dim=40, n_layers=2, head_dim=10, hidden_dim=56, n_heads=6, n_kv_heads=3,
    vocab_size=67, sliding_window=8, max_seq_len=96,
)  # fmt: skip


def tiny_args(**changes: object) -> ModelArgs:
    return dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def tiny_model(args: ModelArgs = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> Mistral7B:
    """A model whose every part matters: sharp attention, and norm weights that all differ."""
    model = Mistral7B(args, dtype=torch.float64, device="cpu").requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=draw, dtype=p.dtype)
        if p.dim() == 1:
            p.copy_(1 + 0.3 * noise)
        elif name == "tok_embeddings.weight":
            # As the output too, it would give logits of size 10 and the rounding that goes with them.
            p.copy_(noise / math.sqrt(p.shape[1]) if args.tie_embeddings else noise)
        else:
            sharp = 2.0 if name.endswith(("wq.weight", "wk.weight")) else 1.0
            p.copy_(noise * sharp / math.sqrt(p.shape[1]))
    return model.to(dtype)


def tokens_of(shape: tuple[int, ...], args: ModelArgs = TINY, seed: int = 1) -> Tensor:
    return torch.randint(0, args.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def truth(model: Mistral7B, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
    """The reference's logits for one row of tokens (T,), or each row of (B, T): float64."""
    if tokens.dim() == 2:
        ids = [None] * len(tokens) if sequence_ids is None else list(sequence_ids)
        return torch.stack([truth(model, row, s) for row, s in zip(tokens, ids, strict=True)])
    args = model.args
    weights: dict[str, np.ndarray] = {n: p.detach().double().numpy() for n, p in model.state_dict().items()}
    logits = reference_logits(
        weights, tokens.tolist(), n_layers=args.n_layers, n_heads=args.n_heads, n_kv_heads=args.n_kv_heads,
        head_dim=args.head_dim, norm_eps=args.norm_eps, rope_theta=args.rope_theta, window=args.sliding_window,
        sequence_ids=None if sequence_ids is None else sequence_ids.tolist(),
    )  # fmt: skip
    return torch.from_numpy(logits)


def close(actual: Tensor, wanted: Tensor) -> None:
    """The contract's tolerance for the tensor's type: float64 to 1e-10, float32 to 1e-5."""
    # Logits are of size 1 to 5: the bound is absolute, and relative beyond 1.
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted.double(), atol=tolerance, rtol=tolerance)
