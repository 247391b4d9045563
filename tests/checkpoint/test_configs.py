"""The ModelArgs of each release's configuration, and invalid configurations."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from typing import Any

import pytest
from refusals import refused
from releases import RELEASES, V1, V2, transformers_5

from mistral_7b import CheckpointError, ModelArgs
from mistral_7b.checkpoint import huggingface, mistral, read_args

HF_V1 = RELEASES["v0.1 base, Hugging Face"][1]
HF_V2 = RELEASES["v0.2 base, Hugging Face"][1]
PARAMS = RELEASES["v0.2 without theta, Mistral"][1]


def args_of(folder: pathlib.Path, data: dict[str, Any] | str, file: str = "config.json") -> ModelArgs:
    (folder / file).write_text(data if isinstance(data, str) else json.dumps(data))
    return read_args(folder)[0]


@pytest.mark.parametrize("name", RELEASES)
def test_trap_08_golden_configs_of_every_release(tmp_path: pathlib.Path, name: str) -> None:
    file, data, wanted = RELEASES[name]
    (tmp_path / file).write_text(json.dumps(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_args(tmp_path) == (wanted, "huggingface" if file == "config.json" else "mistral")


@pytest.mark.parametrize("name", [name for name in RELEASES if "Hugging" in name])
def test_trap_08_golden_configs_as_transformers_5_writes_them(tmp_path: pathlib.Path, name: str) -> None:
    _, data, wanted = RELEASES[name]
    assert args_of(tmp_path, transformers_5(data)) == wanted


@pytest.mark.parametrize("window", [4096, None, 1000])
def test_trap_08_a_missing_theta_follows_the_window(tmp_path: pathlib.Path, window: int | None) -> None:
    data = {k: v for k, v in HF_V1.items() if k != "rope_theta"} | {"sliding_window": window}
    assert args_of(tmp_path, data).rope_theta == (1e6 if window is None else 1e4)


def test_trap_08_any_other_theta_is_kept(tmp_path: pathlib.Path) -> None:
    assert args_of(tmp_path, {**HF_V1, "rope_theta": 123456.0}).rope_theta == 123456.0
    assert args_of(tmp_path, {**HF_V1, "sliding_window": None}).rope_theta == 1e4


def test_trap_08_instruct_v0_2_copies_with_a_window_warn(tmp_path: pathlib.Path) -> None:
    with pytest.warns(UserWarning, match=r"config\.json.*Instruct-v0.2.*null"):
        args = args_of(tmp_path, {**HF_V2, "sliding_window": 4096})
    assert (args.rope_theta, args.sliding_window) == (1e6, 4096)


def test_trap_08_a_missing_window_with_theta_of_v0_1_is_4096(tmp_path: pathlib.Path) -> None:
    data = {k: v for k, v in HF_V1.items() if k != "sliding_window"}
    with pytest.warns(UserWarning, match="sliding_window"):
        assert args_of(tmp_path, data) == V1
    with pytest.warns(UserWarning, match=r"sliding_window.*full attention.*transformers"):
        assert args_of(tmp_path, {**data, "rope_theta": 1e6}) == V2


DISAGREEING = {
    "theta twice": {**HF_V1, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "dtype twice": {**HF_V1, "dtype": "float16"},
    "rope type twice": {**HF_V1, "rope_parameters": {"rope_type": "default", "type": "linear"}},
}


@pytest.mark.parametrize("data", DISAGREEING.values(), ids=DISAGREEING)
def test_trap_08_conflicting_fields_are_refused(tmp_path: pathlib.Path, data: dict[str, Any]) -> None:
    with refused(CheckpointError, place=tmp_path / "config.json"):
        args_of(tmp_path, data)


def test_trap_08_conflicting_windows_are_refused(tmp_path: pathlib.Path) -> None:
    with refused(CheckpointError, field="sliding_window", place=tmp_path / "params.json"):
        args_of(tmp_path, {**PARAMS, "sliding_window": 8, "_sliding_window": 16}, "params.json")
    assert (
        args_of(tmp_path, {**PARAMS, "sliding_window": 8, "_sliding_window": 8}, "params.json").sliding_window == 8
    )


def test_trap_08_a_duplicate_field_is_refused(tmp_path: pathlib.Path) -> None:
    text = json.dumps(HF_V1)[:-1] + ', "rope_theta": 1000000.0}'
    with refused(CheckpointError, field="rope_theta", place=tmp_path / "config.json"):
        args_of(tmp_path, text)


def test_old_and_new_fields_that_agree_are_accepted(tmp_path: pathlib.Path) -> None:
    assert args_of(tmp_path, {**HF_V2, **transformers_5(HF_V2)}) == V2


REFUSED = {
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "NaN inside": ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_parameters.rope_theta"),
    "overflow": ({"rope_theta": 10**400}, None),
    "text for a number": ({"hidden_size": "4096"}, "head_dim"),
    "float for a whole number": ({"num_hidden_layers": 32.5}, "n_layers"),
    "negative": ({"intermediate_size": -1}, "hidden_dim"),
    "window of none": ({"sliding_window": 0}, "sliding_window"),
    "heads that do not divide": ({"num_key_value_heads": 5}, "n_heads"),
    "no eps": ({"rms_norm_eps": None}, "rms_norm_eps"),
    "another architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
    "Llama's architecture alone": ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    "a classifier": ({"architectures": ["MistralForSequenceClassification"]}, "architectures"),
    "another model": ({"model_type": "mixtral"}, "model_type"),
    "a list of models": ({"model_type": ["mistral"]}, "model_type"),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    "RoPE as text": ({"rope_parameters": "default"}, "rope_parameters"),
    "RoPE a layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    "partly rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "bias": ({"attention_bias": True}, "attention_bias"),
    "mixed layers": ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
}


@pytest.mark.parametrize(("change", "field"), REFUSED.values(), ids=REFUSED)
def test_unsupported_config_fields_are_named(
    tmp_path: pathlib.Path, change: dict[str, Any], field: str | None
) -> None:
    with refused(CheckpointError, field=field, place=tmp_path / "config.json"):
        args_of(tmp_path, {**HF_V1, **change})


SMOLLM: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
}  # fmt: skip


def test_a_llama_without_differences_is_a_mistral_without_window(tmp_path: pathlib.Path) -> None:
    wanted = ModelArgs(
        dim=576, n_layers=30, head_dim=64, hidden_dim=1536, n_heads=9, n_kv_heads=3, vocab_size=49152,
        rope_theta=100000, sliding_window=None, max_seq_len=8192, tie_embeddings=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert args_of(tmp_path, SMOLLM) == wanted
        # Fields that are missing have the defaults of transformers' LlamaConfig.
        few = {k: v for k, v in SMOLLM.items() if k not in ("rope_theta", "rms_norm_eps", "num_key_value_heads")}
        changed = dataclasses.replace(wanted, rope_theta=1e4, norm_eps=1e-6, n_kv_heads=9)
        assert args_of(tmp_path, few) == changed


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"model_type": "mistral"}, "architectures"),
    ],
)
def test_a_llama_that_differs_is_refused(tmp_path: pathlib.Path, change: dict[str, Any], field: str) -> None:
    with refused(CheckpointError, field=field, place=tmp_path / "config.json"):
        args_of(tmp_path, {**SMOLLM, **change})


@pytest.mark.parametrize("size", [32001, 32002, 32032, 32064, 32770])
def test_padded_and_extended_vocabularies_are_kept(tmp_path: pathlib.Path, size: int) -> None:
    assert args_of(tmp_path, {**HF_V2, "vocab_size": size}).vocab_size == size


def test_variants_of_fields_are_read(tmp_path: pathlib.Path) -> None:
    layers = ["full_attention"] * 32
    assert args_of(tmp_path, {**HF_V2, "layer_types": layers, "head_dim": None}) == V2
    assert args_of(tmp_path, {**HF_V1, "layer_types": ["sliding_attention"] * 32}) == V1
    assert args_of(tmp_path, {**HF_V2, "tie_word_embeddings": True, "max_position_embeddings": 777}) == (
        dataclasses.replace(V2, tie_embeddings=True, max_seq_len=777)
    )
    assert args_of(tmp_path, {**HF_V2, "num_key_value_heads": None}).n_kv_heads == 32


OTHER_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "Mixtral"),
    "Small 3.1": ({"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}, "vision"),
    "Pixtral": ({"architectures": ["PixtralForConditionalGeneration"], "model_type": "pixtral"}, "Pixtral"),
    "Qwen": ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "Qwen"),
    "Nemo": ({"vocab_size": 131072, "hidden_size": 5120, "head_dim": 128}, "Nemo"),
    "an embedding model": ({"architectures": ["MistralModel"]}, "embedding"),
}


@pytest.mark.wording
@pytest.mark.parametrize(("change", "name"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_other_models_are_named(tmp_path: pathlib.Path, change: dict[str, Any], name: str) -> None:
    with refused(CheckpointError, place=tmp_path / "config.json") as error:
        args_of(tmp_path, {**HF_V2, **change})
    assert name in error.value.message
    assert "Mistral-7B" in str(error.value.hint)


@pytest.mark.parametrize(
    "change",
    [
        {"moe": {"num_experts": 8}},
        {"vision_encoder": {}},
        {"dim": None},
        {"lora": {"rank": 8}},
        {"yarn": {"factor": 4}},
    ],
)
def test_unsupported_params_are_refused(tmp_path: pathlib.Path, change: dict[str, Any]) -> None:
    with refused(CheckpointError, field=next(iter(change)), place=tmp_path / "params.json"):
        args_of(tmp_path, {**PARAMS, **change}, "params.json")


def test_params_of_nemo_are_refused(tmp_path: pathlib.Path) -> None:
    with refused(CheckpointError, field="vocab_size", place=tmp_path / "params.json"):
        args_of(tmp_path, {**PARAMS, "dim": 5120, "vocab_size": 131072}, "params.json")


def test_unknown_params_warn(tmp_path: pathlib.Path) -> None:
    with pytest.warns(UserWarning, match="'something_new'"):
        args_of(tmp_path, {**PARAMS, "something_new": 1}, "params.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00", '{"a": 1}', "[" * 100_000])
def test_an_invalid_config_file_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    with refused(CheckpointError, place=tmp_path / "config.json"):
        args_of(tmp_path, text)


def test_config_formats_are_detected_by_content(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PARAMS, "sliding_window": 4096}))
    assert read_args(tmp_path) == (V1, "mistral")


@pytest.mark.parametrize(
    "args",
    [
        V1,
        V2,
        ModelArgs.v0_3(),
        ModelArgs(dim=24, n_heads=6, n_kv_heads=2, head_dim=10, rope_theta=5e5, max_seq_len=99),
        ModelArgs(tie_embeddings=True, sliding_window=17, norm_eps=1e-6),
    ],
)
def test_configs_round_trip(args: ModelArgs) -> None:
    path = pathlib.Path("x.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert huggingface.read(path, json.loads(json.dumps(huggingface.config(args, "bfloat16")))) == args
        assert mistral.read(path, json.loads(json.dumps(mistral.params(args)))) == args
