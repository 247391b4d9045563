"""Quantised checkpoints: the very tensors of the modules in quantization/linear.py, where they lie.

    quantized.safetensors   layers.0.attention.wq.codes, .groups, .scale, ..., tok_embeddings.codes, norm.weight
    config.json             Hugging Face's fields, and in `quantization_config` what was done and what it cost

Names and order of rows are Mistral's. The tiles are the same on every machine and in memory, so that opening
is mapping: nothing is packed and nothing copied. The file is not called model.safetensors, because transformers 5
only warns of a method that it does not know, and would then draw at random all weights whose names it misses.
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
from ..quantization.schemes import Scheme, empty_model
from . import config
from .huggingface import OURS
from .stored import Stored

FORMAT, WEIGHTS = 1, "quantized.safetensors"
DISTANCE = ("kl", "top1_agreement", "perplexity_original", "perplexity", "tokens")  # numbers, and "text" a name
HOW = (
    "give distance={'kl', 'top1_agreement', 'perplexity_original', 'perplexity', 'tokens', 'text'} as measured "
    "against the original on a text; `mistral-7b quantize` measures while it writes"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a quantised checkpoint says of itself. QuantizationError if its distance was not measured.

    distance      from the original on a text: kl (nats a token), top1_agreement (0..1), perplexity_original,
                  perplexity, tokens (that were predicted), text (which it was)
    calibration   how the rounding was guided; None: to the nearest
    nbytes        of all tensors
    """

    scheme: Scheme
    distance: Mapping[str, Any]
    nbytes: int
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in DISTANCE:
            value = self.distance.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise QuantizationError(
                    f"the distance's {name!r} is {value!r}, not a measured number", field=name, hint=HOW
                )
        if not isinstance(self.distance.get("text"), str):
            raise QuantizationError("the distance does not name its 'text'", field="text", hint=HOW)

    def config(self) -> dict[str, Any]:
        """The content of `quantization_config`."""
        grouped = self.scheme.name == "int4"
        return {
            "quant_method": OURS,
            "format": FORMAT,
            "scheme": self.scheme.name,
            "group_size": self.scheme.group_size if grouped else None,
            "symmetric": self.scheme.symmetric or not grouped,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "distance": dict(self.distance),
            "bytes": self.nbytes,
        }


def read_record(path: str | os.PathLike[str]) -> Record | None:
    """What a folder's (or the folder's of a file) config.json says of quantisation; None if it is not of ours."""
    path = pathlib.Path(path)
    path = (path if path.is_dir() else path.parent) / "config.json"
    if not path.is_file():
        return None
    said = config.read_json(path).get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != OURS:
        return None
    if said.get("format") != FORMAT:
        raise CheckpointError(
            f"quantised in format {said.get('format')!r} and this release reads {FORMAT}",
            field="quantization_config.format",
            place=path,
            hint="take a newer one",
        )
    kinds = {"scheme": str, "symmetric": bool, "distance": dict, "bytes": int}
    if said.get("scheme") == "int4":
        kinds["group_size"] = int
    for field, kind in kinds.items():
        if not isinstance(said.get(field), kind):
            raise CheckpointError(
                f"'quantization_config.{field}' is {said.get(field)!r}, not of its kind",
                field=f"quantization_config.{field}",
                place=path,
            )
    name, calibration = said["scheme"], said.get("calibration")
    if name not in ("int8", "int4") or not isinstance(calibration, dict | None):
        raise CheckpointError(
            "'quantization_config' has no scheme or calibration that can be read",
            field="quantization_config",
            place=path,
        )
    try:
        scheme = Scheme(name, said["group_size"], said["symmetric"]) if name == "int4" else Scheme(name)
        return Record(scheme, said["distance"], said["bytes"], calibration)
    except QuantizationError as e:
        raise CheckpointError.of(e, place=path) from e


def check_asked(path: pathlib.Path, record: Record, asked: str | Scheme | None) -> None:
    """QuantizationError if another scheme is asked for than the one in which a folder is quantised."""
    if asked is None or asked in (record.scheme.name, record.scheme):
        return
    raise QuantizationError(
        f"is quantised already, as {record.scheme}, and not as {asked}",
        field="quantization",
        place=path,
        hint="leave `quantization` out, or quantise the original anew",
    )


def build(
    path: pathlib.Path,
    args: ModelArgs,
    scheme: Scheme,
    raw: Mapping[str, Stored],
    dtype: torch.dtype,
    mmap: bool,
) -> Mistral7B:
    """On a CPU the model that `raw` holds, mapped or copied. CheckpointError for one that does not fit."""
    model = empty_model(args, scheme, dtype)
    wanted = model.state_dict()
    weights = {}
    for name, like in wanted.items():
        if name not in raw:
            raise CheckpointError(f"tensor {name!r} is missing", field=name, place=path)
        stored = raw[name]
        if stored.shape != tuple(like.shape):
            raise stored.fault(f"is of shape {stored.shape}; its configuration says {tuple(like.shape)}")
        norm = name.endswith(".weight")  # the only tensors whose type is the model's
        if stored.dtype != like.dtype and not (norm and stored.dtype.is_floating_point):
            raise stored.fault(f"is of type {stored.dtype}, not {like.dtype}")
        weights[name] = stored.view().to(like.dtype)
        if not mmap:  # a tensor at a time, so that none is held twice
            weights[name] = huge_pages.copied(weights[name])
            stored.release()
    if unknown := [name for name in raw if name not in wanted]:
        raise raw[unknown[0]].fault(f"is unknown: {scheme} has none such")
    model.load_state_dict(weights, assign=True)
    return model
