"""Checkpoints as AutoGPTQ, AutoAWQ and compressed-tensors write them, from each format's definition, in numpy.

Each function packs codes (N, K), zero points (N, G) and scales (N, G). Nothing here is shared with the package.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny import tiny_args, tiny_model

from mistral_7b import ModelArgs

ARGS = tiny_args(dim=64, head_dim=16, n_heads=6, n_kv_heads=2, hidden_dim=96)  # multiples of 8 codes and 32 inputs
Array = NDArray[Any]


class Codes(NamedTuple):
    """A quantized matrix before packing: weight[n, k] = (q[n, k] - zeros[n, group[k]]) * scales[n, group[k]]."""

    q: Array
    zeros: Array
    scales: Array
    group: Array

    def dequantized(self) -> Array:
        """The weight (N, K) in the type of the scales, rounded once."""
        wide = self.scales[:, self.group].astype(np.float64) * (self.q - self.zeros[:, self.group])
        return wide.astype(self.scales.dtype)


def rounded(weight: Array, bits: int, size: int, symmetric: bool = False, order: Array | None = None) -> Codes:
    """Round a weight (N, K) to nearest; `order` is the order in which inputs were put into groups."""
    inputs = weight.shape[1]
    size = inputs if size == -1 else size
    group = np.arange(inputs) // size
    if order is not None:
        group = group[np.argsort(order)]
    top, groups = 2**bits - 1, group.max() + 1
    low = np.stack([weight[:, group == g].min(1) for g in range(groups)], 1)
    high = np.stack([weight[:, group == g].max(1) for g in range(groups)], 1)
    if symmetric:
        high = np.maximum(abs(low), abs(high))
        scales = (2 * high / top).astype(np.float16)
        zeros = np.full(scales.shape, (top + 1) // 2)
    else:
        scales = ((high - low) / top).astype(np.float16)
        zeros = np.clip(np.round(-low / scales), 1, top).astype(int)
    q = np.clip(np.round(weight / scales[:, group]) + zeros[:, group], 0, top).astype(int)
    return Codes(q, zeros, scales, group)


def pack(values: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Pack the last axis into int32: value i of each 32 / bits in the bits from i * bits on, or value order[i]."""
    each = 32 // bits
    out = np.zeros((*values.shape[:-1], values.shape[-1] // each), dtype=np.uint32)
    for i in range(each):
        out |= values[..., (order or range(each))[i] :: each].astype(np.uint32) << np.uint32(bits * i)
    return out.view(np.int32)


def gptq(codes: Codes, bits: int, v2: bool = False) -> dict[str, Array]:
    return {
        "qweight": pack(codes.q, bits).T,
        "qzeros": pack(codes.zeros.T - (0 if v2 else 1), bits),
        "scales": codes.scales.T,
        "g_idx": codes.group.astype(np.int32),
    }


def awq(codes: Codes) -> dict[str, Array]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": pack(codes.q.T, 4, order), "qzeros": pack(codes.zeros.T, 4, order), "scales": codes.scales.T,
    }  # fmt: skip


def int_quantized(codes: Codes) -> dict[str, Array]:
    return {"weight": (codes.q - codes.zeros[:, codes.group]).astype(np.int8), "weight_scale": codes.scales}


def pack_quantized(codes: Codes, bits: int) -> dict[str, Array]:
    shape = np.array(codes.q.shape, dtype=np.int64)
    return {"weight_packed": pack(codes.q, bits), "weight_scale": codes.scales, "weight_shape": shape}


def write(
    folder: pathlib.Path,
    config: dict[str, Any],
    quantize: Callable[[Array], Codes],
    packed: Callable[[Codes], dict[str, Array]],
    more: Callable[[str, dict[str, Array]], None] = lambda name, parts: None,
    args: ModelArgs = ARGS,
) -> None:
    """Write `folder`/quantized, and `folder`/plain with the dequantized weights in float16.

    `more(module, parts)` changes the parts of a module before they are written.
    """
    tiny_model(args, torch.float16).save_pretrained(folder / "plain")
    state = load_file(folder / "plain" / "model.safetensors")
    out: dict[str, torch.Tensor] = {}
    for name, value in list(state.items()):
        if "proj" not in name:
            out[name] = value
            continue
        codes = quantize(value.double().numpy())
        state[name] = torch.from_numpy(codes.dequantized())
        module = name.removesuffix(".weight")
        parts = packed(codes)
        more(module, parts)
        out |= {f"{module}.{part}": torch.from_numpy(np.ascontiguousarray(a)) for part, a in parts.items()}
    save_file(state, folder / "plain" / "model.safetensors")
    (folder / "quantized").mkdir()
    save_file(out, folder / "quantized" / "model.safetensors")
    plain = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "quantized" / "config.json").write_text(json.dumps({**plain, "quantization_config": config}))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL, "input_activations": None}},
}  # fmt: skip
SHUFFLED = np.random.default_rng(0).permutation(96)


def acting(weight: Array) -> Codes:
    """Inputs put into groups in another order, as with desc_act."""
    order = np.array([k for k in SHUFFLED if k < weight.shape[1]])
    return rounded(weight, 4, 32, order=order)


Case = tuple[dict[str, Any], Callable[[Array], Codes], Callable[[Codes], dict[str, Array]]]
of = functools.partial
CASES: dict[str, Case] = {
    "GPTQ": (GPTQ, of(rounded, bits=4, size=32, symmetric=True), of(gptq, bits=4)),
    "GPTQ, asymmetric": ({**GPTQ, "sym": False}, of(rounded, bits=4, size=32), of(gptq, bits=4)),
    "GPTQ, desc_act": ({**GPTQ, "desc_act": True}, acting, of(gptq, bits=4)),
    "GPTQ, one group": ({**GPTQ, "group_size": -1}, of(rounded, bits=4, size=-1), of(gptq, bits=4)),
    "GPTQ, 8 bits": ({**GPTQ, "bits": 8}, of(rounded, bits=8, size=32), of(gptq, bits=8)),
    "GPTQ, 2 bits": ({**GPTQ, "bits": 2}, of(rounded, bits=2, size=32), of(gptq, bits=2)),
    "GPTQ v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, of(rounded, bits=4, size=32), of(gptq, bits=4, v2=True)),
    "AWQ": (AWQ, of(rounded, bits=4, size=32), awq),
    "AWQ, one group": ({**AWQ, "group_size": -1, "version": "GEMM"}, of(rounded, bits=4, size=-1), awq),
    "int8, an output": (COMPRESSED, of(rounded, bits=8, size=-1, symmetric=True), int_quantized),
    "int8, groups": (COMPRESSED, of(rounded, bits=8, size=32, symmetric=True), int_quantized),
    "packed int4": (
        {**COMPRESSED, "format": "pack-quantized"}, of(rounded, bits=4, size=32, symmetric=True),
        of(pack_quantized, bits=4),
    ),
    "packed int8": (
        {**COMPRESSED, "format": "pack-quantized"}, of(rounded, bits=8, size=-1, symmetric=True),
        of(pack_quantized, bits=8),
    ),
}  # fmt: skip
