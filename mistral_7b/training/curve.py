"""Plot the loss curve of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write


def draw_curve(log: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot loss, its running mean and the held-out results; return False without matplotlib.

    Raises WriteError if the image cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    import numpy as np

    steps = np.array([r["step"] for r in log])
    loss = np.array([r["loss"] for r in log])
    width = max(1, len(loss) // 50)
    mean = np.convolve(loss, np.ones(width) / width, mode="valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, loss, color="#c9d4e3", linewidth=0.8, label="loss of each update")
    axes.plot(steps[width - 1 :], mean, color="#1f4e8c", linewidth=1.8, label=f"mean of the last {width}")
    axes.set(xlabel="update", ylabel="cross-entropy (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    lines = list(axes.get_lines())
    if measured := [(r["step"], r["held_out_bits_per_byte"]) for r in log if "held_out_bits_per_byte" in r]:
        other = axes.twinx()
        lines += other.plot(*zip(*measured, strict=True), "o-", color="#d9541e", label="held-out bits per byte")
        other.set(ylabel="bits per byte", ylim=(0, None))
        other.annotate(
            f"{measured[-1][1]:.3f}", measured[-1], textcoords="offset points", xytext=(-4, 8), ha="right"
        )
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right", frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True
