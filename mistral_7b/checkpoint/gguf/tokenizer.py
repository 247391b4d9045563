"""The tokenizer of a GGUF file as a folder of Hugging Face style files. Imports no torch.

    llama   tokenizer.model, and tokenizer.json if there are added tokens or a chat template of the file's own;
            a tokenizer.json that the file was made of alone is the only one
    gpt2    tokenizer.json
    both    tokenizer_config.json, generation_config.json (its ends), and what a converter kept (`KEPT`)

The folder is cached in the user's cache folder under the hash of its content, so that repeated loads share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError, TokenizerError, WriteError
from ...files import atomic_write
from ..json_files import object_in
from . import file as gguf_file
from . import pre_tokenizers, sentencepiece_model, tokenizer_json, transformers_templates
from .chat_templates import HEADS
from .vocabulary import ENDS, HF_ALONE, HF_JSON, MODEL, PRE, SPACE, TEMPLATE, TOKENS, UNUSED, Vocabulary

# Files that GGUF has no keys for, and the keys (JSON text) under which this package keeps them.
KEPT = {
    "tokenizer_config.json": "huggingface.tokenizer_config",
    "special_tokens_map.json": "huggingface.special_tokens_map",
    "generation_config.json": "huggingface.generation_config",
}
KEPT_IDS = "huggingface.config"  # `bos_token_id` and `eos_token_id` of config.json
SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def extract(path: pathlib.Path) -> pathlib.Path:
    """Write a GGUF file's tokenizer to a folder in the cache; return the folder.

    Raises TokenizerError if the file has no usable tokenizer.
    """
    try:
        metadata = gguf_file.read(path).metadata
    except CheckpointError as e:
        raise TokenizerError.of(e) from e
    contents = files(path, metadata)
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    try:
        return _write_changed(root / "mistral-7b" / "tokenizers" / digest.hexdigest()[:32], contents)
    except (OSError, WriteError):  # the cache is not writable: use a temporary folder
        return _write_changed(pathlib.Path(tempfile.mkdtemp(prefix="mistral-7b-")), contents)


def has_tokenizer(path: pathlib.Path) -> bool:
    """Return whether a GGUF file brings a tokenizer, of whatever kind."""
    try:
        return gguf_file.read(path).metadata.get(MODEL) not in (None, "none", "no_vocab")
    except CheckpointError as e:
        raise TokenizerError.of(e) from e


def _write_changed(folder: pathlib.Path, contents: Mapping[str, bytes]) -> pathlib.Path:
    """Write those files that the folder does not hold already, each atomically."""
    for name, content in contents.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            with atomic_write(path, folders=True) as beside:
                beside.write_bytes(content)
    return folder


def files(path: pathlib.Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the tokenizer files, by name, that GGUF metadata describes; TokenizerError if it is unusable."""
    vocabulary = Vocabulary.read(path, metadata)
    used = vocabulary.first(vocabulary.size())  # ids of padding have no text
    kept = {name: _kept(metadata, key) for name, key in KEPT.items()}
    adds = {end: metadata.get(f"tokenizer.ggml.add_{end}_token") for end in ("bos", "eos")}
    templates = templates_of(metadata)
    out: dict[str, bytes] = {}
    if metadata[MODEL] == "llama":
        add_bos, add_eos = adds["bos"] is not False, adds["eos"] is True
        base = used.first(used.base_size())
        given = _given_json(metadata, used)
        if given is None or metadata.get(HF_ALONE) is not True:
            out[file_name(metadata)] = sentencepiece_model.serialize(base, metadata)
        added = {token: i for i, token in enumerate(used.tokens) if i >= len(base.tokens)}
        if added and file_name(metadata) in out:
            out["added_tokens.json"] = _text(added)
        prefix = metadata.get("tokenizer.ggml.add_space_prefix") is not False
        settings: dict[str, Any] = {"legacy": True, "add_prefix_space": prefix}  # as llama.cpp, after every token
        if given is not None:
            out["tokenizer.json"] = given
        elif (added or templates) and not kept["tokenizer_config.json"]:  # a converted folder had none
            out["tokenizer.json"] = tokenizer_json.sentencepiece_json(used, prefix, add_bos, add_eos)
    else:
        pre = pre_tokenizers.named(path, metadata.get(PRE))
        add_bos, add_eos = pre.add_bos if adds["bos"] is None else adds["bos"] is True, adds["eos"] is True
        made = tokenizer_json.byte_level_json(used, metadata, pre, add_bos, add_eos)
        out["tokenizer.json"] = _given_json(metadata, used) or made
        settings = {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} if "tokenizer.json" in out else settings
    settings |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    for version, text in transformers_templates.TEMPLATES.items():
        if str(metadata.get(TEMPLATE)).startswith(HEADS[version].strip()):  # templates_of leaves it out
            templates = {"default": text, **templates}
    out["tokenizer_config.json"] = _text(_config(used, settings, templates, kept["tokenizer_config.json"]))
    out["generation_config.json"] = _text(_generation(vocabulary, kept["generation_config.json"]))
    if kept["special_tokens_map.json"]:
        out["special_tokens_map.json"] = _text(kept["special_tokens_map.json"])
    return out


def file_name(metadata: Mapping[str, Any]) -> str:
    """Return the release's name of the SentencePiece file, with the version if it is v2 or v3."""
    if "[INST]" not in metadata[TOKENS]:
        return "tokenizer.model"
    v2 = str(metadata.get(TEMPLATE)).startswith(HEADS["v2"].strip())
    return "tokenizer.model.v2" if v2 else "tokenizer.model.v3"


def templates_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates of a file by name ("default" first).

    Without those that this package writes for Mistral's own vocabularies (chat_templates.py): mistral-common
    encodes the same chats.
    """
    keys = {"default": TEMPLATE} | {
        key.removeprefix(f"{TEMPLATE}."): key for key in metadata if key.startswith(f"{TEMPLATE}.")
    }
    found = {name: metadata[key] for name, key in keys.items() if isinstance(metadata.get(key), str)}
    heads = tuple(head.strip() for head in HEADS.values())
    return {name: text for name, text in found.items() if not text.startswith(heads)}


def config_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return `bos_token_id` and `eos_token_id` as the config.json said that the file was converted from."""
    return _kept(metadata, KEPT_IDS)


def _kept(metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a kept JSON object; empty if there is none, or if it is damaged."""
    return object_in(metadata.get(key))


def _given_json(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> bytes | None:
    """Return the tokenizer.json that a file carries, if its tokens are those of the file."""
    data = _kept(metadata, HF_JSON)
    try:
        tokens = {i: token for token, i in data["model"]["vocab"].items()}
        tokens |= {token["id"]: token["content"] for token in data.get("added_tokens") or []}
        spelled = {i: token.replace(SPACE, " ") for i, token in tokens.items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if spelled.pop(i, None) != token.replace(SPACE, " ") and kind != UNUSED:
            return None
    return None if spelled else str(metadata[HF_JSON]).encode()


def _config(
    vocabulary: Vocabulary, settings: dict[str, Any], templates: Mapping[str, str], kept: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of tokenizer_config.json: as it was kept, but for what the file's own keys say."""
    decoder = {
        str(i): {"content": vocabulary.tokens[i], **tokenizer_json.FLAGS, "special": special}
        for i, special in vocabulary.specials().items()
    }
    before = kept.get("added_tokens_decoder")
    for i, token in decoder.items():
        was = before.get(i) if isinstance(before, dict) else None
        if isinstance(was, dict) and was.get("content") == token["content"]:
            decoder[i] = was
    out = {"added_tokens_decoder": decoder, "clean_up_tokenization_spaces": False, **settings, **kept}
    out |= {"added_tokens_decoder": decoder} | {k: settings[k] for k in ("add_bos_token", "add_eos_token")}
    for name, short in SPECIALS.items():
        text, was = vocabulary.text_of(short), out.get(name)
        if text is not None and text != (was.get("content") if isinstance(was, dict) else was):
            out[name] = text
    out.pop("chat_template", None)
    if list(templates) == ["default"]:
        out["chat_template"] = templates["default"]
    elif templates:
        out["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return out


def _generation(vocabulary: Vocabulary, kept: dict[str, Any]) -> dict[str, Any]:
    """Return the content of generation_config.json: as it was kept, with the ends that the file's keys name."""
    ends = list(dict.fromkeys(vocabulary.ids[end] for end in ENDS if end in vocabulary.ids))
    out: dict[str, Any] = dict(kept) or {"_from_model_config": True}
    if "bos" in vocabulary.ids and (not kept or "bos_token_id" in kept):
        out["bos_token_id"] = vocabulary.ids["bos"]
    were = out.get("eos_token_id")
    if ends and not set(ends) <= set(were if isinstance(were, list) else [were]):
        out["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return out


def _text(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
