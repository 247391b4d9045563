"""Layouts of Mistral, of quantizers and of GGUF, and an adapter: see layouts.py."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import foreign
import layout_weights as weights
import torch
from layouts import CHAT, IM, SMOL, Places, hf, words
from template_shapes import CHATML
from tiny import tokens_of
from tokenizer_files import V1, V3, pieces

from mistral_7b import Mistral7B
from mistral_7b.checkpoint import convert, quantize

# ------------------------------------------------------------------ Mistral's layout


def mistrals(places: Places, release: str, vocab: int, model: pathlib.Path, pickled: bool = False) -> pathlib.Path:
    data = weights.config(release, vocab)
    weights.consolidated(places.it, weights.state_of(data), data, pickled)
    shutil.copyfile(model, places.it / ("tokenizer.model.v3" if model == V3 else "tokenizer.model"))
    hf(places, release, vocab, None, folder=places.twin)
    return places.it


# ------------------------------------------------------------------ quantized


def dequantized(model: Mistral7B) -> Mistral7B:
    """The model with plain float32 weights."""
    out = Mistral7B(model.args, dtype=torch.float32)
    state = {}
    for name in out.state_dict():
        module = model.get_submodule(name.removesuffix(".weight"))
        state[name] = module.dequantized().float() if hasattr(module, "dequantized") else module.weight.float()
    out.load_state_dict(state)
    return out


def quantized(places: Places, scheme: str) -> pathlib.Path:
    """A folder of `quantize`, of a fine-tune."""
    source = hf(places, "v0.2 base", 32002, "chatml", folder=places.folder / "source", **CHAT)
    quantize(source, places.it, scheme, tokens_of((2, 20)), "random tokens")
    words(places, places.twin, "chatml", **CHAT)
    data = json.loads((source / "config.json").read_text())
    state = {name: value.float() for name, value in weights.state_of(data).items()}
    model = dequantized(Mistral7B.from_pretrained(places.it, dtype=torch.float32)).state_dict()
    for theirs, ours, _ in weights.names(data["num_hidden_layers"]):
        heads = {"q_proj": 6, "k_proj": 2}.get(theirs.split(".")[-2])
        value = model[ours] if heads is None else weights.halved(model[ours], heads)
        assert (value - state[theirs]).abs().max() < state[theirs].abs().max() / 4  # no other weight
        state[theirs] = value.contiguous()
    weights.write_config(places.twin, data)
    weights.safetensors(places.twin, state)
    return places.it


def packed(places: Places, case: str) -> pathlib.Path:
    args = dataclasses.replace(foreign.ARGS, vocab_size=32002, sliding_window=None, rope_theta=1e6)
    foreign.write(places.folder, *foreign.CASES[case], args=args)
    for folder in (places.folder / "quantized", places.folder / "plain"):
        words(places, folder, "chatml", **CHAT)
    (places.folder / "plain").rename(places.twin)
    return places.folder / "quantized"


# ------------------------------------------------------------------ GGUF

SENTENCEPIECE = {"tokenizer_model": "llama", "bos_token_id": 1, "unk_token_id": 0, "add_bos_token": True}


def gguf(
    places: Places, kind: str, added: tuple[str, ...] = (), *, early: bool = False, split: int = 1,
    sizes: dict[str, int] = weights.SMALL, release: str = "v0.2 base", **keys: Any,
) -> pathlib.Path:  # fmt: skip
    """A GGUF file as llama.cpp's converter writes it, and beside it the same weights, dequantized."""
    vocab = pieces(V1)[2] + len(added)
    data = weights.config(release, vocab, **sizes)
    given = SENTENCEPIECE | weights.pieces_in_gguf(V1, list(added), early) | keys
    if not early:
        given |= {"tokenizer_pre": "default", "add_space_prefix": True, "file_type": 1}
    places.it.mkdir()
    path = places.it / "model.gguf"
    weights.write_gguf(path, data, weights.state_of(data), kind, given, split)
    return twin_of_gguf(places, path, data)


def twin_of_gguf(places: Places, path: pathlib.Path, data: dict[str, Any], name: str = "") -> pathlib.Path:
    files = sorted(path.parent.glob("*.gguf"))
    weights.write_config(places.twin, data)
    weights.safetensors(places.twin, weights.read_gguf(files, data))
    words(places, places.twin, name or ("chatml" if data["vocab_size"] == 32002 else "v1"), chat_template=CHATML)
    return files[0]


def k_types(places: Places) -> pathlib.Path:
    """Q4_K_M, quantized by `convert` from a bf16 file."""
    big = gguf(places, "BF16", IM, sizes=weights.WIDE, **CHATML_KEYS)
    out = places.folder / "out"
    out.mkdir()
    convert(big, out / "model.Q4_K_M.gguf", to="gguf", type="q4_k_m")
    shutil.rmtree(places.twin)
    return twin_of_gguf(places, out / "model.Q4_K_M.gguf", weights.config("v0.2 base", 32002, **weights.WIDE))


def byte_level_gguf(places: Places) -> pathlib.Path:
    """A vocabulary of the kind "gpt2", of a Llama with tied embeddings."""
    made = words(places, places.twin, "byte level")
    model = json.loads((made / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    data = weights.config("v0.1 base", len(tokens), **SMOL)
    keys = {
        "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": tokens,
        "token_types": [3 if i < 3 else 1 for i in range(len(tokens))], "bos_token_id": 1, "eos_token_id": 2,
        "add_bos_token": False, "chat_template": CHATML,
        "token_merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
    }  # fmt: skip
    places.it.mkdir()
    weights.write_gguf(places.it / "model.gguf", data, weights.state_of(data), "BF16", keys)
    return twin_of_gguf(places, places.it / "model.gguf", data, "byte level")


CHATML_KEYS = {"eos_token_id": 32000, "chat_template": CHATML}


# ------------------------------------------------------------------ adapters


def adapter(places: Places) -> pathlib.Path:
    """A base, and beside it an adapter that resized the vocabulary, with its own tokenizer."""
    import peft
    from transformers import AutoModelForCausalLM

    base = hf(places, "v0.1 base", 32000, "v1", (V1,))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.resize_token_embeddings(32002, mean_resizing=False)
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    made.save_pretrained(places.folder / "adapter", save_embedding_layers=True)
    words(places, places.folder / "adapter", "chatml", **CHAT)
    made.merge_and_unload().save_pretrained(places.twin)
    words(places, places.twin, "chatml", **CHAT)
    return base
