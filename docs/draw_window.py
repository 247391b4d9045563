"""Draw docs/window.png from the package's own rule and its own ring: `python docs/draw_window.py`."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from mistral_7b.attention import visible
from mistral_7b.cache.rolling import EMPTY, RollingCache

T, W, FED = 10, 4, 10
BLUE, ORANGE, PALE = "#1f4e8c", "#d9541e", "#eef2f7"


def draw_mask(axes) -> None:
    """Left: which keys each query sees."""
    p = torch.arange(T)
    mask = visible(p, p, W)
    for i in range(T):
        for j in range(T):
            face = (ORANGE if i == j else BLUE) if mask[i, j] else PALE
            axes.add_patch(_cell(j, i, face))
    axes.set_title(f"a query sees itself and the {W - 1} keys before it (W = {W})", fontsize=10)
    axes.set(xlabel="key position", ylabel="query position")


def draw_ring(axes) -> None:
    """Right: which position each slot of the ring holds after each token, read from a real cache."""
    cache = RollingCache(1, 1, 2, W, dtype=torch.float32)
    one = torch.zeros(1, 1, 1, 2)
    for i in range(FED):
        cache.extend(torch.zeros(1, 1, dtype=torch.long))
        cache.layers[0].attend(one, one, one)
        for slot, position in enumerate(cache.positions[0].tolist()):
            newest = position == i
            axes.add_patch(_cell(slot, i, PALE if position == EMPTY else ORANGE if newest else BLUE))
            if position != EMPTY:
                axes.text(slot, i, str(position), ha="center", va="center", color="white", fontsize=8)
    axes.set_title("the ring: slot = p mod W", fontsize=10)
    axes.set(xlabel="slot", ylabel="after token")
    axes.set_xticks(range(W))


def _cell(x: int, y: int, face: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=face, linewidth=0)


def main() -> None:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[T, W + 2])
    draw_mask(left)
    draw_ring(right)
    for axes, width in ((left, T), (right, W)):
        axes.set(xlim=(-0.6, width - 0.4), ylim=(T - 0.4, -0.6), aspect="equal")
        axes.set_yticks(range(T))
        axes.tick_params(length=0, labelsize=8)
        for side in axes.spines.values():
            side.set_visible(False)
    left.set_xticks(range(T))
    figure.savefig(Path(__file__).with_name("window.png"), dpi=110)


if __name__ == "__main__":
    main()
