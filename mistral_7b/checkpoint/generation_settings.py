"""A model's generation settings, as its files give them. Imports no torch.

folder      generation_config.json beside the weights
GGUF file   the generation_config.json that `convert` keeps in it, and `general.sampling` of llama.cpp
"""

from __future__ import annotations

import os
import pathlib
import warnings
from typing import Any, NamedTuple

from ..errors import CheckpointError
from .gguf import file as gguf_file
from .gguf.tokenizer import KEPT
from .json_files import object_in, read_json
from .tokenizer_files import GENERATION

SAMPLING = {  # general.sampling.NAME of a GGUF file -> its name in generation_config.json
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip


class GenerationSettings(NamedTuple):
    """The fields of a generation_config.json, unchecked, and the file that has them."""

    fields: dict[str, Any]
    place: pathlib.Path | None


def generation_settings(source: str | os.PathLike[str] | None) -> GenerationSettings:
    """Return the settings of a model: its folder, a weight file in it, or a GGUF file.

    A GGUF file's own precede a generation_config.json beside it. A file that cannot be read is left out, and a
    warning says so.
    """
    if source is None:
        return GenerationSettings({}, None)
    path = pathlib.Path(source)
    file = (path if path.is_dir() else path.parent) / GENERATION
    try:
        if path.is_file() and gguf_file.is_gguf(path) and (fields := _of_gguf(path)):
            return GenerationSettings(fields, path)
        return GenerationSettings(read_json(file) if file.is_file() else {}, file)
    except CheckpointError as e:
        warnings.warn(f"{file} is ignored: {e.message}", stacklevel=2)
        return GenerationSettings({}, file)


def _of_gguf(path: pathlib.Path) -> dict[str, Any]:
    """Return the settings in a GGUF file: what was kept, changed by the file's own keys."""
    metadata = gguf_file.read(path).metadata
    own = {
        name: float(f"{value:.7g}") if isinstance(value, float) else value  # float32: 0.6, not 0.60000002
        for key, name in SAMPLING.items()
        if (value := metadata.get(f"general.sampling.{key}")) is not None
    }
    return object_in(metadata.get(KEPT[GENERATION])) | own
