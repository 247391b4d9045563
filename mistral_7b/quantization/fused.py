"""The other parts of a block through the kernels: the model's own modules, computed in fewer passes over memory.

Each takes the place of a module of model.py and keeps its parameters and children, by the same names; only
`forward` is another. Quantised models use them: once its products are fast, this would be half of a step.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..cache import Memory
from ..kernels.elementwise import rms_norm, rotate, silu_mul
from ..model import Attention, FeedForward, RMSNorm, Rope


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one pass."""

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        return rms_norm(x, self.weight, self.eps)


class FusedAttention(Attention):
    """Attention whose queries and keys are rotated in one pass."""

    def forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # x: (..., D)
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        out = memory.attend(rotate(q, *rope), rotate(k, *rope), v)  # (..., H, K)
        return self.wo(out.flatten(-2))  # (..., D)


class FusedFeedForward(FeedForward):
    """SwiGLU whose gate is applied in one pass."""

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        return self.w2(silu_mul(self.w1(x), self.w3(x)))


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FusedRMSNorm,
    Attention: FusedAttention,
    FeedForward: FusedFeedForward,
}


def fuse(model: nn.Module) -> None:
    """Let every norm, attention and feed-forward of a model or block run through the kernels, in place.

    The kernels know no gradients: for inference alone.
    """
    for module in model.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
    model.requires_grad_(False)
