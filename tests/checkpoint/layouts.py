"""Folders and files as people have them: what each is made of, and what is expected of it.

Weights are small and random (layout_weights.py), tokenizers are true: Mistral's own pieces, with added tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import layout_weights as weights
import torch
from template_shapes import (
    CHATML,
    HERMES_TOOLS,
    MISTRAL_V1,
    SMOLLM,
)
from tokenizer_files import V1, V3, byte_fallback_folder, byte_level_folder, sentencepiece_folder
from tokenizers import AddedToken

HF, MISTRAL, GGUF = "huggingface", "mistral", "gguf"
COMMON_V1, COMMON_V3 = "mistral-common, v1", "mistral-common, v3"
AUTO, TWIN = "transformers", "transformers, of a tokenizer.json of the same tokens"
ITSELF, WEIGHTS, ROUNDED = (
    "transformers",
    "the same weights in transformers",
    "dequantized weights in transformers",
)
IM, EOT, TOOLS = ("<|im_end|>", "<|im_start|>"), ("<|end_of_turn|>", "<|pad_0|>"), ("<tool_call>", "</tool_call>")


@dataclasses.dataclass(frozen=True)
class Places:
    """What a layout is made in: an empty folder; `words` has tokenizers that are made once."""

    folder: pathlib.Path
    words: pathlib.Path

    @property
    def twin(self) -> pathlib.Path:
        """The folder that transformers opens, if it is not the layout itself."""
        return self.folder / "twin"

    @property
    def it(self) -> pathlib.Path:
        """The layout."""
        return self.folder / "it"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout that opens.

    opens     the format that read_args tells
    words     whose ids texts have
    chat      whose ids conversations have; "" if it has no chat template
    ends      the ids that end generation
    compared  whose logits the model has
    make      makes it, and returns the path to open
    """

    opens: str
    words: str
    chat: str
    ends: tuple[int, ...]
    compared: str
    make: Callable[[Places], pathlib.Path]
    adapter: bool = False


# ------------------------------------------------------------------ tokenizers


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def plain(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=False, normalized=False) for name in names]


def controls_of_v3() -> tuple[str, ...]:
    """[INST] and its kin, which the tokenizer.json of v0.3 lists as added tokens."""
    from sentencepiece import SentencePieceProcessor

    m = SentencePieceProcessor(model_file=str(V3))
    return tuple(m.id_to_piece(i) for i in range(3, len(m)) if m.IsControl(i))


def fast(folder: pathlib.Path, model: pathlib.Path, added: list[AddedToken], style: str = "prepend") -> None:
    if model == V3:
        added = [*special(*controls_of_v3()), *added]
    byte_fallback_folder(folder, style, model, added, add_bos_token=True, add_eos_token=False)


of = functools.partial
WORDS: dict[str, Callable[[pathlib.Path], object]] = {
    "v1": lambda f: fast(f, V1, []),
    "v3": lambda f: fast(f, V3, [], "first"),
    "chatml": lambda f: fast(f, V1, special(*IM)),
    "chatml, v3": lambda f: fast(f, V3, special(*IM), "first"),
    "openchat": lambda f: fast(f, V1, special(*EOT)),
    "tools": lambda f: fast(f, V1, [*special(*IM), *plain(*TOOLS)]),
    "padding": lambda f: fast(f, V1, special("[PAD]")),
    "pieces of chatml": lambda f: sentencepiece_folder(f, V1, IM),
    "byte level": lambda f: byte_level_folder(f),
}


def words(
    places: Places, folder: pathlib.Path, name: str, files: tuple[pathlib.Path, ...] = (), **config: Any
) -> pathlib.Path:
    """Put a tokenizer's files into a folder, and more files; `config` is added to tokenizer_config.json."""
    made = places.words / name
    if not made.is_dir():
        WORDS[name](made)
    folder.mkdir(parents=True, exist_ok=True)
    for file in made.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    for file in files:
        shutil.copyfile(file, folder / ("tokenizer.model.v3" if file == V3 else "tokenizer.model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


# ------------------------------------------------------------------ Hugging Face's layout

Write = Callable[[pathlib.Path, weights.State], None]


def hf(
    places: Places, release: str, vocab: int, name: str | None, files: tuple[pathlib.Path, ...] = (), *,
    write: Write = weights.safetensors, fields: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None, folder: pathlib.Path | None = None,
    dtype: torch.dtype = torch.bfloat16, **config: Any,
) -> pathlib.Path:  # fmt: skip
    """A folder of a release with a vocabulary of this size; `config` is of its tokenizer."""
    folder = folder or places.it
    data = weights.config(release, vocab, **(fields or {}))
    weights.write_config(
        folder, data, **({"bos_token_id": 1, "eos_token_id": 2} if generation is None else generation)
    )
    if name is not None:
        words(places, folder, name, files, **config)
    write(folder, weights.state_of(data, dtype))
    return folder


def with_jinja(folder: pathlib.Path, text: str) -> pathlib.Path:
    (folder / "chat_template.jinja").write_text(text)
    return folder


def base_v3(places: Places) -> pathlib.Path:
    """Both layouts' weights in one folder, as in the repository of v0.3."""
    folder = hf(places, "v0.3 base", 32768, "v3", (V3,), write=weights.shards)
    shutil.copyfile(V3, folder / "tokenizer.model")
    data = json.loads((folder / "config.json").read_text())
    weights.consolidated(folder, weights.state_of(data), data)
    return folder


def pieces_alone(places: Places, release: str, **config: Any) -> pathlib.Path:
    """tokenizer.model and tokenizer_config.json without tokenizer.json."""
    folder = hf(places, release, 32000, "v1", (V1,), **config)
    words(places, places.twin, "v1", **config)
    weights.write_config(places.twin, weights.config(release, 32000))
    (folder / "tokenizer.json").unlink()
    return folder


def openhermes(places: Places, decoder: bool = True, **more: Any) -> pathlib.Path:
    """tokenizer.model with added_tokens.json; `decoder`: also added_tokens_decoder, as since transformers 4.34."""
    folder = hf(
        places, "v0.1 base", 32002, "pieces of chatml", write=weights.pickled_shards,
        fields={"eos_token_id": 32000}, generation={"bos_token_id": 1, "eos_token_id": 32000},
        chat_template=CHATML, **more,
    )  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps({name: 32000 + i for i, name in enumerate(IM)}))
    if not decoder:
        path = folder / "tokenizer_config.json"
        data = json.loads(path.read_text())
        del data["added_tokens_decoder"]
        path.write_text(json.dumps(data))
        named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
        (folder / "special_tokens_map.json").write_text(json.dumps(named))
    words(places, places.twin, "chatml", chat_template=CHATML)
    weights.write_config(places.twin, weights.config("v0.1 base", 32002))
    return folder


HERMES = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": HERMES_TOOLS}]
CHAT = {"eos_token": "<|im_end|>", "chat_template": CHATML}


def trainer_checkpoint(places: Places) -> pathlib.Path:
    """checkpoint-500 of transformers' Trainer: states of the optimizer beside the weights."""
    folder = hf(places, "v0.1 base", 32002, "chatml", fields={"eos_token_id": 32000}, **CHAT)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"a": torch.ones(1)}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def transformers_5(places: Places) -> pathlib.Path:
    """What transformers 5 saves of model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = hf(places, "v0.1 base", 32002, "chatml", folder=places.folder / "source", **CHAT)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(places.it)
    AutoTokenizer.from_pretrained(source).save_pretrained(places.it)
    return places.it


def in_cache_of_the_hub(places: Places) -> pathlib.Path:
    """A snapshot: links to files that are named by their hashes."""
    source = hf(
        places, "v0.2 instruct", 32000, "v1", (V1,), folder=places.folder / "source", chat_template=MISTRAL_V1
    )
    blobs, folder = places.folder / "blobs", places.folder / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / f"{i:040}")
        (folder / file.name).symlink_to(pathlib.Path("../../blobs") / f"{i:040}")
    return folder


YARN = {
    "architectures": ["MistralForCausalLM"], "max_sequence_length": 65536, "max_position_embeddings": 32768,
    "auto_map": {"AutoConfig": "configuration_mistral.MistralConfig"},
    "rope_scaling": {"factor": 8.0, "finetuned": True, "original_max_position_embeddings": 8192, "type": "yarn"},
}  # fmt: skip
SMOL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": 2, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "num_attention_heads": 4, "max_position_embeddings": 8192,
}  # fmt: skip


def yarn(places: Places) -> pathlib.Path:
    folder = hf(places, "v0.1 base", 32000, "v1", (V1,), fields=YARN, write=weights.pickle)
    hf(places, "v0.1 base", 32000, "v1", fields={**YARN, "auto_map": {}}, folder=places.twin)
    return folder


def smollm(places: Places) -> pathlib.Path:
    return hf(places, "v0.1 base", 768, "byte level", fields=SMOL, chat_template=SMOLLM)
