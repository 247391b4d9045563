"""Read and write LoRA adapters of PEFT and mistral-finetune, in Mistral's names and layout.

An adapter holds two low-rank factors for each adapted Linear: W becomes W + scale * B A.

    PEFT               adapter_config.json, adapter_model.safetensors (or .bin): base_model.model.{Hugging Face's
                       name}.lora_A.weight; the rows of B for q and k are in Hugging Face's order (names.py);
                       scale alpha / r, or alpha / sqrt(r) with use_rslora
    mistral-finetune   lora.safetensors: {Mistral's name}.lora_A.weight; scale 2, or that of params.json beside it

r rank · K inputs · N outputs
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import mistral
from ..checkpoint.config import read_json
from ..checkpoint.names import EMBEDDING, expected, half_split, interleaved, rename, rotated_heads
from ..checkpoint.stored import StoredTensor, read_file
from ..checkpoint.writing import header_of, new_folder, write_json
from ..errors import CheckpointError
from ..model import ModelArgs

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "lora.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
MISTRAL_SCALE = 2.0

# Fields of PEFT's configuration: those read here, and those that do not affect a trained adapter.
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "parent_library",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
PLAIN = {  # field -> the values of plain LoRA, besides those in NOTHING
    "bias": ("none",),
    # Others ("pissa", "olora", ...) modify the base weights at initialization.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
NOTHING: tuple[Any, ...] = (None, False, {}, [])


class Factors(NamedTuple):
    """The update of one Linear's weight (N, K): scale * b @ a."""

    a: Tensor  # (r, K)
    b: Tensor  # (N, r)
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in Mistral's names and layout."""

    targets: Mapping[str, Factors]  # keyed by the Linear's name, such as "layers.0.attention.wq"
    source: str = ""  # the path it was read from
    base_model: str = ""  # the base model's name in its configuration

    @property
    def rank(self) -> int:
        """The largest rank among the targets."""
        return max(f.a.shape[0] for f in self.targets.values())


def read_adapter(path: str | os.PathLike[str], args: ModelArgs) -> Adapter:
    """Read an adapter from a folder, or from a weight file with its configuration beside it.

    `args` is the configuration of the base model. Raises CheckpointError, naming the field or tensor, if the
    adapter is another variant of LoRA, does not fit the model, or is damaged. A pickle (.bin) is opened with
    `weights_only=True`.
    """
    file = _find(pathlib.Path(path).expanduser())
    stored = read_file(file)
    if any(name.startswith(PREFIX) for name in stored):
        return _read_peft(file, stored, args)
    beside = file.with_name("params.json")
    lora = read_json(beside).get("lora") if beside.is_file() else None
    scale = lora.get("scaling", MISTRAL_SCALE) if isinstance(lora, dict) else MISTRAL_SCALE
    if not _is_number(scale):
        raise CheckpointError(f"'lora.scaling' is {scale!r}, not a number", field="lora.scaling", place=beside)
    return Adapter(_factors(file, stored, args, "mistral", lambda linear, r: float(scale)), str(path))


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(
            "no such file or folder", place=path, hint="download the adapter and name where it lies"
        )
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise CheckpointError(f"holds no adapter ({', '.join(FILES)})", place=path)
    return found[0]


def _read_peft(file: pathlib.Path, stored: dict[str, StoredTensor], args: ModelArgs) -> Adapter:
    path = file.with_name(CONFIG)
    if not path.is_file():
        raise CheckpointError(f"PEFT's weights without {CONFIG} beside them, which has their scale", place=file)
    data = read_json(path)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"'peft_type' is {data.get('peft_type')!r}; only 'LORA' can be opened", field="peft_type", place=path
        )
    for field, value in data.items():
        if field in READ or field in IRRELEVANT or value in NOTHING or value in PLAIN.get(field, ()):
            continue
        raise CheckpointError(
            f"{field!r} is {str(value)[:60]!r}: a variant of LoRA that cannot be opened; plain ones can",
            field=field,
            place=path,
        )
    ranks = _pattern(path, data, "rank_pattern", "r")
    alphas = _pattern(path, data, "alpha_pattern", "lora_alpha")
    rslora = data.get("use_rslora") is True

    def scale(linear: str, r: int) -> float:
        if ranks(linear) != r:
            raise CheckpointError(
                f"{linear!r} is of rank {r}; {CONFIG} says {ranks(linear)}", field=linear, place=file
            )
        return alphas(linear) / (math.sqrt(r) if rslora else r)

    targets = _factors(file, stored, args, "huggingface", scale)
    return Adapter(targets, str(file), str(data.get("base_model_name_or_path") or ""))


def _pattern(path: pathlib.Path, data: dict[str, Any], field: str, default: str) -> Callable[[str], float]:
    """Return a map from Linear names to numbers: the first matching pattern or `default`."""
    table = data.get(field) or {}
    if not _is_number(data.get(default)):
        raise CheckpointError(f"{default!r} is {data.get(default)!r}, not a number", field=default, place=path)
    if not isinstance(table, dict) or not all(map(_is_number, table.values())):
        raise CheckpointError(f"{field!r} must be a table from names to numbers", field=field, place=path)
    compiled = []
    for pattern, number in table.items():
        # Exponential backtracking needs a repeated group; four quantifiers are enough for names.
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > 4:
            raise CheckpointError(
                f"{field!r} has {pattern!r}, too involved a pattern",
                field=field,
                place=path,
                hint="name the layers",
            )
        try:
            compiled.append((re.compile(rf"(?:.*\.)?(?:{pattern})$"), number))
        except (re.error, OverflowError) as e:
            raise CheckpointError(
                f"{field!r} has {pattern!r}, which is no pattern ({e})", field=field, place=path
            ) from e
    return lambda name: next((number for p, number in compiled if p.match(name)), data[default])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _factors(
    file: pathlib.Path,
    stored: dict[str, StoredTensor],
    args: ModelArgs,
    layout: str,
    scale: Callable[[str, int], float],
) -> dict[str, Factors]:
    """Return the factors by Mistral's names and in its layout, in forward order."""
    shapes = {name: shape for name, shape in expected(args) if len(shape) == 2}
    halves: dict[str, dict[str, StoredTensor]] = {}
    for one in stored.values():
        ours, half = _place(one, layout)
        if ours not in shapes:
            raise one.fault(f"lies beyond the {args.n_layers} layers of the model")
        halves.setdefault(ours, {})[half] = one
    if not halves:
        raise CheckpointError("holds no tensor of an adapter", place=file)
    out = {}
    for ours, (outputs, inputs) in shapes.items():
        if ours in halves:
            a, b = _pair(ours, halves[ours], outputs, inputs)
            linear = str(rename(ours, "mistral", layout)).removesuffix(".weight")
            heads = rotated_heads(ours, args) if layout == "huggingface" else None
            view = b if heads is None else interleaved(b, heads)
            out[ours.removesuffix(".weight")] = Factors(a, view, scale(linear, a.shape[0]))
    return out


def _place(one: StoredTensor, layout: str) -> tuple[str, str]:
    """Return the weight (Mistral's name) that a tensor belongs to, and its factor, "A" or "B"."""
    plain = one.name.removeprefix(PREFIX).replace(".base_layer.", ".")
    found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", plain)
    ours = rename(f"{found[1]}.weight", layout, "mistral") if found else None
    if ours == EMBEDDING or "lora_embedding" in one.name:
        raise one.fault("adapts the embedding; only Linears can be adapted")
    if rename(plain, layout, "mistral") is not None:
        raise one.fault(
            "is a weight of the model itself, of which adapters cannot have their own (PEFT leaves them out with "
            "save_embedding_layers=False)"
        )
    if found is None or ours is None:
        raise one.fault("is no factor of a LoRA adapter of Mistral 7B")
    return ours, found[2]


def _pair(ours: str, halves: dict[str, StoredTensor], outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Return A (r, K) and B (N, r) of one Linear, after checking shapes and types."""
    if len(halves) < 2:
        raise next(iter(halves.values())).fault("is there without its other half")
    a, b = halves["A"], halves["B"]
    r = a.shape[0] if a.shape else 0
    for one, shape in ((a, (r, inputs)), (b, (outputs, r))):
        if one.shape != shape or r == 0:
            raise one.fault(f"is of shape {one.shape}; the model's {ours!r} takes {shape}")
        if not one.dtype.is_floating_point:
            raise one.fault(f"is of {one.dtype}, no plain float")
    return a.view(), b.view()


def save_adapter(
    adapter: Adapter, path: str | os.PathLike[str], args: ModelArgs, format: str = "peft", base_model: str = ""
) -> None:
    """Write an adapter to a new folder for PEFT ("peft") or mistral-finetune ("mistral").

    Values keep their type and bits, except that mistral-finetune's scale is always 2: B is rescaled to match.
    `base_model` is the base model's name, which PEFT records. Raises CheckpointError if `path` exists and is not
    empty, WriteError if it cannot be written.
    """
    if format not in ("peft", "mistral"):
        raise CheckpointError(f"an adapter's format {format!r} is not known: 'peft' or 'mistral'", field="format")
    tensors: dict[str, Tensor] = {}
    for linear, (a, b, scale) in adapter.targets.items():
        name = linear
        if format == "peft":
            heads = rotated_heads(f"{linear}.", args)
            b = b if heads is None else half_split(b, heads)
            name = PREFIX + _theirs(linear)
        elif scale != MISTRAL_SCALE:
            b = (b * (scale / MISTRAL_SCALE)).to(b.dtype)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    with new_folder(pathlib.Path(path), sum(t.nbytes for t in tensors.values())) as folder:
        _write(folder / (FILES[0] if format == "peft" else FILES[1]), tensors)
        if format == "peft":
            write_json(folder / CONFIG, _config(adapter, base_model or adapter.base_model))
        else:
            lora = {"enable": True, "rank": adapter.rank, "dropout": 0.0, "scaling": MISTRAL_SCALE}
            write_json(folder / "params.json", {**mistral.params(args), "lora": lora})


def _write(file: pathlib.Path, tensors: dict[str, Tensor]) -> None:
    ordered = sorted(tensors.items(), key=lambda named: -named[1].dtype.itemsize)  # widest first keeps alignment
    with file.open("wb") as f:
        f.write(header_of((name, t.dtype, tuple(t.shape)) for name, t in ordered))
        for _, t in ordered:
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _theirs(linear: str) -> str:
    """Return Hugging Face's name of a Linear."""
    return str(rename(f"{linear}.weight", "mistral", "huggingface")).removesuffix(".weight")


def _config(adapter: Adapter, base_model: str) -> dict[str, Any]:
    """Return adapter_config.json: the most common rank and alpha, and patterns for the others."""
    ranks = {_theirs(linear): f.a.shape[0] for linear, f in adapter.targets.items()}
    alphas = {_theirs(linear): f.scale * f.a.shape[0] for linear, f in adapter.targets.items()}
    r, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {re.escape(name): n for name, n in ranks.items() if n != r},
        "alpha_pattern": {re.escape(name): n for name, n in alphas.items() if n != alpha},
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "inference_mode": True,
    }
