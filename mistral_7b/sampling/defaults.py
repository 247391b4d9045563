"""A model's own sampling defaults: those of generation_config.json beside its weights. Imports no torch.

They apply where a user gives no value: below a request's fields and a command's flags, above this package's own.
"""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from typing import Any

from ..errors import SamplingError
from .params import SamplingParams

FILE = "generation_config.json"
FIELDS = {  # its name -> that of SamplingParams
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
RANDOM = ("temperature", "top_k", "top_p", "min_p")  # without effect where do_sample is false


def model_defaults(source: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the fields of SamplingParams that the model in a folder (or weight file) `source` sets.

    Without the file there are none. `"do_sample": false` is temperature 0. What cannot be used is left out, and a
    warning names it.
    """
    if source is None:
        return {}
    path = pathlib.Path(source)
    path = (path if path.is_dir() else path.parent) / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
        return {}
    if not isinstance(data, dict):
        warnings.warn(f"{path} is ignored: it is not a JSON object", stacklevel=2)
        return {}
    out: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if (value := data.get(name)) is None:
            continue
        try:
            SamplingParams(**{field: value})
        except SamplingError as error:
            warnings.warn(f"{path}: {name!r} is ignored: {error}", stacklevel=2)
        else:
            out[field] = value
    sample = data.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        warnings.warn(f"{path}: 'do_sample' is ignored: it must be true or false, not {sample!r}", stacklevel=2)
    if sample is False:
        out = {"temperature": 0.0, **{name: value for name, value in out.items() if name not in RANDOM}}
    return out
