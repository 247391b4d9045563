"""A scaled rotary embedding in config.json and in GGUF's keys, read and written.

    config.json   rope_scaling (transformers 4) or rope_parameters (transformers 5): rope_type, factor, ...
    GGUF          llama.rope.scaling.type, .factor, .original_context_length, .attn_factor, .yarn_beta_fast, ...
    params.json   has no field for it

Of `dynamic` scaling, GGUF and params.json get the theta. llama.cpp multiplies `attn_factor` by 0.1 ln(factor) + 1;
`attention_factor` of transformers replaces that.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..model import ModelArgs
from ..rope import RopeScaling, default_gain, mscale
from .config import INSTEAD, check_supported, consistent_value, is_positive

PLACES = ("rope_parameters", "rope_scaling")
LENGTH = "original_max_position_embeddings"
OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "truncate")  # the same names here and in config.json
KNOWN = {"type", "rope_type", "rope_theta", "factor", "partial_rotary_factor"}
KNOWN_OF = {
    "default": KNOWN,
    "linear": KNOWN,
    "dynamic": KNOWN | {LENGTH},
    "yarn": KNOWN | {LENGTH, *OPTIONS, "mscale", "mscale_all_dim", "finetuned"},
}
OTHERS = {"llama3": ", as in Llama 3.1 and later", "longrope": ", as in Phi-3", "su": ", as in Phi-3"}


def read_config(path: pathlib.Path, data: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Return the theta (None if missing) and the scaling of a config.json."""
    thetas, found = {"rope_theta": data.get("rope_theta")}, {}
    for place in PLACES:
        rope = data.get(place)
        if rope is None:
            continue
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise CheckpointError(
                f"{place!r} is not one rotary embedding for all layers, as Mistral 7B has", field=place, place=path
            )
        thetas[f"{place}.rope_theta"] = rope.get("rope_theta")
        found[place] = _scaling(path, place, rope, data.get("max_position_embeddings"))
    if len(set(found.values())) > 1:
        raise CheckpointError(
            "'rope_parameters' and 'rope_scaling' set different rotary embeddings",
            field="rope_scaling",
            place=path,
            hint="correct or remove one",
        )
    scaling = next(iter(found.values()), None)
    if scaling is not None and scaling.type == "dynamic":
        warnings.warn(
            f"{path}: the rotary embedding is of type 'dynamic', whose angles change in transformers as a "
            "sequence grows. Those for 'max_position_embeddings' tokens are used at every length.",
            stacklevel=3,
        )
    return consistent_value(path, thetas), scaling


def _scaling(path: pathlib.Path, place: str, rope: Mapping[str, Any], longest: Any) -> RopeScaling | None:
    """Return the scaling of one `rope_parameters` or `rope_scaling`, with transformers' defaults."""
    names = {f"{place}.{name}": rope.get(name) for name in ("rope_type", "type")}
    kind = consistent_value(path, names) or "default"
    check_supported(path, dict(rope), {"partial_rotary_factor": (1,)})
    if not isinstance(kind, str) or kind not in KNOWN_OF:
        of = OTHERS.get(kind, "") if isinstance(kind, str) else ""
        raise CheckpointError(
            f"{place!r} is of type {kind!r}{of}; {', '.join(map(repr, KNOWN_OF))} can be opened",
            field=place,
            place=path,
            hint=INSTEAD,
        )
    if unknown := sorted(rope.keys() - KNOWN_OF[kind] - {key for key in rope if rope[key] is None}):
        raise CheckpointError(
            f"{place!r} has the field {unknown[0]!r}, which is unknown for type {kind!r}", field=place, place=path
        )
    if kind == "default":
        return None
    options: dict[str, Any] = {"type": kind, "factor": rope.get("factor")}
    length = longest if rope.get(LENGTH) is None else rope[LENGTH]
    if kind == "dynamic":
        options["original_max_seq_len"] = ModelArgs.max_seq_len if length is None else length
    if kind == "yarn":
        options |= {name: rope[name] for name in OPTIONS if rope.get(name) is not None}
        options["original_max_seq_len"] = length
        if options["factor"] is None and is_positive(longest) and is_positive(length):
            options["factor"] = longest / length
    try:
        scaling = RopeScaling(**options)
        one, two = rope.get("mscale"), rope.get("mscale_all_dim")
        if scaling.attention_factor is None and one and two:
            if not (is_positive(one) and is_positive(two)):
                raise ConfigError(f"mscale {one!r} and mscale_all_dim {two!r} must be numbers", field="mscale")
            options["attention_factor"] = mscale(scaling.factor, one) / mscale(scaling.factor, two)
        return RopeScaling(**options)
    except ConfigError as e:
        raise CheckpointError(f"{place!r}: {e.message}", field=place, place=path) from e


def longest_context(longest: Any, scaling: RopeScaling | None) -> Any:
    """Return `max_position_embeddings`, or what YaRN stretches the original context to if that is more.

    Fine-tunes state the one or the other: Yarn-Mistral-7b-128k says 32768, and a factor of 16 on 8192.
    """
    if scaling is None or scaling.type != "yarn" or scaling.original_max_seq_len is None:
        return longest
    stretched = math.floor(scaling.original_max_seq_len * scaling.factor)
    return max(longest, stretched) if is_positive(longest) else stretched if longest is None else longest


def config(args: ModelArgs) -> dict[str, Any]:
    """Return the fields of a config.json, for transformers 4 and 5."""
    scaling = args.rope_scaling
    if scaling is None:
        rope: dict[str, Any] = {"rope_type": "default"}
    else:
        rope = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.original_max_seq_len not in (None, args.max_seq_len) or scaling.type == "yarn":
            rope[LENGTH] = scaling.original_max_seq_len
        if scaling.type == "yarn":
            rope |= {n: getattr(scaling, n) for n in OPTIONS if getattr(scaling, n) != getattr(RopeScaling, n)}
    out = {"rope_theta": args.rope_theta, "rope_parameters": {"rope_theta": args.rope_theta, **rope}}
    return out if scaling is None else {**out, "rope_scaling": rope}


def theta(args: ModelArgs) -> float:
    """Return the theta of a file without a field for dynamic scaling, which scales theta alone."""
    scaling = args.rope_scaling
    return args.rope_theta if scaling is None else scaling.theta(args.rope_theta, args.head_dim, args.max_seq_len)


TYPE, FACTOR, OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
GGUF_LENGTH, GAIN = "rope.scaling.original_context_length", "rope.scaling.attn_factor"
FAST, SLOW = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"  # `mscale_all_dim`
GGUF_KEYS = {
    TYPE, FACTOR, OLD_FACTOR, GGUF_LENGTH, GAIN, FAST, SLOW, LOG_MULTIPLIER,
    "rope.scaling.finetuned",  # changes nothing
}  # fmt: skip
GGUF_VALUES: dict[str, tuple[Any, ...]] = {  # key -> the values that do not change the scaling
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_attn_factor": (1, -1),
}


def read_gguf(path: pathlib.Path, data: Mapping[str, Any]) -> RopeScaling | None:
    """Return the scaling of a GGUF file from its `llama.*` keys, with llama.cpp's defaults."""
    check_supported(path, dict(data), GGUF_VALUES)
    kind, factor = data.get(TYPE, "linear"), data.get(FACTOR, data.get(OLD_FACTOR, 1)) or 1
    check_supported(path, {TYPE: kind}, {TYPE: ("none", "linear", "yarn")})
    gain, multiplier = data.get(GAIN, 1), data.get(LOG_MULTIPLIER, 0)
    for key, value, neutral in ((GAIN, gain, 1), (LOG_MULTIPLIER, multiplier, 0)):
        if value != neutral and (kind != "yarn" or not is_positive(value)):
            raise CheckpointError(f"{key!r} is {value!r} with type {kind!r}", field=key, place=path)
    if multiplier and is_positive(factor):
        gain /= mscale(factor, multiplier)
    if kind == "none" or (factor == 1 and gain == 1):
        return None
    try:
        if kind == "linear":
            return RopeScaling("linear", factor)
        options: dict[str, Any] = {"beta_fast": data.get(FAST), "beta_slow": data.get(SLOW)}
        options = {name: value for name, value in options.items() if value is not None}
        scaling = RopeScaling("yarn", factor, data.get(GGUF_LENGTH, data.get("context_length")), **options)
        return (
            scaling if gain == 1 else dataclasses.replace(scaling, attention_factor=gain * default_gain(scaling))
        )
    except ConfigError as e:
        field = FACTOR if e.field == "factor" else TYPE
        raise CheckpointError(f"{TYPE!r} {kind!r}: {e.message}", field=field, place=path) from e


def gguf(args: ModelArgs) -> dict[str, Any]:
    """Return the keys of a GGUF file but theta. CheckpointError if it has none for this scaling."""
    scaling = args.rope_scaling
    if scaling is None or scaling.type == "dynamic":
        return {}
    out: dict[str, Any] = {TYPE: scaling.type, FACTOR: float(scaling.factor)}
    if scaling.type == "linear":
        return out
    if not scaling.truncate:
        raise CheckpointError(
            "GGUF has no key for a YaRN scaling with 'truncate' false",
            field="rope_scaling",
            hint="use the format 'huggingface'",
        )
    out |= {GGUF_LENGTH: scaling.original_max_seq_len}
    if scaling.attention_factor is not None:
        out[GAIN] = scaling.attention_factor / default_gain(scaling)
    if scaling.beta_fast != RopeScaling.beta_fast:
        out[FAST] = float(scaling.beta_fast)
    if scaling.beta_slow != RopeScaling.beta_slow:
        out[SLOW] = float(scaling.beta_slow)
    return out
