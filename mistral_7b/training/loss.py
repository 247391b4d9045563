"""Next-token cross-entropy, and bits per byte of text."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import Stateless
from ..model import Mistral7B
from .data import IGNORE

LOGITS = 2**23  # numbers of a chunk of logits: 32 MiB in float32, and 2.5 times that with its gradient
ROWS = 64  # a multiple of these is up to a tenth faster in bfloat16


def chunk_rows(model: Mistral7B) -> int:
    """Return how many tokens are projected onto the vocabulary at once."""
    rows = LOGITS // model.args.vocab_size
    return rows // ROWS * ROWS or max(1, rows)


def loss_backward(model: Mistral7B, hidden: Tensor, targets: Tensor, n_targets: int) -> Tensor:
    """Return the summed cross-entropy of hidden states (..., D) over `n_targets`; run backward.

    `n_targets` counts the targets of the whole update, so that accumulated parts with different counts are
    weighted correctly. Loss and gradient are computed chunk by chunk, so that only one chunk's logits are in
    memory. The gradient of the hidden states is then propagated through the blocks.
    """
    flat = hidden.detach().flatten(0, -2).requires_grad_()
    flat_targets = targets.flatten()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    size = chunk_rows(model)
    for rows, target in zip(flat.split(size), flat_targets.split(size), strict=True):
        logits = model.output(rows)
        loss, grad = _cross_entropy(logits.detach(), target)
        logits.backward(grad.div_(n_targets).to(logits.dtype))
        total += loss / n_targets
    hidden.backward(flat.grad.view_as(hidden))  # type: ignore[union-attr]
    return total


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of logits (N, V), and its gradient softmax(logits) - onehot(targets).

    Both are float32 at least. Autograd would keep and write several more tensors of this size.
    """
    wide = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    kept, column = targets != IGNORE, targets.clamp_min(0)[:, None]
    loss = -(wide.gather(1, column)[:, 0] * kept).sum()
    grad = wide.exp_().scatter_add_(1, column, torch.full_like(column, -1, dtype=wide.dtype))
    return loss, grad if bool(kept.all()) else grad.mul_(kept[:, None])


@torch.inference_mode()
def document_nll(model: Mistral7B, tokens: list[int]) -> float:
    """Return the negative log-likelihood (nats) of tokens[1:] in one windowed forward pass."""
    device = model.norm.weight.device
    ids = torch.tensor([tokens], device=device)
    hidden = model.hidden(ids[:, :-1], Stateless(model.args.sliding_window))[0]
    total, size = 0.0, chunk_rows(model)
    for rows, target in zip(hidden.split(size), ids[0, 1:].split(size), strict=True):
        total += F.cross_entropy(model.logits(rows), target, reduction="sum").item()
    return total


def bits_per_byte(model: Mistral7B, documents: Iterable[tuple[list[int], int]]) -> float:
    """Return total bits over total bytes of (tokens with BOS, bytes) documents.

    Unlike nats per token, it does not depend on the tokenizer.
    """
    bits = size = 0.0
    with torch.compiler.set_stance("force_eager"):  # each length would recompile
        for tokens, n_bytes in documents:
            bits += document_nll(model, tokens) / math.log(2)
            size += n_bytes
    return bits / size
