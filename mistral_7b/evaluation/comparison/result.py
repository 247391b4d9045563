"""What a comparison found, as data and as text."""

from __future__ import annotations

import dataclasses
from typing import Any

from .figures import DELTA_PERCENTILES, KLD_PERCENTILES
from .streaming import Place
from .tensors import Difference

NOISE, FAULT = "noise", "fault"


@dataclasses.dataclass(frozen=True)
class Cause:
    """A mistake in B, and the mean KLD before and after it was undone, with those before it in the list.

    proved   whether the distance fell, and what remains once all causes are undone is noise
    """

    cause: str
    module: str
    text: str
    modules: tuple[str, ...]
    before: float
    after: float
    proved: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """The distance of B from A, and its verdict.

    figures       those of llama.cpp's perplexity tool, by its names (figures.py)
    expected_kld  mean KLD of A from itself with random errors of the size of B's rounding; of a fault, of that
                  which remains after undoing it
    rounding      the largest error of a tensor relative to the tensor, and its bound
    causes        proved or suspected, in the order in which they were undone
    unexplained   tensors that differ by more than rounding, and no cause explains
    growth        error of B's hidden states relative to A's, after each half of each layer
    """

    a: str
    b: str
    formats: tuple[str, str]
    text: str
    figures: dict[str, Any]
    verdict: str
    expected_kld: float
    rounding: Difference
    causes: tuple[Cause, ...] = ()
    unexplained: tuple[Difference, ...] = ()
    growth: tuple[Place, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kld(self) -> float:
        """The mean KLD, nats per token."""
        return float(self.figures["Mean KLD"])

    @property
    def parts_at(self) -> str | None:
        """The first module that is at fault; None for noise."""
        modules = [c.module for c in self.causes] + [d.module for d in self.unexplained]
        return min(modules, key=_position, default=self._steepest() if self.verdict == FAULT else None)

    def _steepest(self) -> str | None:
        """Where the error grows most, for a fault that no tensor or setting shows."""
        steps = zip((Place("", 0.0), *self.growth), self.growth, strict=False)
        return max(steps, key=lambda step: step[1].error - step[0].error)[1].module if self.growth else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        out = dataclasses.asdict(self)
        out["growth"] = [place._asdict() for place in self.growth]
        return out | {"parts_at": self.parts_at}


def _position(module: str) -> tuple[int, int, int]:
    """The order of the forward pass."""
    order = (
        "attention_norm", "attention", "wq", "wk", "wv", "wo", "ffn_norm", "feed_forward", "w1", "w3", "w2",
    )  # fmt: skip
    parts = module.split(".")
    if parts[0] != "layers":
        rank = {"tokenizer": -3, "chat template": -2, "tok_embeddings": -1, "engine": 0}
        return (rank.get(parts[0], 1 << 20), 0, int(parts[0] == "output"))
    return (1, int(parts[1]), order.index(parts[-1]))


def lines(result: Result) -> list[str]:
    """Return the result as text: llama.cpp's figures, the verdict, and the causes."""
    return [*_figures(result), "", *_verdict(result)]


def _figures(result: Result) -> list[str]:
    f, error = result.figures, "±"

    def line(name: str, unit: str = "", shown: str | None = None, digits: int = 6) -> str:
        text = f"{shown or name:<32}: {f[name]:12.{digits}f}"
        mean = f.get(f"{name} {error}")
        return text + (f" ± {mean:10.{digits}f}" if mean is not None else "") + unit

    perplexity = [
        line(name, "%" if "Cor" in name else "")
        for name in (
            "Mean PPL(Q)", "Mean PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean ln(PPL(Q)/PPL(base))",
            "Mean PPL(Q)/PPL(base)", "Mean PPL(Q)-PPL(base)",
        )
    ]  # fmt: skip
    return [
        f"base: {result.a} ({result.formats[0]}); Q: {result.b} ({result.formats[1]})",
        f"{f['tokens']:,} tokens of {result.text}",
        "",
        "====== Perplexity statistics ======",
        *perplexity,
        "",
        "====== KL divergence statistics ======",
        line("Mean KLD"),
        *(line(name) for name in _names("KLD", KLD_PERCENTILES)),
        "",
        "====== Token probability statistics ======",
        line("Mean Δp", " %", digits=3),
        *(line(name, " %", digits=3) for name in _names("Δp", DELTA_PERCENTILES)),
        line("RMS Δp", " %", digits=3),
        line("Same top p", " %", digits=3),
        line("Same top 5", " %", digits=3),
    ]


def _names(name: str, at: tuple[float, ...]) -> list[str]:
    inner = [f"Median {name}" if p == 50 else f"{p}% {name}" for p in at]
    return [f"Maximum {name}", *inner, f"Minimum {name}"]


def _verdict(result: Result) -> list[str]:
    d = result.rounding
    out = []
    if result.verdict == NOISE:
        out.append("verdict: noise")
        if d.error:
            out.append(
                f"  rounding explains it: the largest error of a tensor is {d.error:.2%} of {d.module} (bound "
                f"{d.bound:.2%});\n  random errors of these sizes give a mean KLD of {result.expected_kld:.3g}"
            )
        else:
            out.append("  the weights are equal, and settings and tokens have the same effect")
    else:
        out.append(f"verdict: fault, from {result.parts_at} on")
        for cause in result.causes:
            state = "proved" if cause.proved else "suspected"
            more = f", and {len(cause.modules) - 1} more" if len(cause.modules) > 1 else ""
            out.append(f"  {cause.cause} ({state}): {cause.text}")
            out.append(
                f"    in {cause.module}{more}; undone, the mean KLD falls {cause.before:.3g} -> {cause.after:.3g}"
            )
        for d in result.unexplained[:5]:
            out.append(
                f"  unexplained: {d.module} differs by {d.error:.2%}, and rounding by at most {d.bound:.2%}"
            )
        if len(result.unexplained) > 5:
            out.append(f"  unexplained: {len(result.unexplained) - 5} more tensors")
        if not result.causes and not result.unexplained:
            out.append(
                f"  no tensor differs by more than rounding, but random errors of these sizes give a mean KLD of "
                f"{result.expected_kld:.3g}"
            )
    return [*out, *(f"note: {note}" for note in result.notes)]
