"""Hugging Face's config.json.

transformers 5 writes `rope_parameters` and `dtype`; earlier versions write `rope_theta` and `torch_dtype`.
"""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..model import ModelArgs
from .config import V0_1_THETA, V0_1_WINDOW, check_supported, consistent_value, theta_and_window, to_args
from .tokenizer_files import IDS

FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
ARCHITECTURE = "MistralForCausalLM"
QUANT_METHOD = "mistral_7b"  # `quant_method` of checkpoints written by quantizing.py
SUPPORTED_VALUES = {  # field -> the values that do not change the model
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "partial_rotary_factor": (1,),
}


def recognize(data: dict[str, Any]) -> bool:
    """Return whether a JSON object has the fields of a Hugging Face config.json."""
    return "model_type" in data or "architectures" in data or "hidden_size" in data


def read(path: pathlib.Path, data: dict[str, Any]) -> ModelArgs:
    """Build ModelArgs from a config.json. CheckpointError names an invalid field."""
    _check_kind(path, data)
    check_supported(path, data, SUPPORTED_VALUES)
    theta, window = theta_and_window(path, _theta(path, data), data.get("sliding_window"))
    if "sliding_window" not in data and theta == V0_1_THETA:
        # transformers defaults to a window of 4096, which is also that of v0.1, whose theta is 1e4.
        warnings.warn(
            f"{path}: no 'sliding_window', but theta 1e4 as in v0.1: using its window of 4096", stacklevel=2
        )
        window = V0_1_WINDOW
    _check_layer_types(path, data.get("layer_types"), window)
    head_dim = data.get("head_dim")
    if head_dim is None:
        heads, dim = data.get("num_attention_heads"), data.get("hidden_size")
        if not (isinstance(heads, int) and isinstance(dim, int) and heads > 0 and dim % heads == 0):
            raise CheckpointError(
                "no 'head_dim', and hidden_size / num_attention_heads is not an integer",
                field="head_dim",
                place=path,
            )
        head_dim = dim // heads
    more = {"max_seq_len": data.get("max_position_embeddings"), "tie_embeddings": data.get("tie_word_embeddings")}
    more = {name: value for name, value in more.items() if value is not None}
    return to_args(path, data, FIELDS, head_dim=head_dim, rope_theta=theta, sliding_window=window, **more)


def _check_kind(path: pathlib.Path, data: dict[str, Any]) -> None:
    kinds = data.get("architectures")
    if kinds is not None and kinds != [ARCHITECTURE]:
        raise CheckpointError(
            f"'architectures' is {kinds!r}; only [{ARCHITECTURE!r}] can be opened",
            field="architectures",
            place=path,
        )
    if data.get("model_type", "mistral") != "mistral":
        raise CheckpointError(
            f"'model_type' is {data['model_type']!r}; only 'mistral' can be opened", field="model_type", place=path
        )
    quantization = data.get("quantization_config")
    if quantization is not None and not (
        isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
    ):
        raise CheckpointError(
            "'quantization_config' names a quantization method that is not supported",
            field="quantization_config",
            place=path,
            hint="use the unquantized checkpoint",
        )
    consistent_value(path, {name: data.get(name) for name in ("dtype", "torch_dtype")})


def _theta(path: pathlib.Path, data: dict[str, Any]) -> Any:
    """Return theta from the field of any version of transformers; CheckpointError for scaled RoPE."""
    found = {"rope_theta": data.get("rope_theta")}
    for place in ("rope_parameters", "rope_scaling"):
        rope = data.get(place)
        if rope is None:
            continue
        kind = None
        if isinstance(rope, dict):
            kind = (
                consistent_value(path, {f"{place}.{name}": rope.get(name) for name in ("rope_type", "type")})
                or "default"
            )
            check_supported(path, rope, {"partial_rotary_factor": (1,)})
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            raise CheckpointError(
                f"{place!r} sets a rotary embedding that Mistral 7B does not support", field=place, place=path
            )
        found[f"{place}.rope_theta"] = rope.get("rope_theta")
    return consistent_value(path, found)


def _check_layer_types(path: pathlib.Path, kinds: Any, window: Any) -> None:
    wanted = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and not (isinstance(kinds, list) and all(kind == wanted for kind in kinds)):
        raise CheckpointError(
            f"'layer_types' must all be {wanted!r}: the layers of Mistral 7B are identical",
            field="layer_types",
            place=path,
        )


def config(args: ModelArgs, dtype: str, ids: Mapping[str, Any] = IDS) -> dict[str, Any]:
    """Return the content of config.json for any transformers; `dtype` is like "bfloat16".

    `ids` holds `bos_token_id` and `eos_token_id` (a number, a list or None).
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "mistral",
        **{theirs: getattr(args, ours) for ours, theirs in FIELDS.items()},
        "head_dim": args.head_dim,
        "max_position_embeddings": args.max_seq_len,
        "rope_theta": args.rope_theta,
        "rope_parameters": {"rope_theta": args.rope_theta, "rope_type": "default"},
        "sliding_window": args.sliding_window,
        "tie_word_embeddings": args.tie_embeddings,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **ids,
    }
