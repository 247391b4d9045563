"""LoRA adapters of llama.cpp: GGUF files of `general.type` "adapter".

    blk.N.attn_q.weight.lora_a (r, K), .lora_b (N, r)      scale adapter.lora.alpha / r

Rows of q and k are in Mistral's order, as in every GGUF file.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checkpoint.config import is_positive
from ..checkpoint.gguf import file as gguf_file
from ..checkpoint.gguf import reading, writing
from ..checkpoint.stored import StoredTensor
from ..errors import CheckpointError

TYPE, KIND, ALPHA = "general.type", "adapter.type", "adapter.lora.alpha"


def write(path: pathlib.Path, tensors: Mapping[str, Tensor], alpha: float, name: str) -> None:
    """Write factors by GGUF's names (`blk.0.attn_q.weight.lora_a`) to the file `path`, as llama.cpp does."""
    metadata = {
        "general.architecture": reading.ARCHITECTURES[0], TYPE: "adapter", KIND: "lora", "general.name": name,
        ALPHA: float(alpha),
    }  # fmt: skip
    writing.write_floats(path, metadata, tensors)


def is_adapter(path: pathlib.Path) -> bool:
    """Return whether a file is an adapter in GGUF."""
    try:
        return gguf_file.is_gguf(path) and gguf_file.read(path).metadata.get(TYPE) == "adapter"
    except CheckpointError:
        return False


def read(path: pathlib.Path) -> tuple[dict[str, StoredTensor], float]:
    """Return the tensors of an adapter by GGUF's names, and its alpha (0: the scale is 1).

    Raises CheckpointError if the file is not a LoRA adapter of the architecture `llama`.
    """
    contents = gguf_file.read(path)
    metadata = contents.metadata
    architecture = metadata.get("general.architecture")
    for key, value, wanted in (
        (TYPE, metadata.get(TYPE), ("adapter",)),
        (KIND, metadata.get(KIND), ("lora",)),
        ("general.architecture", architecture, reading.ARCHITECTURES),
    ):
        if value not in wanted:
            raise CheckpointError(
                f"{key!r} is {value!r}; a LoRA adapter of Mistral 7B has {wanted[0]!r}",
                field=key,
                place=path,
                hint="a model is named as the MODEL, not as its adapter" if key == TYPE else None,
            )
    alpha: Any = metadata.get(ALPHA)
    if not is_positive(alpha) and alpha != 0:
        raise CheckpointError(f"{ALPHA!r} is {alpha!r}, not a number", field=ALPHA, place=path)
    return reading.stored_tensors(contents), float(alpha)
