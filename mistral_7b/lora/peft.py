"""PEFT's adapter_config.json: what an adapter is, and the scale of each of its Linears."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoint.config import is_positive, read_json
from ..errors import CheckpointError

CONFIG = "adapter_config.json"
MERGE = "merge it with PEFT (`merge_and_unload`, then `save_pretrained`) and open the merged model"

# Fields of the configuration: those read here, and those that do not affect a trained adapter. Which Linears are
# adapted is told by the tensors; the fields that chose them for training are therefore among the latter.
READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "base_model_name_or_path",
}  # fmt: skip
IRRELEVANT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "parent_library", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
PLAIN = {  # field -> the values of plain LoRA, besides those in NOTHING
    "bias": ("none", "all", "lora_only"),  # Mistral 7B has no biases to train
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
}
NOTHING: tuple[Any, ...] = (None, False, {}, [])
CONVERTED = (  # by PEFT, for initializations that change the base model's weights
    f"save it again in PEFT with `path_initial_model_for_weight_conversion`, which makes it plain LoRA, or {MERGE}"
)
UNMERGEABLE = {  # kinds that PEFT cannot merge either
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What is needed of a configuration. `rank` and `alpha` are by Hugging Face's name of a Linear."""

    rank: Callable[[str], float]
    alpha: Callable[[str], float]
    rslora: bool
    dora: bool
    base_model: str

    def scale(self, name: str, r: int) -> float:
        """The scale of a Linear's update of rank r."""
        return self.alpha(name) / (math.sqrt(r) if self.rslora else r)


def read_config(path: pathlib.Path) -> PeftConfig:
    """Read an adapter_config.json. CheckpointError, naming the field, for what is not LoRA or DoRA."""
    data = read_json(path)
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"'peft_type' is {kind!r}; only 'LORA' can be opened",
            field="peft_type",
            place=path,
            hint="it cannot be merged into a model: use it in PEFT itself" if str(kind) in UNMERGEABLE else MERGE,
        )
    for field, value in data.items():
        if field in READ or field in IRRELEVANT or value in NOTHING or value in PLAIN.get(field, ()):
            continue
        converted = field == "init_lora_weights" and value != "loftq"
        raise CheckpointError(
            f"{field!r} is {str(value)[:60]!r}: a variant of LoRA that cannot be opened",
            field=field,
            place=path,
            hint=CONVERTED if converted else MERGE,
        )
    flags = {}
    for field in ("use_rslora", "use_dora", "lora_bias"):
        flags[field] = data.get(field) or False
        if not isinstance(flags[field], bool):
            raise CheckpointError(f"{field!r} is {flags[field]!r}, not true or false", field=field, place=path)
    if flags["use_dora"] and flags["lora_bias"]:
        raise CheckpointError(
            "DoRA with biases ('use_dora' and 'lora_bias') cannot be opened", field="lora_bias", place=path
        )
    return PeftConfig(
        _pattern(path, data, "rank_pattern", "r"), _pattern(path, data, "alpha_pattern", "lora_alpha"),
        flags["use_rslora"], flags["use_dora"], str(data.get("base_model_name_or_path") or ""),
    )  # fmt: skip


def configuration(ranks: Mapping[str, int], alphas: Mapping[str, float], base_model: str) -> dict[str, Any]:
    """An adapter_config.json for Linears by Hugging Face's names: the most common rank and alpha, and patterns."""
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


def _pattern(path: pathlib.Path, data: dict[str, Any], field: str, default: str) -> Callable[[str], float]:
    """Return a map from Linear names to numbers: the first matching pattern or `default`."""
    table = data.get(field) or {}
    if not is_positive(data.get(default)):
        raise CheckpointError(f"{default!r} is {data.get(default)!r}, not a number", field=default, place=path)
    if not isinstance(table, dict) or not all(map(is_positive, table.values())):
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
