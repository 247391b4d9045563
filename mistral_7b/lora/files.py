"""Read and write LoRA adapters of PEFT, mistral-finetune and llama.cpp, in Mistral's names and layout.

An adapter holds two low-rank factors for each adapted Linear: W becomes W + scale * B A.

    PEFT               adapter_config.json, adapter_model.safetensors (or .bin): base_model.model.{Hugging Face's
                       name}.lora_A.weight; the rows of B for q and k are in Hugging Face's order (names.py);
                       scale alpha / r, or alpha / sqrt(r) with use_rslora
    mistral-finetune   lora.safetensors: {Mistral's name}.lora_A.weight; scale 2, or that of params.json beside it
    llama.cpp          one GGUF file: {GGUF's name}.weight.lora_a; scale adapter.lora.alpha / r

PEFT's adapters can also have weights of their own in place of the model's (`modules_to_save`, a resized
vocabulary), magnitudes (DoRA), biases, and factors of the embedding.

r rank · K inputs · N outputs · V vocabulary · D width
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint import hub, mistral
from ..checkpoint.config import is_positive, read_json
from ..checkpoint.gguf.file import is_gguf
from ..checkpoint.names import EMBEDDING, OUTPUT, expected, half_split, interleaved, rename, rotated_heads
from ..checkpoint.stored import StoredTensor, read_file
from ..checkpoint.tokenizer_files import TokenizerFiles
from ..checkpoint.writing import check_target, header_of, new_folder, write_json
from ..errors import CheckpointError
from ..model import ModelArgs
from . import gguf, peft
from .peft import CONFIG, configuration

PREFIX = "base_model.model."
MISTRAL_SCALE = 2.0

# What a tensor is, by the end of its name: factors, magnitudes and biases of a weight, or a weight itself.
PARTS = {
    "huggingface": (
        (re.compile(r"(.+)\.lora_([AB])\.weight"), ""),
        (re.compile(r"(.+)\.lora_embedding_([AB])"), "embedding "),
        (re.compile(r"(.+)\.lora_(magnitude)_vector(?:\.weight)?"), ""),
        (re.compile(r"(.+)\.lora_B\.(bias)"), ""),
        (re.compile(r"(.+?)(?:\.base_layer)?\.(weight)"), ""),
    ),
    "mistral": ((re.compile(r"(.+)\.lora_([AB])\.weight"), ""),),
    "gguf": ((re.compile(r"(.+)\.weight\.lora_([ab])"), ""), (re.compile(r"(.+)\.(weight)"), "")),
}


class Factors(NamedTuple):
    """The update of one weight (N, K): scale * b @ a. Of the embedding, N is V and K is D."""

    a: Tensor  # (r, K)
    b: Tensor  # (N, r)
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in Mistral's names and layout."""

    targets: Mapping[str, Factors]  # keyed by the Linear's name, such as "layers.0.attention.wq"
    source: str = ""  # the path it was read from
    base_model: str = ""  # the base model's name in its configuration
    magnitudes: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # DoRA: (N,), by Linear
    biases: Mapping[str, Tensor] = dataclasses.field(
        default_factory=dict
    )  # (N,), by Linear; scaled as its factors
    weights: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # in place of the model's, by name
    tokenizer: pathlib.Path | None = None  # the folder or GGUF file of its tokenizer; None: the base's

    @property
    def rank(self) -> int:
        """The largest rank among the targets."""
        return max((f.a.shape[0] for f in self.targets.values()), default=0)

    def args(self, base: ModelArgs) -> ModelArgs:
        """The configuration of the base model with this adapter: its vocabulary, and what is still tied."""
        own = [self.weights[name] for name in (EMBEDDING, OUTPUT) if name in self.weights]
        if own:
            base = dataclasses.replace(base, vocab_size=own[0].shape[0])
        if not base.tie_embeddings:
            return base
        # PEFT adapts each of two tied modules alone; they stay tied with equal weights for both.
        alone = {"tok_embeddings", "output"} & self.targets.keys() or len(own) == 1
        tied = not alone and (not own or torch.equal(*own))
        return dataclasses.replace(base, tie_embeddings=tied)


def read_adapter(path: str | os.PathLike[str], args: ModelArgs) -> Adapter:
    """Read an adapter from a folder, from a weight file with its configuration beside it, or from the hub by id.

    `args` is the configuration of the base model. Raises CheckpointError, naming the field or tensor, if the
    adapter is another variant of LoRA, does not fit the model, or is damaged. A pickle (.bin) is opened with
    `weights_only=True`.
    """
    file = _find(hub.resolve_adapter(path))
    if is_gguf(file):
        stored, alpha = gguf.read(file)
        return _assembled(file, stored, args, "gguf", lambda weight, r: alpha / r if alpha else 1.0)
    stored = read_file(file)
    if file.with_name(CONFIG).is_file() or any(name.startswith(PREFIX) for name in stored):
        return _read_peft(file, stored, args)
    beside = file.with_name("params.json")
    lora = read_json(beside).get("lora") if beside.is_file() else None
    scale = lora.get("scaling", MISTRAL_SCALE) if isinstance(lora, dict) else MISTRAL_SCALE
    if not is_positive(scale):
        raise CheckpointError(f"'lora.scaling' is {scale!r}, not a number", field="lora.scaling", place=beside)
    return _assembled(file, stored, args, "mistral", lambda weight, r: float(scale))


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    found = [path / name for name in hub.ADAPTER_FILES if (path / name).is_file()]
    inside = found or [file for file in sorted(path.glob("*.gguf")) if gguf.is_adapter(file)]
    if not inside:
        model = any((path / name).is_file() for name in hub.CONFIG_FILES) and hub.weight_groups(os.listdir(path))
        raise CheckpointError(
            f"holds no adapter ({', '.join(hub.ADAPTER_FILES)})",
            place=path,
            hint="this folder is a model: name it as the MODEL, and an adapter of it as the adapter" if model
            else f"a folder of PEFT has {CONFIG} and {hub.ADAPTER_FILES[0]}",
        )  # fmt: skip
    return inside[0]


def _read_peft(file: pathlib.Path, stored: dict[str, StoredTensor], args: ModelArgs) -> Adapter:
    path = file.with_name(CONFIG)
    if not path.is_file():
        raise CheckpointError(
            f"PEFT's weights without {CONFIG} beside them, which has their scale",
            place=file,
            hint=f"fetch {CONFIG} too",
        )
    config = peft.read_config(path)

    def scale(weight: str, r: int) -> float:
        name = str(rename(weight, "mistral", "huggingface")).removesuffix(".weight")
        if config.rank(name) != r:
            raise CheckpointError(
                f"{name!r} is of rank {r}; {CONFIG} says {config.rank(name)}", field=name, place=file
            )
        return config.scale(name, r)

    adapter = _assembled(file, stored, args, "huggingface", scale, config.base_model)
    lora = {name for name in adapter.targets if name != "tok_embeddings"}
    if config.dora != bool(adapter.magnitudes) or (config.dora and adapter.magnitudes.keys() != lora):
        raise CheckpointError(
            f"'use_dora' is {config.dora}, and {len(adapter.magnitudes)} of {len(lora)} Linears have a magnitude",
            field="use_dora",
            place=path,
        )
    words = hub.sentencepiece_file(file.parent) or file.with_name("tokenizer.json")
    return dataclasses.replace(adapter, tokenizer=file.parent if words.is_file() else None)


def _assembled(
    file: pathlib.Path,
    stored: dict[str, StoredTensor],
    args: ModelArgs,
    layout: str,
    scale: Callable[[str, int], float],
    base_model: str = "",
) -> Adapter:
    """Return the adapter of these tensors, by Mistral's names and in its layout, in forward order."""
    hint = f"it is an adapter of another model{f', {base_model}' if base_model else ''}: use it with that one"
    found: dict[str, dict[str, StoredTensor]] = {}
    for one in stored.values():
        ours, part = _place(one, layout)
        found.setdefault(ours, {})[part] = one
    if not found:
        raise CheckpointError("holds no tensor of an adapter", place=file)
    shapes = dict(expected(_resized(found, args, hint)))
    if beyond := next((parts for name, parts in found.items() if name not in shapes), None):
        raise next(iter(beyond.values())).fault(f"lies beyond the {args.n_layers} layers of the model", hint=hint)
    targets: dict[str, Factors] = {}
    more: dict[str, dict[str, Tensor]] = {"magnitude": {}, "bias": {}, "weight": {}}
    for ours, shape in shapes.items():
        parts, linear = found.get(ours, {}), ours.removesuffix(".weight")
        heads = rotated_heads(ours, args) if layout == "huggingface" else None
        read = functools.partial(_values, parts, ours, heads, hint)
        if "weight" in parts:
            more["weight"][ours] = read("weight", shape)
        if not parts.keys() - {"weight"}:
            continue
        if lacking := sorted({"A", "B"} - parts.keys()):
            raise next(iter(parts.values())).fault(f"is there without the factor {' and '.join(lacking)}")
        outputs, inputs = shape[0], shape[-1]
        if ours == EMBEDDING:  # its factors are stored transposed
            outputs, inputs = inputs, outputs
        r = parts["A"].shape[0] if parts["A"].shape else 0
        a, b = read("A", (max(r, 1), inputs)), read("B", (outputs, r))
        targets[linear] = Factors(*((b.T, a.T) if ours == EMBEDDING else (a, b)), scale(ours, r))
        for part in ("magnitude", "bias"):
            if part in parts:
                more[part][linear] = read(part, (outputs,))
    return Adapter(targets, str(file), base_model, more["magnitude"], more["bias"], more["weight"])


def _values(
    parts: dict[str, StoredTensor], ours: str, heads: int | None, hint: str, part: str, shape: tuple[int, ...]
) -> Tensor:
    """Return a part of a weight, after checking shape and type, with its rows in Mistral's order."""
    one = parts[part]
    if one.shape != shape:
        raise one.fault(f"is of shape {one.shape}; the model's {ours!r} takes {shape}", hint=hint)
    if not one.dtype.is_floating_point:
        raise one.fault(f"is of {one.dtype}, no plain float")
    return one.view() if heads is None or part == "A" else interleaved(one.view(), heads)


def _resized(found: dict[str, dict[str, StoredTensor]], args: ModelArgs, hint: str) -> ModelArgs:
    """Return the base model's configuration with the vocabulary that the adapter's own weights bring."""
    whole = [found[name]["weight"] for name in (EMBEDDING, OUTPUT) if "weight" in found.get(name, {})]
    if not whole or len(whole[0].shape) != 2 or whole[0].shape[0] == args.vocab_size:
        return args
    if len(whole) < 2:
        raise whole[0].fault(
            f"has {whole[0].shape[0]} tokens, and the model {args.vocab_size}; the adapter lacks the other of "
            "embedding and output",
            hint=hint,
        )
    return dataclasses.replace(args, vocab_size=whole[0].shape[0])


def _place(one: StoredTensor, layout: str) -> tuple[str, str]:
    """Return the weight (Mistral's name) that a tensor belongs to, and its part: A, B, magnitude, bias, weight."""
    name = one.name.removeprefix(PREFIX)
    for pattern, kind in PARTS[layout]:
        if (found := pattern.fullmatch(name)) and (ours := rename(f"{found[1]}.weight", layout, "mistral")):
            part = found[2].upper() if layout == "gguf" and len(found[2]) == 1 else found[2]
            if part != "weight" and (ours == EMBEDDING) != (kind == "embedding "):
                hint = peft.MERGE if layout == "huggingface" else "open PEFT's files of this adapter"
                raise one.fault("adapts the embedding in a way that cannot be opened", hint=hint)
            return ours, part
    raise one.fault(
        "is no tensor of a LoRA adapter of Mistral 7B", hint="if it is one of another model, use it with that one"
    )


def save_adapter(
    adapter: Adapter, path: str | os.PathLike[str], args: ModelArgs, format: str = "peft", base_model: str = ""
) -> None:
    """Write an adapter to a new folder for PEFT ("peft") or mistral-finetune ("mistral"), or a new "gguf" file.

    Values keep their type and bits, except where a format has one scale, or one alpha, for all Linears: there the
    B of others is rescaled. mistral-finetune's scale is 2, and llama.cpp's is its alpha over the rank. With PEFT's
    files go those of the adapter's tokenizer, and the name of its base, `base_model` if it is given.

    Raises CheckpointError if `path` exists and is not an empty folder, or for an adapter with more than the
    factors of Linears; WriteError if it cannot be written.
    """
    path = pathlib.Path(path)
    if format not in ("peft", "mistral", "gguf"):
        raise CheckpointError(
            f"an adapter's format {format!r} is not known: 'peft', 'mistral' or 'gguf'", field="format"
        )
    if adapter.magnitudes or adapter.biases or adapter.weights or "tok_embeddings" in adapter.targets:
        raise CheckpointError(
            "only the factors of Linears can be written, and this adapter has more", field="adapter", place=path
        )
    if format == "gguf":
        check_target(path, 0, file=True)
        gguf.write(path, *_of_gguf(adapter), name=path.stem)
        return
    peft = format == "peft"
    tensors = _of_peft(adapter, args) if peft else _of_mistral(adapter)
    with new_folder(path, sum(t.nbytes for t in tensors.values())) as folder:
        _write(folder / hub.ADAPTER_FILES[0 if peft else 1], tensors)
        if peft:
            ranks = {_theirs(linear): len(f.a) for linear, f in adapter.targets.items()}
            alphas = {_theirs(linear): f.scale * len(f.a) for linear, f in adapter.targets.items()}
            write_json(folder / CONFIG, configuration(ranks, alphas, base_model or adapter.base_model))
            TokenizerFiles.of(adapter.tokenizer).copy_to(folder)
        else:
            lora = {"enable": True, "rank": adapter.rank, "dropout": 0.0, "scaling": MISTRAL_SCALE}
            write_json(folder / "params.json", {**mistral.params(args), "lora": lora})


def _of_peft(adapter: Adapter, args: ModelArgs) -> dict[str, Tensor]:
    tensors = {}
    for linear, (a, b, _) in adapter.targets.items():
        heads = rotated_heads(f"{linear}.", args)
        name = f"{PREFIX}{_theirs(linear)}.lora_{{}}.weight"
        tensors[name.format("A")], tensors[name.format("B")] = a, b if heads is None else half_split(b, heads)
    return tensors


def _of_mistral(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for linear, f in adapter.targets.items():
        tensors[f"{linear}.lora_A.weight"] = f.a
        tensors[f"{linear}.lora_B.weight"] = _rescaled(f, MISTRAL_SCALE)
    return tensors


def _of_gguf(adapter: Adapter) -> tuple[dict[str, Tensor], float]:
    """The tensors by GGUF's names, and the alpha of most Linears, to which the others are rescaled."""
    tensors = {}
    alpha = Counter(f.scale * len(f.a) for f in adapter.targets.values()).most_common(1)[0][0]
    for linear, f in adapter.targets.items():
        name = rename(f"{linear}.weight", "mistral", "gguf")
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = f.a, _rescaled(f, alpha / len(f.a))
    return tensors, alpha


def _rescaled(f: Factors, scale: float) -> Tensor:
    """The b of the same update with another scale."""
    return f.b if f.scale == scale else (f.b * (f.scale / scale)).to(f.b.dtype)


def _write(file: pathlib.Path, tensors: dict[str, Tensor]) -> None:
    ordered = sorted(tensors.items(), key=lambda named: -named[1].dtype.itemsize)  # widest first keeps alignment
    with file.open("wb") as f:
        f.write(header_of((name, t.dtype, tuple(t.shape)) for name, t in ordered))
        for _, t in ordered:
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _theirs(linear: str) -> str:
    """Return Hugging Face's name of a Linear."""
    return str(rename(f"{linear}.weight", "mistral", "huggingface")).removesuffix(".weight")
