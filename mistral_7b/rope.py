"""Rotary embeddings stretched to contexts longer than those of training: the `rope_scaling` of fine-tunes.

    linear   every frequency is divided by the factor s: positions are interpolated (arXiv:2306.15595)
    yarn     frequencies that turn often within the original context L are kept, those that do not complete a
             turn are divided by s, and a ramp over the pairs i joins the two; cos and sin are multiplied by
             0.1 ln(s) + 1 (arXiv:2309.00071)
    dynamic  theta is multiplied by (s T / L - s + 1)^(K / (K - 2)), where a model for L tokens is used up to T

All depend on positions alone, so every cache and chunking gives the logits of the uncached forward. Elsewhere the
T of `dynamic` is the length of the sequence so far. Here it is the model's context, because cached keys cannot be
rotated again when the sequence grows.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import torch
from torch import Tensor

from .errors import ConfigError

KINDS = ("linear", "yarn", "dynamic")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are scaled. Raises ConfigError, naming the field, if it cannot be."""

    type: str  # one of KINDS
    factor: float  # s, at least 1
    original_max_seq_len: int | None = None  # L; not of linear
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
        unused = {"linear": dataclasses.fields(self)[2:], "dynamic": dataclasses.fields(self)[3:], "yarn": ()}
        for field in unused[self.type]:
            default = getattr(self, field.name) == field.default
            require(default, field.name, f"left out of {self.type} scaling")
        length, gain = self.original_max_seq_len, self.attention_factor
        whole = isinstance(length, int) and not isinstance(length, bool) and length >= 1
        require(whole or self.type == "linear", "original_max_seq_len", "a whole number of at least 1")
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

    def theta(self, theta: float, head_dim: int, max_seq_len: int) -> float:
        """Return the theta of a model with this scaling: another one for dynamic only."""
        if self.type != "dynamic" or self.original_max_seq_len is None:
            return theta
        if head_dim <= 2:
            raise ConfigError(
                f"ModelArgs.head_dim must exceed 2 for dynamic scaling, not {head_dim}", field="head_dim"
            )
        stretch = max(max_seq_len / self.original_max_seq_len, 1.0)
        return float(theta * (self.factor * stretch - self.factor + 1) ** (head_dim / (head_dim - 2)))

    def apply(self, frequency: Tensor, theta: float, max_seq_len: int) -> tuple[Tensor, float]:
        """Return the scaled frequencies of theta^(-2i/K), (K/2,), and the gain, for a context of `max_seq_len`."""
        if self.type == "dynamic":
            pairs = len(frequency)
            stretch = self.theta(theta, 2 * pairs, max_seq_len) / theta
            pair = torch.arange(pairs, dtype=frequency.dtype, device=frequency.device)
            return frequency * stretch ** (-pair / pairs), 1.0
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
    """The gain of a scaling that does not state one: that of the paper for yarn, else 1."""
    return mscale(scaling.factor) if scaling.type == "yarn" else 1.0


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's gain for a factor, 0.1 w ln(s) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
