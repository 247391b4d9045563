"""Mistral's own params.json, as read by mistral-inference."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

from ..errors import CheckpointError
from ..model import ModelArgs
from . import rope
from .config import INSTEAD, check_supported, check_tekken, consistent_value, theta_and_window, to_args

FIELDS = {
    name: name
    for name in ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
}
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {  # field -> the values that do not change the model
    "model_type": ("transformer",),
    "quantization": (),
    "yarn": (),
    "llama_4_scaling": (),
    "use_biases": (False,),
    "use_scale_emb": (False,),
    "causal": (True,),
}
OTHERS = {  # field -> what a model with it is
    "moe": "Mixtral, a mixture of experts",
    "vision_encoder": "Pixtral or Mistral Small 3.1, with a vision encoder",
    "multimodal": "Pixtral or Voxtral, with an encoder of images or sound",
}
OTHER_FIELDS = {
    "rope_theta", "sliding_window", "_sliding_window", "max_seq_len", "max_position_embeddings",
    "tied_embeddings", "max_batch_size",
}  # fmt: skip


def recognize(data: dict[str, Any]) -> bool:
    """Return whether a JSON object has the fields of a params.json."""
    return "dim" in data and "n_layers" in data


def read(path: pathlib.Path, data: dict[str, Any]) -> ModelArgs:
    """Build ModelArgs from a params.json. CheckpointError names an invalid field."""
    for field, what in OTHERS.items():
        if data.get(field) is not None:
            raise CheckpointError(f"{field!r} is set: this is {what}", field=field, place=path, hint=INSTEAD)
    if data.get("lora") is not None:
        raise CheckpointError(
            "'lora' is set: this is a LoRA adapter of mistral-finetune",
            field="lora",
            place=path,
            hint="name its base model, and this with --adapter",
        )
    check_tekken(path, data, "dim")
    check_supported(path, data, SUPPORTED_VALUES)
    if unknown_fields := sorted(
        data.keys() - FIELDS.keys() - SUPPORTED_VALUES.keys() - OTHER_FIELDS - OTHERS.keys() - {"lora"}
    ):
        warnings.warn(
            f"{path}: fields {', '.join(map(repr, unknown_fields))} are unknown and ignored", stacklevel=2
        )
    window = consistent_value(path, {name: data.get(name) for name in ("sliding_window", "_sliding_window")})
    theta, window = theta_and_window(path, data.get("rope_theta"), window)
    longest = consistent_value(path, {name: data.get(name) for name in ("max_seq_len", "max_position_embeddings")})
    more = {"max_seq_len": longest, "tie_embeddings": data.get("tied_embeddings")}
    more = {name: value for name, value in more.items() if value is not None}
    return to_args(path, data, FIELDS, rope_theta=theta, sliding_window=window, **more)


def params(args: ModelArgs) -> dict[str, Any]:
    """Return the content of params.json, always with theta: mistral-inference defaults to 1e6.

    CheckpointError for a scaled rotary embedding, which mistral-inference would ignore.
    """
    if args.rope_scaling is not None and args.rope_scaling.type != "dynamic":
        raise CheckpointError(
            f"params.json has no field for the {args.rope_scaling.type!r} scaling of the rotary embedding",
            field="rope_scaling",
            hint="use the format 'huggingface' or 'gguf'",
        )
    out: dict[str, Any] = {name: getattr(args, name) for name in FIELDS}
    out["rope_theta"] = rope.theta(args)
    if args.sliding_window is not None:
        out["sliding_window"] = args.sliding_window
    if args.max_seq_len != ModelArgs.max_seq_len:
        out["max_seq_len"] = args.max_seq_len
    if args.tie_embeddings:
        out["tied_embeddings"] = True
    return out
