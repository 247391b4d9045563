"""The trained weights of a model: float32 masters, their gradients, and the optimizers.

A master accumulates updates below the resolution of bfloat16. A weight that is float32 itself, as LoRA's factors
are, is its own master.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Mistral7B, ModelArgs
from .states import read_state, save_state


class Weights:
    """Trained parameters, keyed by name, with their masters; `optimize` sets the optimizers."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names = list(parameters)
        self.weights = list(parameters.values())
        own = [self.own(p.detach()) for p in self.weights]
        self.masters = [t if t.dtype == torch.float32 else t.float() for t in own]
        self.optimizers: list[torch.optim.Optimizer] = []
        self.peaks: list[float] = []  # each optimizer's peak learning rate

    def own(self, tensor: Tensor) -> Tensor:
        """The part of a weight or gradient that this process trains: all of it."""
        return tensor

    def optimize(self, *optimizers: torch.optim.Optimizer) -> None:
        """Take the optimizers of the masters, each with its peak rate as `lr`."""
        self.optimizers = list(optimizers)
        self.peaks = [float(o.defaults["lr"]) for o in optimizers]

    def collect(self, clip: float) -> Tensor:
        """Move the gradients of the weights to the masters, clip them, and return their norm before."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else self.own(weight.grad).float()
            weight.grad = None
        return self.clip(clip)

    def clip(self, most: float) -> Tensor:
        """Clip the masters' gradients to a norm of `most`, and return their norm before."""
        return torch.nn.utils.clip_grad_norm_(self.masters, most)

    def update(self, share: float) -> None:
        """Run the optimizers with `share` of their peak rates, and round the masters into the weights."""
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's weights."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            if weight.dtype != torch.float32:  # else it is its master
                self.own(weight).copy_(master)

    def state(self) -> dict[str, Any]:
        return {"masters": self.masters, "optimizers": [o.state_dict() for o in self.optimizers]}

    def save(self, run: Mapping[str, Any], path: Path, keep: int) -> None:
        """Write the state with what `run` says of the run, atomically; see `save_state`."""
        save_state({**run, **self.state()}, path, self.nbytes(), keep)

    def read(self, path: Path, device: torch.device | str) -> dict[str, Any] | None:
        """Return what `save` wrote, for `load_state`, with what it says of the run; None if there is nothing."""
        return read_state(path, device)

    def whole(self, model: Mistral7B, shape: ModelArgs) -> Mistral7B | None:
        """Return the model with all weights, to be saved; None on a process that does not save it."""
        return model

    def nbytes(self) -> int:
        """The bytes of the tensors in `state`."""
        kept = [value for o in self.optimizers for held in o.state.values() for value in held.values()]
        return sum(t.nbytes for t in [*self.masters, *kept] if isinstance(t, Tensor))

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        for mine, theirs in zip(self.masters, state["masters"], strict=True):
            mine.copy_(theirs)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.publish()


def adamw(
    masters: Sequence[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel for all these masters; vectors, which are norms, do not decay."""
    groups = [
        {"params": [m for m in masters if m.dim() == 2], "weight_decay": weight_decay},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
