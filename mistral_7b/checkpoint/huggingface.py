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
from . import packing, rope
from .config import (
    INSTEAD,
    V0_1_THETA,
    V0_1_WINDOW,
    check_supported,
    check_tekken,
    consistent_value,
    theta_and_window,
    to_args,
)
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
ARCHITECTURE, LLAMA = "MistralForCausalLM", "LlamaForCausalLM"
SUPPORTED_VALUES = {  # field -> the values that do not change the model
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
}
LLAMA_DEFAULTS = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
OTHERS = {  # model_type -> what it is
    "mixtral": "Mixtral, a mixture of experts",
    "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "mistral3": "Mistral Small 3.1 or later, with a vision encoder",
    "mistral4": "Mistral 4",
    "pixtral": "Pixtral, with a vision encoder",
    "llava": "LLaVA, with a vision encoder",
    "llava_next": "LLaVA, with a vision encoder",
    "llava_mistral": "LLaVA, with a vision encoder",
    "idefics2": "Idefics 2, with a vision encoder",
    "voxtral": "Voxtral, with an audio encoder",
    "mamba2": "Codestral Mamba, a state space model",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3",
    "phi3": "Phi-3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "bert": "a BERT encoder",
    "roberta": "a RoBERTa encoder",
    "xlm-roberta": "a RoBERTa encoder",
}


def recognize(data: dict[str, Any]) -> bool:
    """Return whether a JSON object has the fields of a Hugging Face config.json."""
    return "model_type" in data or "architectures" in data or "hidden_size" in data


def read(path: pathlib.Path, data: dict[str, Any]) -> ModelArgs:
    """Build ModelArgs from a config.json. CheckpointError names an invalid field."""
    llama = _check_kind(path, data)
    check_supported(path, data, SUPPORTED_VALUES)
    packing.check_config(path, data.get("quantization_config"), data.get("quantization"))
    consistent_value(path, {name: data.get(name) for name in ("dtype", "torch_dtype")})
    given_theta, scaling = rope.read_config(path, data)
    if llama:
        data = LLAMA_DEFAULTS | {name: value for name, value in data.items() if value is not None}
        theta, window = LLAMA_DEFAULTS["rope_theta"] if given_theta is None else given_theta, None
    else:
        theta, window = _theta_and_window(path, data, given_theta)
        _check_layer_types(path, data.get("layer_types"), window)
    heads, dim = data.get("num_attention_heads"), data.get("hidden_size")
    if data.get("num_key_value_heads") is None and (llama or "num_key_value_heads" in data):
        data = {**data, "num_key_value_heads": heads}
    head_dim = data.get("head_dim")
    if head_dim is None:
        if not (isinstance(heads, int) and isinstance(dim, int) and heads > 0 and dim % heads == 0):
            raise CheckpointError(
                "no 'head_dim', and hidden_size / num_attention_heads is not an integer",
                field="head_dim",
                place=path,
            )
        head_dim = dim // heads
    longest = rope.longest_context(data.get("max_position_embeddings"), scaling)
    more = {"max_seq_len": longest, "tie_embeddings": data.get("tie_word_embeddings"), "rope_scaling": scaling}
    more = {name: value for name, value in more.items() if value is not None}
    return to_args(path, data, FIELDS, head_dim=head_dim, rope_theta=theta, sliding_window=window, **more)


def _check_kind(path: pathlib.Path, data: dict[str, Any]) -> bool:
    """Return whether the model is a Llama, of Mistral's architecture without a window; refuse all others."""
    kinds, kind = data.get("architectures"), data.get("model_type")
    wanted = {"mistral": [ARCHITECTURE], "llama": [LLAMA]}
    if isinstance(kind, str) and kind in OTHERS:
        field = "model_type" if kinds in (None, *wanted.values()) else "architectures"
        raise CheckpointError(f"this is {OTHERS[kind]}", field=field, place=path, hint=INSTEAD)
    if kinds == ["MistralModel"]:
        raise CheckpointError(
            "'MistralModel' has no output projection: it is an embedding model, which generates no text",
            field="architectures",
            place=path,
            hint=INSTEAD,
        )
    if kinds is not None and kinds not in wanted.values():
        raise CheckpointError(
            f"'architectures' is {kinds!r}; only [{ARCHITECTURE!r}] and [{LLAMA!r}] can be opened",
            field="architectures",
            place=path,
            hint=INSTEAD,
        )
    if kind is not None and str(kind) not in wanted:
        raise CheckpointError(
            f"'model_type' is {kind!r}; only 'mistral' and 'llama' can be opened",
            field="model_type",
            place=path,
            hint=INSTEAD,
        )
    if kinds is not None and kind is not None and kinds != wanted[kind]:
        raise CheckpointError(
            f"'architectures' is {kinds!r} but 'model_type' is {kind!r}", field="architectures", place=path
        )
    check_tekken(path, data, "hidden_size")
    return LLAMA in (kinds or ()) or kind == "llama"


def _theta_and_window(path: pathlib.Path, data: dict[str, Any], given: Any) -> tuple[Any, Any]:
    """Return theta and the window of a Mistral; a missing window is that of the release with this theta."""
    theta, window = theta_and_window(path, given, data.get("sliding_window"))
    if "sliding_window" in data:
        return theta, window
    if theta == V0_1_THETA:
        # transformers defaults to a window of 4096, which is also that of v0.1, whose theta is 1e4.
        window, said = V0_1_WINDOW, "theta 1e4 as in v0.1: using its window of 4096"
    else:
        said = (
            f"theta {theta:g}: using full attention, as in v0.2 and v0.3, where transformers uses a window of 4096"
        )
    warnings.warn(f"{path}: no 'sliding_window', but {said}", stacklevel=4)
    return theta, window


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
        **rope.config(args),
        "sliding_window": args.sliding_window,
        "tie_word_embeddings": args.tie_embeddings,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **ids,
    }
