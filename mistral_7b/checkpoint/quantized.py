"""Quantized checkpoints: memory-mapped tensors of the modules in quantization/linear.py.

    quantized.safetensors   layers.0.attention.wq.codes, .d, ..., tok_embeddings.codes, .scale, norm.weight
    config.json             Hugging Face's fields; `quantization_config` holds the scheme and the measured loss

Names and row order are Mistral's. The tiles have the layout used in memory, on every machine, so that loading is
mapping, without packing or copying. The file is not called model.safetensors, because transformers 5 only warns
about an unknown quantization method and then initializes all weights with unknown names at random.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CheckpointError, QuantizationError
from ..kernels.cpu import huge_pages
from ..model import Mistral7B, ModelArgs
from ..quantization.schemes import KINDS, Scheme, empty_model
from . import config
from .packing import QUANT_METHOD
from .stored import StoredTensor

FORMAT, WEIGHTS = 2, "quantized.safetensors"
DISTANCE_FIELDS = (
    "kl",
    "top1_agreement",
    "perplexity_original",
    "perplexity",
    "tokens",
)  # numbers, and "text" a name
DISTANCE_HINT = (
    "pass distance={'kl', 'top1_agreement', 'perplexity_original', 'perplexity', 'tokens', 'text'} as measured "
    "against the original on a text; `mistral-7b quantize` measures it while writing"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """The `quantization_config` of a checkpoint. QuantizationError for an incomplete distance.

    distance      from the original on a text: kl (nats per token), top1_agreement (0..1), perplexity_original,
                  perplexity, tokens (number predicted), text (its name)
    calibration   how rounding was calibrated; None: round to nearest
    nbytes        of all tensors
    """

    scheme: Scheme
    distance: Mapping[str, Any]
    nbytes: int
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in DISTANCE_FIELDS:
            value = self.distance.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise QuantizationError(
                    f"{name!r} of the distance is {value!r}, not a finite number", field=name, hint=DISTANCE_HINT
                )
        if not isinstance(self.distance.get("text"), str):
            raise QuantizationError("the distance does not name its 'text'", field="text", hint=DISTANCE_HINT)

    def config(self) -> dict[str, Any]:
        """Return the content of `quantization_config`."""
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "scheme": self.scheme.name,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "distance": dict(self.distance),
            "bytes": self.nbytes,
        }


def read_record(path: str | os.PathLike[str]) -> Record | None:
    """Return the record in a folder's (or file's folder's) config.json; None for other methods."""
    path = pathlib.Path(path)
    path = (path if path.is_dir() else path.parent) / "config.json"
    if not path.is_file():
        return None
    stored_config = config.read_json(path).get("quantization_config")
    if not isinstance(stored_config, dict) or stored_config.get("quant_method") != QUANT_METHOD:
        return None
    found = stored_config.get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"quantized in format {found!r}, but this release reads format {FORMAT}",
            field="quantization_config.format",
            place=path,
            hint=_remake(stored_config) if found == 1 else "install a newer release",
        )
    for field, kind in {"scheme": str, "distance": dict, "bytes": int}.items():
        if not isinstance(stored_config.get(field), kind):
            raise CheckpointError(
                f"'quantization_config.{field}' is {stored_config.get(field)!r}, not of type {kind.__name__}",
                field=f"quantization_config.{field}",
                place=path,
            )
    name, calibration = stored_config["scheme"], stored_config.get("calibration")
    if name not in KINDS or not isinstance(calibration, dict | None):
        raise CheckpointError(
            "'quantization_config' has an invalid scheme or calibration",
            field="quantization_config",
            place=path,
        )
    try:
        return Record(Scheme(name), stored_config["distance"], stored_config["bytes"], calibration)
    except QuantizationError as e:
        raise CheckpointError.of(e, place=path) from e


def _remake(stored_config: dict[str, Any]) -> str:
    """The command that remakes a folder of format 1."""
    scheme = "int8" if stored_config.get("scheme") == "int8" else "int4"
    return f"quantize the original again: mistral-7b quantize ORIGINAL OUT --scheme {scheme}"


def check_scheme(path: pathlib.Path, record: Record, requested: str | Scheme | None) -> None:
    """Raise QuantizationError if `requested` differs from the scheme of the folder."""
    if requested is None or requested in (record.scheme.name, record.scheme):
        return
    raise QuantizationError(
        f"is already quantized as {record.scheme}, not as {requested}",
        field="quantization",
        place=path,
        hint="omit `quantization`, or quantize the original checkpoint",
    )


def build(
    path: pathlib.Path,
    args: ModelArgs,
    scheme: Scheme,
    raw: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    mmap: bool,
) -> Mistral7B:
    """Build the CPU model from `raw`, mapped or copied. CheckpointError on a mismatch."""
    model = empty_model(args, scheme, dtype)
    wanted = model.state_dict()
    weights = {}
    for name, like in wanted.items():
        if name not in raw:
            raise CheckpointError(f"tensor {name!r} is missing", field=name, place=path)
        stored = raw[name]
        if stored.shape != tuple(like.shape):
            raise stored.fault(f"has shape {stored.shape}; the configuration requires {tuple(like.shape)}")
        norm = name.endswith(".weight")  # norms are the only tensors of the model's dtype
        if stored.dtype != like.dtype and not (norm and stored.dtype.is_floating_point):
            raise stored.fault(f"has type {stored.dtype}, not {like.dtype}")
        weights[name] = stored.view().to(like.dtype)
        if not mmap:  # one tensor at a time, so that the model is never held twice
            weights[name] = huge_pages.copied(weights[name])
            stored.release()
    if unknown := [name for name in raw if name not in wanted]:
        raise raw[unknown[0]].fault(f"is not part of a model quantized as {scheme}")
    model.load_state_dict(weights, assign=True)
    return model
