"""Rotary embeddings stretched to contexts longer than those of training: the `rope_scaling` of fine-tunes.

    linear   every frequency is divided by the factor s: positions are interpolated (arXiv:2306.15595)
    yarn     frequencies that turn often within the original context L are kept, those that do not complete a
             turn are divided by s, and a ramp over the pairs i joins the two; cos and sin are multiplied by
             0.1 ln(s) + 1 (arXiv:2309.00071)

Both depend on positions alone, so every cache and chunking gives the logits of the uncached forward.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import torch
from torch import Tensor

from .errors import ConfigError

KINDS = ("linear", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are scaled. Raises ConfigError, naming the field, if it cannot be."""

    type: str  # one of KINDS
    factor: float  # s, at least 1
    original_max_seq_len: int | None = None  # L; yarn only
    attention_factor: float | None = None  # of cos and sin, yarn only; None: 0.1 ln(s) + 1
    beta_fast: float = 32.0  # turns within L from which a frequency is kept
    beta_slow: float = 1.0  # turns within L up to which it is divided by s
    truncate: bool = True  # round the ends of the ramp to whole pairs

    def __post_init__(self) -> None:
        def require(good: bool, field: str, wanted: str) -> None:
            if not good:
                value = getattr(self, field)
                raise ConfigError(f"RopeScaling.{field} must be {wanted}, not {value!r}", field=field)

        require(self.type in KINDS, "type", " or ".join(map(repr, KINDS)))
        require(_number(self.factor) and self.factor >= 1, "factor", "a finite number of at least 1")
        if self.type == "linear":
            for field in dataclasses.fields(self)[2:]:
                require(getattr(self, field.name) == field.default, field.name, "left out of linear scaling")
            return
        length, gain = self.original_max_seq_len, self.attention_factor
        whole = isinstance(length, int) and not isinstance(length, bool) and length >= 1
        require(whole, "original_max_seq_len", "a whole number of at least 1")
        require(
            gain is None or (_number(gain) and gain > 0), "attention_factor", "a finite number above 0, or None"
        )
        require(_number(self.beta_slow) and self.beta_slow > 0, "beta_slow", "a finite number above 0")
        fast = _number(self.beta_fast) and self.beta_fast >= self.beta_slow
        require(fast, "beta_fast", f"a finite number of at least beta_slow ({self.beta_slow})")
        require(isinstance(self.truncate, bool), "truncate", "true or false")

    @property
    def gain(self) -> float:
        """The factor of cos and sin; attention scores are multiplied by its square."""
        return default_gain(self) if self.attention_factor is None else self.attention_factor

    def apply(self, frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        """Return the scaled frequencies of theta^(-2i/K), (K/2,), and the gain."""
        if self.original_max_seq_len is None:
            return frequency / self.factor, 1.0
        if theta <= 1:
            raise ConfigError(f"ModelArgs.rope_theta must exceed 1 for yarn, not {theta!r}", field="rope_theta")
        pairs = len(frequency)
        # The pair that completes so many turns within L tokens: L theta^(-i / pairs) = 2 pi turns
        low, high = (
            pairs * math.log(self.original_max_seq_len / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        width = high - low or 0.001
        pair = torch.arange(pairs, dtype=frequency.dtype, device=frequency.device)
        ramp = ((pair - low) / width).clamp(0, 1)  # 0: kept, 1: divided by s
        return frequency * (1 - ramp) + frequency / self.factor * ramp, self.gain


def default_gain(scaling: RopeScaling) -> float:
    """The gain of a scaling that does not state one: that of the paper for yarn, 1 for linear."""
    return 1.0 if scaling.type == "linear" else mscale(scaling.factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's gain for a factor, 0.1 w ln(s) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
