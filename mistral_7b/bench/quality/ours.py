"""This package's models for the comparison: in float32, and quantized as they run.

R rows · T tokens · V vocabulary
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import read_record
from ...checkpoint.gguf.reading import StoredBlocks
from ...checkpoint.names import EMBEDDING, OUTPUT
from ...checkpoint.reading import Checkpoint, open_checkpoint
from ...model import Mistral7B
from ...quantization.linear import Compressed
from ...quantization.schemes import Scheme


def float_model(checkpoint: Checkpoint) -> Mistral7B:
    """Return the model in float32, without the quantized products of a GGUF file's own blocks."""
    model = Mistral7B(checkpoint.args, dtype=torch.float32, device="meta")
    weights = {name: checkpoint.read(name, torch.float32) for name in checkpoint.tensors}
    model.load_state_dict({OUTPUT: weights[EMBEDDING], **weights}, assign=True)
    return model


def quantized_model(source: str, scheme: str | pathlib.Path) -> Mistral7B:
    """Return the model `source` in a scheme, or that of a quantized folder or GGUF file; the rest is float32."""
    if isinstance(scheme, pathlib.Path):
        return Mistral7B.from_pretrained(scheme, dtype=torch.float32)
    return Mistral7B.from_pretrained(source, dtype=torch.float32, quantization=scheme)


@torch.inference_mode()
def logits(model: Mistral7B, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the logits (T, V) of each row of tokens (R, T)."""
    for row in tokens:
        yield model(row[None])[0][0]


def own_type(checkpoint: Checkpoint) -> str:
    """Return the type of most of the stored matrices: such as Q4_1 of a GGUF file, or bfloat16."""
    matrices = [t for t in checkpoint.tensors.values() if len(t.shape) == 2]
    kinds = [t.kind.name if isinstance(t, StoredBlocks) else str(t.dtype).removeprefix("torch.") for t in matrices]
    return Counter(kinds).most_common(1)[0][0]


def bits_per_weight(model: Mistral7B) -> float:
    """Return the bits of a weight of the layers and the output, scales and padding included."""
    size = weights = 0
    for module in model.modules():
        if isinstance(module, (Compressed, nn.Linear)):
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            size += sum(t.nbytes for t in tensors)
            weights += module.in_features * module.out_features
    return 8 * size / weights


def described(scheme: str | pathlib.Path) -> dict[str, Any]:
    """Return the record's fields `scheme`, `calibration` and `file` for a scheme, a folder or a GGUF file."""
    if isinstance(scheme, str):
        return {"scheme": str(Scheme(scheme))}
    if (record := read_record(scheme)) is None:
        return {"scheme": own_type(open_checkpoint(scheme)), "file": scheme.name}
    calibration = None if record.calibration is None else dict(record.calibration)
    if calibration and isinstance(text := calibration.get("text"), str):
        calibration["text"] = pathlib.Path(text).name  # records name no folders of this machine
    return {"scheme": str(record.scheme), "calibration": calibration, "file": scheme.name}
