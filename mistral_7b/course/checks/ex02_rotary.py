"""The angles, near and far, and the rotation of neighbouring pairs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mistral_7b.course.compare import expect, same
from mistral_7b.course.setting import SMALL, numbers


def check(ex: Any) -> None:
    args = dataclasses.replace(SMALL, head_dim=8, rope_theta=100.0)
    p, i = torch.tensor([0.0, 1, 2, 7, 30], dtype=torch.float64), torch.arange(4, dtype=torch.float64)

    def angles(frequency: torch.Tensor) -> torch.Tensor:
        return p[:, None, None] * frequency

    right = angles(100.0 ** (-2 * i / 8))
    wrong_angles = {
        "the exponent is -2i/K for pair i = 0 .. K/2 - 1, here it is -i/K": angles(100.0 ** (-i / 8)),
        "the exponent is negative: theta^(-2i/K), so that later pairs turn more slowly": angles(
            100.0 ** (2 * i / 8)
        ),
        "there is one angle for each of the K/2 pairs": angles(100.0 ** (-torch.arange(8) / 8)),
        "theta is args.rope_theta, not always 10000": angles(10_000.0 ** (-2 * i / 8)),
        "the result needs an axis for the heads: (..., 1, K/2)": right[:, 0],
    }
    rope = ex.rope_phases(p.long(), args, torch.float32)
    expect(isinstance(rope, tuple) and len(rope) == 2, "rope_phases returns no pair", "return (cos, sin)")
    swapped = "cos comes first, then sin"
    for name, got, f, other in (("cos", rope[0], torch.cos, torch.sin), ("sin", rope[1], torch.sin, torch.cos)):
        guesses = {why: f(angle).float() for why, angle in wrong_angles.items()}
        guesses[swapped] = other(right).float()
        guesses["convert cos and sin to float32, or to `dtype` if that is wider"] = f(right)
        same(got, f(right).float(), f"{name} of rope_phases", guesses)

    far = torch.tensor([32767])
    exact = 32767 * 100.0 ** (-2 * i / 8)
    rough = {}
    for dtype in (torch.float32, torch.bfloat16):
        frequency = 100.0 ** (-torch.arange(0, 8, 2, dtype=dtype) / 8)
        rough[dtype] = (far[:, None, None].to(dtype) * frequency).float()
    for dtype in (torch.float32, torch.bfloat16):
        got = ex.rope_phases(far, args, dtype)
        rounded = exact.cos().bfloat16()[None, None]
        near: dict[str, Tensor | tuple[Tensor, ...]] = {
            "cos is rounded to `dtype`; the result is float32 at least": (rounded, rounded.float()),
            "the angles are computed in bfloat16; use float64": rough[torch.bfloat16].cos(),
            "the angles are computed in float32; use float64": rough[torch.float32].cos(),
        }
        if got[0].dtype == torch.float32 and float((got[0] - exact.cos()).abs().max()) < 0.01:
            near["the angles are computed in float32; use float64"] = got[0]
        same(
            got[0],
            exact.cos().float()[None, None],
            f"with dtype={str(dtype)[6:]}, cos at position 32767",
            near,
            1e-6,
        )

    x = numbers(5, 3, 8)
    cos, sin = right.cos().float(), right.sin().float()
    even, odd = x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, -1)

    def paired(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([a, b], -1).flatten(-2)

    turned = even * cos - odd * sin, even * sin + odd * cos
    guesses = {
        "halves are rotated, element i with i + K/2 (Hugging Face's layout); Mistral rotates neighbours "
        "2i and 2i + 1": (torch.cat([first * cos - second * sin, first * sin + second * cos], -1)),
        "the pairs are rotated, but not put back as neighbours": torch.cat(turned, -1),
        "the rotation turns the other way: check the two signs": paired(
            even * cos + odd * sin, odd * cos - even * sin
        ),
        "both signs are the same": paired(even * cos - odd * sin, even * sin - odd * cos),
    }
    same(ex.rotate(x, (cos, sin)), paired(*turned), "rotate(x, rope)", guesses)
    half = ex.rotate(x.bfloat16(), (cos, sin))
    same(
        half,
        ex.rotate(x.bfloat16().float(), (cos, sin)).bfloat16(),
        "in bfloat16, rotate(x, rope)",
        {"the result is not cast back to x's type": ex.rotate(x.bfloat16().float(), (cos, sin))},
        0,
    )
