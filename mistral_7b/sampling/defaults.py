"""A model's own sampling defaults, from the fields of its generation_config.json. Imports no torch.

They apply where a user gives no value: below a request's fields and a command's flags, above this package's own.
"""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import SamplingError
from .params import SamplingParams

FIELDS = {  # its name -> that of SamplingParams
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
RANDOM = ("temperature", "top_k", "top_p", "min_p")  # without effect where do_sample is false


def sampling_defaults(settings: Mapping[str, Any], place: pathlib.Path | None) -> dict[str, Any]:
    """Return the fields of SamplingParams that the generation settings of a model, read from `place`, set.

    `"do_sample": false` is temperature 0. What cannot be used is left out, and a warning names it.
    """
    out: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if (value := settings.get(name)) is None:
            continue
        try:
            SamplingParams(**{field: value})
        except SamplingError as error:
            warnings.warn(f"{place}: {name!r} is ignored: {error}", stacklevel=2)
        else:
            out[field] = value
    sample = settings.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        warnings.warn(f"{place}: 'do_sample' is ignored: it must be true or false, not {sample!r}", stacklevel=2)
    if sample is False:
        out = {"temperature": 0.0, **{name: value for name, value in out.items() if name not in RANDOM}}
    return out
