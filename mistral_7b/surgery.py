"""The one way in which a model's Linears change: to quantize, adapt or shard them.

The contract of a replacement: `in_features`, `out_features` and `forward`. The model reads nothing else of a
Linear. Order: build on meta, load, shard, quantize, adapt (LoRA), compile.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_linears(
    model: nn.Module,
    build: Callable[[nn.Module, str], nn.Module],
    where: Callable[[str, nn.Module], bool] = lambda name, module: isinstance(module, nn.Linear),
) -> list[str]:
    """Put `build(linear, name)` in the place of every module that `where(name, module)` picks, in place.

    Modules are taken one after another, so that the one replaced can be freed before the next is built. What a
    replacement holds is not searched again. Returns the names of what was replaced, in the model's order.
    """
    replaced = []

    def walk(parent: nn.Module, path: str) -> None:
        for key, child in list(parent.named_children()):
            name = f"{path}.{key}" if path else key
            if where(name, child):
                setattr(parent, key, build(child, name))
                replaced.append(name)
            else:
                walk(child, name)

    walk(model, "")
    return replaced
