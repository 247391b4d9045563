"""Rounding with error feedback (GPTQ, Frantar et al. 2023, arXiv:2210.17323).

N outputs · K inputs · C columns of a block · X (T, K) inputs · w a weight (N, K), q its rounding, E = w - q

The squared output error of a Linear is |X E^T|^2 = tr(E H E^T), H = X^T X. With H = (L + I) D (L + I)^T, L
strictly lower triangular, it is the sum over columns k of D_k |E_k + sum_{j > k} E_j L_jk|^2. So if columns are
rounded from the last to the first, and each compensates the errors of those after it,

    q_k = round(w_k + sum_{j > k} E_j L_jk)

each term is only the rounding error of its column. This is equivalent to GPTQ (Chee et al. 2023, arXiv:2307.13304,
theorem 6), with one triangular factor of H and no inverse: a third of the work and half the memory. The grid is
searched beforehand, with D as the importance of each input.

More than CHUNK inputs are divided into chunks, each with an H of its own: errors are compensated within a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizationError
from ..kernels.backend import ROUND, Backend, uses
from ..kernels.block_formats import FORMATS
from ..kernels.cpu import calls
from ..kernels.linear import quantize_rows
from .rounding import Blocks, grid, round_blocks

BLOCK = 128  # columns whose feedback to earlier columns is one matrix product
CHUNK = 4096  # inputs: 67 MB of H; the time of a chunk is proportional to the square, or the third power
TINY = 1e-30
ROWS = 1024  # of a weight, processed at a time in five float32 buffers
DAMPING = 0.1  # of H's mean diagonal, added to it: less fits the calibration text too closely


class Feedback:
    """H of one Linear's inputs, in chunks, accumulated and then factored.

    Inputs are quantized to int8 in blocks of `block`, as in the quantized product.
    """

    def __init__(self, in_features: int, block: int) -> None:
        parts = -(-in_features // CHUNK)
        self.block = block
        self.spans = [(in_features * i // parts, in_features * (i + 1) // parts) for i in range(parts)]
        self.hessians = [torch.zeros(end - begin, end - begin) for begin, end in self.spans]

    def add(self, x: Tensor) -> None:
        """Accumulate inputs (T, K)."""
        inputs = x.shape[1]
        q, scale = quantize_rows(F.pad(x, (0, -inputs % self.block)).unflatten(1, (-1, self.block)))
        x = q.mul_(scale).flatten(1)
        for (begin, end), hessian in zip(self.spans, self.hessians, strict=True):
            part = x[:, begin:end]
            for i in range(0, end - begin, 1024):  # the lower triangle is enough
                rows = slice(i, i + 1024)
                hessian[rows, : i + 1024].addmm_(part[:, rows].T, part[:, : i + 1024])

    def factor(self) -> None:
        """Replace each H by the order of columns and its factor L + I. QuantizationError if inputs are not finite.

        Columns are sorted by the energy of their inputs: those with the largest are rounded first, and the others
        compensate.
        """
        self.orders, self.factors, pivots = [], [], []
        while self.hessians:
            hessian = self.hessians.pop(0)
            hessian = hessian.tril().add_(hessian.tril(-1).T)
            order = hessian.diagonal().argsort()
            lower = hessian[order[:, None], order]
            del hessian
            diagonal = lower.diagonal()
            diagonal += (DAMPING * diagonal.mean()).clamp_min(TINY)
            if not diagonal.isfinite().all():
                raise QuantizationError("activations are not finite", hint="check the model's weights")
            torch.linalg.cholesky(lower, out=lower)
            pivot = lower.diagonal().clone()
            self.orders.append(order)
            self.factors.append(lower.div_(pivot))
            pivots.append(torch.empty_like(pivot).index_copy_(0, order, pivot.square()))
        self.importance = torch.cat(pivots)  # (K,)

    def round_blocks(self, weight: Tensor, kind: str) -> Blocks:
        """`rounding.round_blocks`, with importance and error feedback for these inputs."""
        f, inputs = FORMATS[kind], weight.shape[1]
        low, high = (1 if f.low == 8 else 0) - f.zero, (1 << f.low + f.high) - 1 - f.zero
        blocks = round_blocks(weight, kind, self.importance)
        for n in range(0, len(weight), ROWS):
            rows = slice(n, n + ROWS)
            part = Blocks(blocks.q[rows], None if blocks.scales is None else blocks.scales[rows], blocks.d[rows])
            step, offset = (values[:, :inputs] for values in grid(kind, part))
            w = weight[rows].float() - offset
            for (begin, end), order, factor in zip(self.spans, self.orders, self.factors, strict=True):
                q = _round(w[:, begin:end][:, order], step[:, begin:end][:, order], factor, low, high)
                part.q[:, begin:end][:, order] = (q + f.zero).to(torch.uint8)
        return blocks


def _round(w: Tensor, step: Tensor, factor: Tensor, low: int, high: int) -> Tensor:
    """Integers (N, K) within low..high, as float32, of w (N, K), which becomes their errors."""
    q = torch.empty_like(w)
    for stop in range(w.shape[1], 0, -BLOCK):
        columns = slice(max(0, stop - BLOCK), stop)
        target = torch.addmm(w[:, columns], w[:, stop:], factor[stop:, columns])
        left, factors, steps = (
            t.contiguous() for t in (w[:, columns], factor[columns, columns], step[:, columns])
        )
        codes = torch.empty_like(target)
        round_columns = calls.feedback if uses(Backend.CPU, ROUND, target) else feedback_twin
        round_columns(target, left, factors, steps, codes, low, high)
        w[:, columns], q[:, columns] = left, codes
    return q


def feedback_twin(target: Tensor, w: Tensor, factor: Tensor, step: Tensor, q: Tensor, low: int, high: int) -> None:
    """`calls.feedback` in plain PyTorch."""
    for i in range(w.shape[1] - 1, -1, -1):
        value = torch.where(step[:, i] == 0, 0.0, target[:, i] / step[:, i])  # a group of zeros has no step
        q[:, i] = value.round_().clamp_(low, high)
        w[:, i] -= q[:, i] * step[:, i]
        target[:, :i] += w[:, i : i + 1] * factor[i, :i]
