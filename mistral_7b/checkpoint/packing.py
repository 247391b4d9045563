"""The `quantization_config` of GPTQ, AWQ and compressed-tensors, and refusals of other methods.

GPTQ and AWQ before transformers integrated them wrote the configuration into a file of its own.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from ..errors import CheckpointError
from .config import read_json
from .hub import QUANTIZATION_FILES

QUANT_METHOD = "mistral_7b"  # `quant_method` of checkpoints written by quantizing.py
GPTQ_BITS = (2, 4, 8)
INSTEAD = "take the unquantized model and --quantization int4, or its Q4_K_M GGUF file"
OTHERS = {  # quant_method -> what it is
    "bitsandbytes": "by bitsandbytes",
    "fp8": "to fp8",
    "fbgemm_fp8": "to fp8",
    "modelopt": "by NVIDIA ModelOpt",
    "exl2": "by ExLlamaV2 (EXL2)",
    "exl3": "by ExLlamaV3 (EXL3)",
    "auto-round": "by AutoRound",
    "aqlm": "by AQLM",
    "hqq": "by HQQ",
    "quanto": "by Quanto",
    "torchao": "by torchao",
    "eetq": "by EETQ",
    "bitnet": "as BitNet",
    "quip": "by QuIP#",
    "vptq": "by VPTQ",
    "mxfp4": "to MXFP4",
    "quark": "by AMD Quark",
}


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the matrices of a checkpoint are quantized."""

    method: str  # "gptq", "awq" or "compressed-tensors"
    bits: int = 8
    group_size: int = -1  # inputs; -1: all
    zero_offset: int = 0  # added to stored zero points

    def __str__(self) -> str:
        names = {"gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors"}
        if self.method == "compressed-tensors":
            return names[self.method]
        groups = "one group" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{names[self.method]}, {self.bits} bits, {groups}"


def of_folder(folder: pathlib.Path) -> Packing | None:
    """Return how the checkpoint in a folder is quantized; None if it is not, or in this package's own format."""
    for name, field in (("config.json", "quantization_config"), *((name, None) for name in QUANTIZATION_FILES)):
        path = folder / name
        if not path.is_file():
            continue
        data = read_json(path)
        if found := check_config(path, data.get(field) if field else data, data.get("quantization")):
            return found
    return None


def check_config(path: pathlib.Path, config: Any, mlx: Any = None) -> Packing | None:
    """Return the packing of a `quantization_config`. CheckpointError says which method is not supported.

    `mlx` is the field `quantization`, which MLX writes.
    """
    if config is None and mlx is None:
        return None
    method = _method(config)
    if method == QUANT_METHOD:
        return None
    if mlx is not None and method is None:
        raise _refusal(path, "quantized by MLX", "quantization")
    if method == "gptq":
        return _gptq(path, config)
    if method == "awq":
        return _awq(path, config)
    if method == "compressed-tensors":
        return _compressed(path, config)
    if method == "bitsandbytes":
        bits = 4 if config.get("load_in_4bit") else 8
        raise _refusal(path, f"quantized by bitsandbytes to {bits} bits")
    by = OTHERS.get(method, f"by the method {method!r}") if isinstance(method, str) else "by an unknown method"
    raise _refusal(path, f"quantized {by}")


def _refusal(path: pathlib.Path, what: str, field: str = "quantization_config") -> CheckpointError:
    return CheckpointError(f"{what}, which cannot be opened", field=field, place=path, hint=INSTEAD)


def _method(config: Any) -> Any:
    """Return the `quant_method`; older configurations lack it, and are told apart by their fields."""
    if not isinstance(config, dict):
        return None
    method = config.get("quant_method")
    if method is None:
        if "w_bit" in config:
            return "awq"
        if "desc_act" in config and "bits" in config:
            return "gptq"
        if "load_in_4bit" in config or "load_in_8bit" in config:
            return "bitsandbytes"
    return method


def _gptq(path: pathlib.Path, config: dict[str, Any]) -> Packing:
    kinds = {str(config.get(name) or "gptq") for name in ("checkpoint_format", "format")} - {"gptq"} or {"gptq"}
    kind = next(iter(kinds))
    if config.get("is_marlin_format"):
        kind = "marlin"
    if kind not in ("gptq", "gptq_v2"):
        raise _refusal(path, f"quantized by GPTQ, repacked as {kind!r}")
    for field in (
        "dynamic",
        "rotation",
        "adapter",
    ):  # bits of single modules, a rotated basis, low-rank corrections
        if config.get(field):
            raise _refusal(path, f"quantized by GPTQ with {field!r}")
    if config.get("pack_dtype", "int32") != "int32":
        raise _refusal(path, f"quantized by GPTQ, packed in {config['pack_dtype']}")
    bits = config.get("bits")
    if bits not in GPTQ_BITS or isinstance(bits, bool):
        raise _refusal(path, f"quantized by GPTQ to {bits!r} bits")
    return Packing("gptq", bits, _group_size(path, config.get("group_size")), int(kind == "gptq"))


def _awq(path: pathlib.Path, config: dict[str, Any]) -> Packing:
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _refusal(path, f"quantized by AWQ for {version!r}")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4 or isinstance(bits, bool):
        raise _refusal(path, f"quantized by AWQ to {bits!r} bits")
    return Packing("awq", 4, _group_size(path, config.get("group_size", config.get("q_group_size"))))


def _group_size(path: pathlib.Path, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
        raise CheckpointError(
            f"'group_size' is {size!r}, not a number of inputs", field="quantization_config", place=path
        )
    return size


def _compressed(path: pathlib.Path, config: dict[str, Any]) -> Packing:
    kind, groups = config.get("format"), config.get("config_groups")
    if kind not in ("int-quantized", "naive-quantized", "pack-quantized") or not isinstance(groups, dict):
        raise _refusal(path, f"quantized by compressed-tensors as {kind!r}")
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int":
            raise _refusal(path, f"quantized by compressed-tensors as {kind!r}, not to integers")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise _refusal(path, "made sparse by compressed-tensors")
    return Packing("compressed-tensors")
