"""Rounding with error feedback (GPTQ, Frantar et al. 2023, arXiv:2210.17323).

N outputs · K inputs · G groups of K · X (T, K) inputs · w a weight (N, K), q its rounding, E = w - q

What a Linear gives is off by |X E^T|^2 = tr(E H E^T), H = X^T X. With H = (L + I) D (L + I)^T, L strictly lower
triangular, that is the sum over columns k of D_k |E_k + sum_{j > k} E_j L_jk|^2. So if columns are rounded from
the last to the first, and each takes up what those after it got wrong,

    q_k = round(w_k + sum_{j > k} E_j L_jk)

no term is larger than rounding makes it. This is GPTQ's result in the form of Chee et al. 2023 (arXiv:2307.13304,
theorem 6): one triangular factor of H and no inverse, in a third of the work and half the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizationError
from ..kernels.layout import padded
from ..kernels.linear import quantize_rows
from .rounding import TINY, Int4Codes, Int8Codes, grid, int8_scale

BLOCK = 128  # columns whose feedback to those before them is one matrix product
ROWS = 1024  # of a weight at once: columns of float32 in seven copies
DAMPING = 0.01  # of H's mean diagonal, added to it


class Feedback:
    """H of one Linear's inputs, summed as they come and then factored: float32 (K, K), 822 MB at K = 14336.

    Inputs count as the quantized product sees them, int8 by row.
    """

    def __init__(self, in_features: int) -> None:
        self.gram: Tensor | None = torch.zeros(in_features, in_features)

    def add(self, x: Tensor) -> None:
        """Inputs (..., K)."""
        assert self.gram is not None, "no inputs are taken after the factor is made"
        q, scale = quantize_rows(x)
        x = (q * scale).flatten(0, -2)
        self.gram.addmm_(x.T, x)

    def factor(self) -> None:
        """Make of H the order of columns and its factor L + I. QuantizationError for inputs that are not finite.

        Columns go by the power of their inputs, so that the largest are rounded first and the rest make up for
        them. Takes a second (K, K) while it works.
        """
        assert self.gram is not None
        self.order = self.gram.diagonal().argsort()  # (K,)
        lower, self.gram = self.gram[self.order[:, None], self.order], None
        diagonal = lower.diagonal()
        diagonal += (DAMPING * diagonal.mean()).clamp_min(TINY)
        if not diagonal.isfinite().all():
            raise QuantizationError(
                "calibration met activations that are not finite", hint="check the model's weights"
            )
        torch.linalg.cholesky(lower, out=lower)
        self.lower = lower.div_(lower.diagonal().clone())  # (K, K)

    def round_int4(self, weight: Tensor, group_size: int, symmetric: bool) -> Int4Codes:
        """As `rounding.round_int4` and on the same grid, for these inputs."""
        parts = []
        for rows in weight.split(ROWS):
            w, K = rows.float(), rows.shape[1]
            m, z, scale = grid(w, group_size, symmetric)
            step, zero = (
                t.T[self.order // group_size]  # (K, N)
                for t in (scale[:, None] * m, z)
            )
            q = self._round(w, step, -zero, 15 - zero)  # (N, K)
            q += z.repeat_interleave(group_size, 1)[:, :K]
            q = F.pad(q, (0, padded(K, group_size) - K))
            q[:, K:] = z[:, -1:]  # what is padded stands for zero
            parts.append(Int4Codes(q.to(torch.uint8), m.to(torch.uint8), z.to(torch.uint8), scale))
        return Int4Codes(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def round_int8(self, weight: Tensor) -> Int8Codes:
        """As `rounding.round_int8` and on the same grid, for these inputs."""
        parts = []
        for rows in weight.split(ROWS):
            w = rows.float()
            scale = int8_scale(w)
            step, limit = scale.clamp_min(TINY).expand(w.shape[1], -1), torch.tensor(127.0)
            q = self._round(w, step, -limit, limit)
            parts.append(Int8Codes((q + 128).to(torch.uint8), scale))
        return Int8Codes(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _round(self, weight: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Whole numbers (N, K) within low..high; step, low and high (K, N) in `order`, or smaller."""
        w = weight.T[self.order]  # (K, N): a column of the weight is one run of memory
        q, error = torch.empty_like(w), torch.empty_like(w)
        low, high = low.expand_as(w), high.expand_as(w)
        for stop in range(len(w), 0, -BLOCK):
            start = max(0, stop - BLOCK)
            inside = self.lower[start:stop, start:stop].T.contiguous()  # (k, j)
            target = torch.addmm(w[start:stop], self.lower[stop:, start:stop].T, error[stop:])
            for i in range(stop - start - 1, -1, -1):
                k = start + i
                torch.addmv(target[i], error[k + 1 : stop].T, inside[i, i + 1 :], out=q[k])
                q[k].div_(step[k]).round_()
                torch.clamp(q[k], low[k], high[k], out=q[k])
                torch.addcmul(w[k], q[k], step[k], value=-1, out=error[k])
        back = torch.empty_like(weight)
        back[:, self.order] = q.T
        return back
