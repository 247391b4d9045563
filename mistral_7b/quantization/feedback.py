"""Rounding with error feedback (GPTQ, Frantar et al. 2023, arXiv:2210.17323).

N outputs · K inputs · G groups of K · X (T, K) inputs · w a weight (N, K), q its rounding, E = w - q

The squared output error of a Linear is |X E^T|^2 = tr(E H E^T), H = X^T X. With H = (L + I) D (L + I)^T, L
strictly lower triangular, it is the sum over columns k of D_k |E_k + sum_{j > k} E_j L_jk|^2. So if columns are
rounded from the last to the first, and each compensates the errors of those after it,

    q_k = round(w_k + sum_{j > k} E_j L_jk)

each term is only the rounding error of its column. This is equivalent to GPTQ (Chee et al. 2023, arXiv:2307.13304,
theorem 6), with one triangular factor of H and no inverse: a third of the work and half the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import QuantizationError
from ..kernels.block_formats import FORMATS
from ..kernels.linear import quantize_rows
from .linear import TINY
from .rounding import Blocks, grid, round_blocks

BLOCK = 128  # columns whose feedback to earlier columns is one matrix product
ROWS = 1024  # of a weight, processed at a time in seven float32 buffers
DAMPING = 0.01  # of H's mean diagonal, added to it


class Feedback:
    """H of one Linear's inputs, accumulated and then factored: float32 (K, K), 822 MB at K = 14336.

    Inputs are quantized to int8 per row, as in the quantized product.
    """

    def __init__(self, in_features: int) -> None:
        self.hessian: Tensor | None = torch.zeros(in_features, in_features)

    def add(self, x: Tensor) -> None:
        """Accumulate inputs (..., K)."""
        assert self.hessian is not None, "add() was called after factor()"
        q, scale = quantize_rows(x)
        x = (q * scale).flatten(0, -2)
        self.hessian.addmm_(x.T, x)

    def factor(self) -> None:
        """Replace H by the order of columns and its factor L + I. QuantizationError if inputs are not finite.

        Columns are sorted by the energy of their inputs: those with the largest are rounded first, and the others
        compensate. Needs a second (K, K) temporarily.
        """
        assert self.hessian is not None
        self.order = self.hessian.diagonal().argsort()  # (K,)
        lower, self.hessian = self.hessian[self.order[:, None], self.order], None
        diagonal = lower.diagonal()
        diagonal += (DAMPING * diagonal.mean()).clamp_min(TINY)
        if not diagonal.isfinite().all():
            raise QuantizationError("activations are not finite", hint="check the model's weights")
        torch.linalg.cholesky(lower, out=lower)
        self.lower = lower.div_(lower.diagonal().clone())  # (K, K)

    def round_blocks(self, weight: Tensor, kind: str) -> Blocks:
        """`rounding.round_blocks`, on the same grid, with error feedback for these inputs."""
        f, inputs, found = FORMATS[kind], weight.shape[1], []
        low = 1 - f.zero if f.low == 8 else -f.zero
        high = (1 << f.low + f.high) - 1 - f.zero
        for rows in weight.split(ROWS):
            blocks = round_blocks(rows, kind)
            step, offset = (values[:, :inputs] for values in grid(kind, blocks))
            q = self._round(rows.float() - offset, step.T[self.order], torch.tensor(low), torch.tensor(high))
            blocks.q[:, :inputs] = (q + f.zero).to(torch.uint8)
            found.append(blocks)
        q, d = torch.cat([blocks.q for blocks in found]), torch.cat([blocks.d for blocks in found])
        scales = [blocks.scales for blocks in found if blocks.scales is not None]
        return Blocks(q, torch.cat(scales) if scales else None, d)

    def _round(self, weight: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Integers (N, K) within low..high; step, low and high are (K, N) in `order`, or broadcast to it."""
        w = weight.T[self.order]  # (K, N): columns of the weight are contiguous
        q, error = torch.empty_like(w), torch.empty_like(w)
        low, high = low.expand_as(w), high.expand_as(w)
        for stop in range(len(w), 0, -BLOCK):
            start = max(0, stop - BLOCK)
            block_factor = self.lower[start:stop, start:stop].T.contiguous()  # (k, j)
            target = torch.addmm(w[start:stop], self.lower[stop:, start:stop].T, error[stop:])
            for i in range(stop - start - 1, -1, -1):
                k = start + i
                torch.addmv(target[i], error[k + 1 : stop].T, block_factor[i, i + 1 :], out=q[k])
                q[k].div_(step[k]).nan_to_num_(0.0).round_()  # a group of zeros has no step
                torch.clamp(q[k], low[k], high[k], out=q[k])
                torch.addcmul(w[k], q[k], step[k], value=-1, out=error[k])
        result = torch.empty_like(weight)
        result[:, self.order] = q.T
        return result
