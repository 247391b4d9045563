"""Checkpoints of GPTQ, AWQ and compressed-tensors: the weights of an independent dequantization, bit by bit."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from foreign import ARGS, AWQ, CASES, COMPRESSED, GPTQ, Array, Codes, of, rounded, write
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import close, tokens_of

from mistral_7b import CheckpointError, Mistral7B
from mistral_7b.checkpoint import convert, read_args
from mistral_7b.checkpoint import packed as packed_module


def opened(path: pathlib.Path) -> Mistral7B:
    return Mistral7B.from_pretrained(path, dtype=torch.float32)


def same_weights(a: Mistral7B, b: Mistral7B) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def written(folder: pathlib.Path, name: str = "GPTQ") -> pathlib.Path:
    write(folder, *CASES[name])
    return folder / "quantized"


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_an_independent_dequantization(
    tmp_path: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "INPUTS_AT_ONCE", 48)  # several steps, the last one shorter
    folder = written(tmp_path, name)
    model = opened(folder)
    same_weights(model, opened(tmp_path / "plain"))
    assert read_args(folder) == (ARGS, CASES[name][0]["quant_method"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = tokens_of((2, 21), ARGS)
    close(model(tokens)[0], theirs(tokens).logits.detach())


@pytest.mark.parametrize("name", ["GPTQ", "AWQ", "int8, an output"])
def test_they_convert_and_quantize(tmp_path: pathlib.Path, name: str) -> None:
    folder, wanted = written(tmp_path, name), opened(tmp_path / "plain")
    for format in ("huggingface", "mistral", "gguf"):
        convert(folder, tmp_path / format, to=format)
        same_weights(opened(tmp_path / format), wanted)
    assert "quantization_config" not in json.loads((tmp_path / "huggingface" / "config.json").read_text())
    ours, theirs = (
        Mistral7B.from_pretrained(path, quantization="int8").state_dict() for path in (folder, tmp_path / "plain")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_older_files_are_read(tmp_path: pathlib.Path) -> None:
    """The configuration in a file of its own, no g_idx, and biases of zeros."""

    def old(module: str, parts: dict[str, Array]) -> None:
        del parts["g_idx"]
        parts["bias"] = np.zeros(parts["scales"].shape[1], dtype=np.float16)

    for name, file, renamed in (
        ("GPTQ", "quantize_config.json", {}),
        ("AWQ", "quant_config.json", {"w_bit": 4, "q_group_size": 32}),
    ):
        path = tmp_path / name
        config, quantize, packing = CASES[name]
        write(path, config, quantize, packing, old if name == "GPTQ" else lambda module, parts: None)
        data = json.loads((path / "quantized" / "config.json").read_text())
        del data["quantization_config"]
        (path / "quantized" / "config.json").write_text(json.dumps(data))
        older = {k: v for k, v in config.items() if k != "quant_method"}
        if renamed:
            older = {"zero_point": True, "version": "GEMM", **renamed}
        (path / "quantized" / file).write_text(json.dumps(older))
        same_weights(opened(path / "quantized"), opened(path / "plain"))


def test_zero_points_of_int8_are_subtracted(tmp_path: pathlib.Path) -> None:
    def shifted(codes: Codes) -> dict[str, Array]:
        return {
            "weight": (codes.q - 128).astype(np.int8),
            "weight_scale": codes.scales,
            "weight_zero_point": (codes.zeros - 128).astype(np.int8),
        }

    write(tmp_path, COMPRESSED, of(rounded, bits=8, size=-1), shifted)
    same_weights(opened(tmp_path / "quantized"), opened(tmp_path / "plain"))


REFUSED: dict[str, dict[str, Any]] = {
    "marlin": {**GPTQ, "checkpoint_format": "marlin"},
    "a list": {**GPTQ, "checkpoint_format": ["gptq"]},
    "3 bits": {**GPTQ, "bits": 3},
    "bits of single layers": {**GPTQ, "dynamic": {"-:.*down.*": {}}},
    "group size": {**GPTQ, "group_size": "128"},
    "AWQ gemv": {**AWQ, "version": "gemv"},
    "AWQ 8 bits": {**AWQ, "bits": 8},
    "fp8 by compressed-tensors": {**COMPRESSED, "format": "float-quantized"},
    "sparse": {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}},
    "floats": {**COMPRESSED, "config_groups": {"group_0": {"weights": {"type": "float"}}}},
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, older": {"load_in_8bit": True},
    "fp8": {"quant_method": "fp8"},
    "EXL2": {"quant_method": "exl2", "bits": 4.0},
    "unknown": {"quant_method": "new"},
    "no method": {"bits": 4},
    "not a dictionary": {"quant_method": ["gptq"]},
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_other_quantizations_are_refused(tmp_path: pathlib.Path, config: dict[str, Any]) -> None:
    folder = written(tmp_path)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "quantization_config": config}))
    for attempt in (read_args, opened):
        with refused(CheckpointError, field="quantization_config", place=folder / "config.json") as error:
            attempt(folder)
    if config is not REFUSED["group size"]:
        assert "Q4_K_M" in str(error.value.hint)


def test_mlx_is_refused(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path)
    data = json.loads((folder / "config.json").read_text())
    bits = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps({**data, "quantization": bits, "quantization_config": bits}))
    with refused(CheckpointError, field="quantization", place=folder / "config.json"):
        opened(folder)


Q = "model.layers.1.self_attn.q_proj"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {
    "no scales": ("GPTQ", lambda t: t.pop(f"{Q}.scales")),
    "no codes": ("GPTQ", lambda t: t.pop(f"{Q}.qweight")),
    "no zero points": ("AWQ", lambda t: t.pop(f"{Q}.qzeros")),
    "codes of another shape": ("GPTQ", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1]})),
    "scales of another shape": ("AWQ", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:-1]})),
    "codes as floats": ("GPTQ", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()})),
    "integer scales": ("AWQ", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].int()})),
    "groups out of range": ("GPTQ", lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"] + 5})),
    "negative groups": ("GPTQ", lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"] - 1})),
    "a bias": ("GPTQ", lambda t: t.update({f"{Q}.bias": torch.ones(96)})),
    "no scale of int8": ("int8, an output", lambda t: t.pop(f"{Q}.weight_scale")),
    "scales of int8": ("int8, groups", lambda t: t.update({f"{Q}.weight_scale": torch.ones(96, 3)})),
    "no shape": ("packed int4", lambda t: t.pop(f"{Q}.weight_shape")),
    "a wrong shape": ("packed int4", lambda t: t.update({f"{Q}.weight_shape": torch.tensor([96, 65])})),
    "packed zero points": (
        "packed int4", lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(12, 2, dtype=torch.int32)}),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_parts_are_named(
    tmp_path: pathlib.Path, name: str, damage: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    folder = written(tmp_path, name)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    with refused(CheckpointError, place=folder / "model.safetensors") as error:
        opened(folder)
    assert str(error.value.field).startswith(Q)


def test_integer_weights_without_a_quantization_are_refused(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path)
    data = json.loads((folder / "config.json").read_text())
    del data["quantization_config"]
    (folder / "config.json").write_text(json.dumps(data))
    with refused(CheckpointError, place=folder / "model.safetensors"):
        opened(folder)
