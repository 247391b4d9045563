"""The configuration files of every Mistral 7B release, in both formats, and their ModelArgs."""

from __future__ import annotations

from typing import Any

from mistral_7b.model import ModelArgs

_HF: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_V1_HF = {**_HF, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000}
_V2_HF = {**_HF, "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32000}
_V3_HF = {**_V2_HF, "vocab_size": 32768}
_PARAMS: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336,
    "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-05, "vocab_size": 32000,
}  # fmt: skip

V1, V2, V3 = ModelArgs.v0_1(), ModelArgs.v0_2(), ModelArgs.v0_3()
# name: (file, content, expected ModelArgs)
RELEASES: dict[str, tuple[str, dict[str, Any], ModelArgs]] = {
    "v0.1 base, Hugging Face": ("config.json", _V1_HF, V1),
    "v0.1 instruct, Hugging Face": ("config.json", {**_V1_HF, "transformers_version": "4.34.0.dev0"}, V1),
    "v0.2 base, Hugging Face": ("config.json", _V2_HF, V2),
    "v0.2 instruct, Hugging Face": ("config.json", {**_V2_HF, "transformers_version": "4.36.0"}, V2),
    "v0.3 base, Hugging Face": ("config.json", _V3_HF, V3),
    "v0.3 instruct, Hugging Face": ("config.json", {**_V3_HF, "head_dim": 128}, V3),
    "v0.1 base and instruct, Mistral": ("params.json", {**_PARAMS, "sliding_window": 4096}, V1),
    "v0.1 with the window's later name": ("params.json", {**_PARAMS, "_sliding_window": 4096}, V1),
    "v0.2 base and instruct, Mistral": ("params.json", {**_PARAMS, "rope_theta": 1000000.0}, V2),
    "v0.2 without theta, Mistral": ("params.json", _PARAMS, V2),
    "v0.3 base and instruct, Mistral": ("params.json", {**_PARAMS, "rope_theta": 1e6, "vocab_size": 32768}, V3),
}


def transformers_5(old: dict[str, Any]) -> dict[str, Any]:
    """The same config.json as written by transformers 5."""
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "torch_dtype")}
    new["rope_parameters"] = {"rope_theta": old["rope_theta"], "rope_type": "default"}
    return {**new, "dtype": old["torch_dtype"]}
