"""The layouts that people have, and what is refused: the table of docs/checkpoints.md."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import layout_weights as weights
import torch
from layouts import (
    AUTO,
    CHAT,
    COMMON_V1,
    COMMON_V3,
    GGUF,
    HERMES,
    HF,
    IM,
    ITSELF,
    MISTRAL,
    ROUNDED,
    TWIN,
    WEIGHTS,
    Layout,
    Places,
    base_v3,
    hf,
    in_cache_of_the_hub,
    openhermes,
    pieces_alone,
    smollm,
    trainer_checkpoint,
    transformers_5,
    with_jinja,
    yarn,
)
from layouts_others import CHATML_KEYS, adapter, byte_level_gguf, gguf, k_types, mistrals, packed, quantized
from template_shapes import DOLPHIN, MISTRAL_2023, MISTRAL_V1, MISTRAL_V3, OPENCHAT, ZEPHYR
from tokenizer_files import V1, V3

ENDS_IM = {"fields": {"eos_token_id": 32000}, "generation": {"bos_token_id": 1, "eos_token_id": 32000}}
of = functools.partial
V3_IM = {"fields": {"eos_token_id": 32768}, "generation": {"bos_token_id": 1, "eos_token_id": 32768}}
LAYOUTS: dict[str, Layout] = {
    # Mistral's releases, in both layouts
    "Mistral 7B v0.1, shards, tokenizer.json and tokenizer.model": Layout(HF, COMMON_V1, "", (2,), ITSELF, of(
        hf, release="v0.1 base", vocab=32000, name="v1", files=(V1,), write=weights.shards)),
    "Instruct v0.1": Layout(HF, COMMON_V1, COMMON_V1, (2,), ITSELF, of(
        hf, release="v0.1 instruct", vocab=32000, name="v1", files=(V1,), write=weights.pickled_shards,
        chat_template=MISTRAL_2023)),
    "Instruct v0.2": Layout(HF, COMMON_V1, COMMON_V1, (2,), ITSELF, of(
        hf, release="v0.2 instruct", vocab=32000, name="v1", files=(V1,), write=weights.shards,
        chat_template=MISTRAL_V1)),
    "Instruct v0.2, tokenizer.model alone": Layout(HF, COMMON_V1, COMMON_V1, (2,), ITSELF, of(
        pieces_alone, release="v0.2 instruct", chat_template=MISTRAL_2023)),
    "Instruct v0.2, a snapshot in the hub's cache": Layout(
        HF, COMMON_V1, COMMON_V1, (2,), ITSELF, in_cache_of_the_hub),
    "Mistral 7B v0.3, with consolidated.safetensors": Layout(HF, COMMON_V3, COMMON_V3, (2,), ITSELF, base_v3),
    "Instruct v0.3": Layout(HF, COMMON_V3, COMMON_V3, (2,), ITSELF, of(
        hf, release="v0.3 instruct", vocab=32768, name="v3", files=(V3,), chat_template=MISTRAL_V3)),
    "Instruct v0.3, tokenizer.json alone": Layout(HF, AUTO, AUTO, (2,), ITSELF, of(
        hf, release="v0.3 instruct", vocab=32768, name="v3", chat_template=MISTRAL_V3)),
    "v0.1 in Mistral's layout, consolidated.00.pth": Layout(MISTRAL, COMMON_V1, COMMON_V1, (2,), WEIGHTS, of(
        mistrals, release="v0.1 base", vocab=32000, model=V1, pickled=True)),
    "Instruct v0.2 in Mistral's layout, consolidated.00.pth": Layout(
        MISTRAL, COMMON_V1, COMMON_V1, (2,), WEIGHTS, of(
            mistrals, release="v0.2 instruct", vocab=32000, model=V1, pickled=True)),
    "Instruct v0.3 in Mistral's layout, consolidated.safetensors": Layout(
        MISTRAL, COMMON_V3, COMMON_V3, (2,), WEIGHTS, of(
            mistrals, release="v0.3 instruct", vocab=32768, model=V3)),
    # fine-tunes
    "OpenHermes 2.5: tokenizer.model, added_tokens.json, pytorch_model shards": Layout(
        HF, TWIN, TWIN, (32000,), ITSELF, openhermes),
    "the same without added_tokens_decoder": Layout(
        HF, TWIN, TWIN, (32000,), ITSELF, of(openhermes, decoder=False)),
    "Hermes 2 Pro: 32032, named templates": Layout(HF, AUTO, AUTO, (32000,), ITSELF, of(
        hf, release="v0.1 base", vocab=32032, name="tools", files=(V1,), dtype=torch.float16,
        eos_token="<|im_end|>", chat_template=HERMES, **ENDS_IM)),
    "Zephyr beta": Layout(HF, AUTO, AUTO, (2,), ITSELF, of(
        hf, release="v0.1 base", vocab=32000, name="v1", files=(V1,), chat_template=ZEPHYR, pad_token="</s>")),
    "Dolphin 2.9.3 on v0.3: 32770": Layout(HF, AUTO, AUTO, (32768, 2), ITSELF, of(
        hf, release="v0.3 base", vocab=32770, name="chatml, v3", eos_token="<|im_end|>", chat_template=DOLPHIN,
        fields={"eos_token_id": 32768}, generation={"bos_token_id": 1, "eos_token_id": 2})),
    "OpenChat 3.5: 32002": Layout(HF, AUTO, AUTO, (32000,), ITSELF, of(
        hf, release="v0.1 base", vocab=32002, name="openchat", files=(V1,), eos_token="<|end_of_turn|>",
        chat_template=OPENCHAT, **ENDS_IM)),
    "Starling: the same, with a <sep> token": Layout(HF, AUTO, AUTO, (32000,), ITSELF, of(
        hf, release="v0.1 base", vocab=32002, name="openchat", eos_token="<|end_of_turn|>", sep_token="<sep>",
        pad_token="<|end_of_turn|>", chat_template=OPENCHAT, **ENDS_IM)),
    "a merge of mergekit: tokenizer.json, chat_template.jinja": Layout(
        HF, AUTO, AUTO, (32000, 2), ITSELF, lambda p: with_jinja(hf(
            p, "v0.1 base", 32002, "chatml", write=weights.shards, generation={},
            eos_token="<|im_end|>"), DOLPHIN)),
    "a save of transformers 5": Layout(HF, AUTO, AUTO, (32000, 2), ITSELF, transformers_5),
    "a checkpoint of transformers' Trainer": Layout(HF, AUTO, AUTO, (32000, 2), ITSELF, trainer_checkpoint),
    "padded to 32064": Layout(HF, AUTO, AUTO, (32000,), ITSELF, of(
        hf, release="v0.2 base", vocab=32064, name="chatml", **CHAT, **ENDS_IM)),
    "an added [PAD]: 32001, pytorch_model.bin": Layout(HF, AUTO, "", (2,), ITSELF, of(
        hf, release="v0.1 base", vocab=32001, name="padding", files=(V1,), write=weights.pickle, pad_token="[PAD]",
        dtype=torch.float16)),
    "ends as a list": Layout(HF, AUTO, AUTO, (2, 32000), ITSELF, of(
        hf, release="v0.2 base", vocab=32002, name="chatml", chat_template=CHATML_KEYS["chat_template"],
        generation={"bos_token_id": 1, "eos_token_id": [2, 32000]})),
    "Yarn-Mistral-7b-64k": Layout(HF, COMMON_V1, "", (2,), WEIGHTS, yarn),
    "rope scaling of type dynamic": Layout(HF, COMMON_V1, "", (2,), ITSELF, of(
        hf, release="v0.1 base", vocab=32000, name="v1", files=(V1,),
        fields={"rope_scaling": {"type": "dynamic", "factor": 2.0}})),
    "a Llama without differences, tied (SmolLM2)": Layout(HF, AUTO, AUTO, (2,), ITSELF, smollm),
    # quantized
    "int8 of `quantize`": Layout("quantized", AUTO, AUTO, (32000, 2), ROUNDED, of(quantized, scheme="int8")),
    "int4 of `quantize`": Layout("quantized", AUTO, AUTO, (32000, 2), ROUNDED, of(quantized, scheme="int4")),
    "GPTQ": Layout("gptq", AUTO, AUTO, (32000, 2), ROUNDED, of(packed, case="GPTQ, desc_act")),
    "AWQ": Layout("awq", AUTO, AUTO, (32000, 2), ROUNDED, of(packed, case="AWQ")),
    "compressed-tensors, W4A16": Layout("compressed-tensors", AUTO, AUTO, (32000, 2), ROUNDED, of(
        packed, case="packed int4")),
    # GGUF
    "GGUF, bf16": Layout(GGUF, TWIN, TWIN, (32000,), ROUNDED, of(gguf, kind="BF16", added=IM, **CHATML_KEYS)),
    "GGUF, Q8_0": Layout(GGUF, TWIN, TWIN, (32000,), ROUNDED, of(gguf, kind="Q8_0", added=IM, **CHATML_KEYS)),
    "GGUF, Q4_K_M": Layout(GGUF, TWIN, TWIN, (32000,), ROUNDED, k_types),
    "GGUF, split": Layout(GGUF, TWIN, TWIN, (32000,), ROUNDED, of(
        gguf, kind="Q8_0", added=IM, split=3, **CHATML_KEYS)),
    "GGUF of an early converter: added tokens as a user's own": Layout(GGUF, TWIN, TWIN, (32000,), ROUNDED, of(
        gguf, kind="Q4_0", added=IM, early=True, **CHATML_KEYS)),
    "GGUF of a base model, F16": Layout(GGUF, TWIN, "", (2,), ROUNDED, of(gguf, kind="F16", eos_token_id=2)),
    "GGUF of Instruct v0.2": Layout(GGUF, COMMON_V1, COMMON_V1, (2,), ROUNDED, of(
        gguf, kind="Q8_0", eos_token_id=2, chat_template=MISTRAL_V1)),
    "GGUF with a vocabulary of the kind gpt2": Layout(GGUF, AUTO, AUTO, (2,), ROUNDED, byte_level_gguf),
    "a folder with one GGUF file": Layout(GGUF, TWIN, TWIN, (32000,), ROUNDED, lambda p: gguf(
        p, "Q8_0", IM, **CHATML_KEYS).parent),
    "a base with an adapter that has its own tokenizer": Layout(
        HF, AUTO, AUTO, (32000, 2), "merged by PEFT", adapter, adapter=True),
}  # fmt: skip


# ------------------------------------------------------------------ without a tokenizer, and refused


class Refused(NamedTuple):
    """What is refused: the essential part of the sentence, and who refuses, "model", "tokenizer" or "text"."""

    says: str
    make: Callable[[Places], pathlib.Path]
    by: str = "model"


def edited(folder: pathlib.Path, **fields: Any) -> pathlib.Path:
    """A folder whose config.json has more fields."""
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | fields))
    return folder


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4995584424\n"


def plain(p: Places, **more: Any) -> pathlib.Path:
    return hf(p, "v0.2 base", 67, None, **more)


def without(folder: pathlib.Path, name: str) -> pathlib.Path:
    (folder / name).unlink()
    return folder


def with_file(folder: pathlib.Path, name: str, text: str = "") -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def an_adapter(p: Places) -> pathlib.Path:
    with_file(p.it, "adapter_config.json", json.dumps({"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}))
    return with_file(p.it, "adapter_model.safetensors", "x")


def two_gguf(p: Places) -> pathlib.Path:
    file = gguf(p, "F16", eos_token_id=2)
    shutil.copyfile(file, file.with_name("other.gguf"))
    return file.parent


def unknown_type(p: Places) -> pathlib.Path:
    """A tensor of type 39, MXFP4."""
    file = gguf(p, "F16", eos_token_id=2)
    raw = file.read_bytes()
    at = raw.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    file.write_bytes(raw[:at] + (39).to_bytes(4, "little") + raw[at + 4 :])
    return file


def training_folder(p: Places) -> pathlib.Path:
    plain(p, folder=p.it / "model")
    return with_file(p.it, "state.pt")


REFUSED: dict[str, Refused] = {
    "an adapter in place of a model": Refused(
        "a LoRA adapter for mistralai/Mistral-7B-v0.1, not a model; name mistralai/Mistral-7B-v0.1, and this with "
        "--adapter", an_adapter),
    "a folder with several GGUF files": Refused(
        "contains 2 GGUF models; name one: model.gguf, other.gguf", two_gguf),
    "a missing shard": Refused("missing, though model.safetensors.index.json maps tensor", lambda p: without(
        plain(p, write=weights.shards), "model-00002-of-00003.safetensors")),
    "shards without their index": Refused("3 shards without model.safetensors.index.json", lambda p: without(
        plain(p, write=weights.shards), "model.safetensors.index.json")),
    "weights as a Git LFS pointer": Refused(
        "a Git LFS pointer, not the file itself; run `git lfs pull`",
        lambda p: with_file(plain(p), "model.safetensors", POINTER)),
    "a tokenizer as a Git LFS pointer": Refused("a Git LFS pointer, not the file itself", lambda p: (
        with_file(plain(p), "tokenizer.model", POINTER))),
    "a folder of `train`": Refused("a training folder; did you mean", training_folder),
    "bitsandbytes": Refused("quantized by bitsandbytes to 4 bits, which cannot be opened; take the unquantized", (
        lambda p: edited(plain(p), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))),
    "fp8": Refused("quantized to fp8, which cannot be opened; take the unquantized model", lambda p: edited(
        plain(p), quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})),
    "Mixtral": Refused("this is Mixtral, a mixture of experts", lambda p: edited(
        plain(p), architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=8)),
    "Mistral Nemo (Tekken)": Refused("Nemo", lambda p: with_file(edited(
        plain(p), vocab_size=131072, hidden_size=5120, head_dim=128), "tekken.json", "{}")),
    "a file that is no checkpoint": Refused("not a file of weights; name a folder with config.json", lambda p: (
        with_file(p.it, "a.safetensors", "root:x:0:0:root") / "a.safetensors")),
    "an empty folder": Refused(
        "an empty folder; download the model into it again", lambda p: p.it.mkdir() or p.it),
    "a GGUF file of an unknown type": Refused("MXFP4", unknown_type),
    "weights without config.json": Refused("contains no config.json or params.json", lambda p: without(
        plain(p), "config.json")),
    "a tokenizer that is larger than the model": Refused("32002 tokens, but", lambda p: hf(
        p, "v0.2 base", 32000, "chatml", **CHAT), by="command"),
    "a Unigram tokenizer": Refused("holds a Unigram model; tokenizers of the Mistral family are BPE", lambda p: (
        with_file(plain(p), "tokenizer.json", json.dumps(
            {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", 0.0]]}}))),
        by="text"),
    "no tokenizer (opens; prompts of ids are answered)": Refused(
        "text prompts and stop strings need a tokenizer, and", plain, by="text"),
    "no chat template (opens; --chat-template names one)": Refused(
        "brings no chat template, so that it is not known how", lambda p: hf(
        p, "v0.2 base", 32002, "chatml"), by="chat"),
}  # fmt: skip


def table() -> str:
    """The table of docs/checkpoints.md."""
    head = ("layout", "opens as, or refused with", "tokenizer", "chat template", "ends", "compared with")
    rows = [head, ("---",) * len(head)]
    for name, x in LAYOUTS.items():
        rows.append((name, x.opens, x.words, x.chat or "none", ", ".join(map(str, x.ends)), x.compared))
    rows += [(name, f"*{x.says}*", "", "", "", "") for name, x in REFUSED.items()]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
