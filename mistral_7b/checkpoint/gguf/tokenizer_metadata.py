"""The tokenizer keys of a GGUF file from a folder of tokenizer files, as llama.cpp's converter writes them.

    tokenizer.model                                   "llama", with the scores of its pieces
    tokenizer.json, BPE with byte pieces              "llama": the score of a piece is minus the rank of its merge
    tokenizer.json, byte-level BPE                    "gpt2", with merges and the name of the pre-tokenizer
    added_tokens.json, tokenizer_config.json          added tokens: CONTROL if special, else USER_DEFINED

What GGUF has no keys for is kept as text (tokenizer.KEPT), so that converting back loses nothing.
"""

from __future__ import annotations

import json
import operator
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ...errors import TokenizerError
from .. import hub
from ..chat_templates import chat_templates
from ..json_files import read_object
from . import pre_tokenizers, sentencepiece_model
from .chat_templates import chat_template, template_version
from .tokenizer import KEPT, KEPT_IDS, SPECIALS
from .tokenizer_json import splits
from .vocabulary import (
    BYTE,
    BYTE_PIECE,
    CONTROL,
    ENDS,
    HF_ALONE,
    HF_JSON,
    MERGES,
    MODEL,
    NORMAL,
    PRE,
    SCORES,
    SPACE,
    TEMPLATE,
    TOKENS,
    TYPES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    looks_special,
)

ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # llama.cpp's converter's, of tokens that no merge makes


class Added(NamedTuple):
    """A token outside the merges."""

    content: str
    special: bool


def of_folder(folder: pathlib.Path, vocab_size: int) -> dict[str, Any] | None:
    """Return the tokenizer keys of a folder's files, padded to `vocab_size`; None if it has no tokenizer.

    Raises TokenizerError for files that are damaged, or that GGUF has no form for.
    """
    try:
        return _of_folder(folder, vocab_size)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as e:  # JSON of other types than usual
        raise TokenizerError(
            f"its tokenizer files are damaged ({e!r:.200})", place=folder, hint="fetch them again"
        ) from e


def _of_folder(folder: pathlib.Path, vocab_size: int) -> dict[str, Any] | None:
    model, whole = hub.sentencepiece_file(folder), folder / "tokenizer.json"
    data = read_object(whole)
    config = read_object(folder / "tokenizer_config.json")
    if model is not None and _same_pieces(data, model):
        keys = of_sentencepiece(model, vocab_size, _added(folder, config, data))
    elif data:
        keys = _of_json(whole, data, vocab_size, _added(folder, config, data))
    else:
        return None
    templates = chat_templates(folder)
    if templates or (config and "[INST]" not in keys[TOKENS]):  # a base model's, in Hugging Face's layout
        keys.pop(TEMPLATE, None)
    for name, template in templates.items():
        keys[TEMPLATE if name == "default" else f"{TEMPLATE}.{name}"] = template.text
    if others := [name for name in templates if name != "default"]:
        keys["tokenizer.chat_templates"] = others
    return keys | _special_keys(folder, config, data, keys) | _kept_keys(folder, config, data)


def of_sentencepiece(
    path: pathlib.Path, vocab_size: int, added: Mapping[int, Added] | None = None
) -> dict[str, Any]:
    """Return the tokenizer keys of a SentencePiece file with `added` tokens (id -> token).

    Mistral's own vocabularies, to which nothing is added, get this package's template of their version.
    """
    base, prefix = sentencepiece_model.read(path)
    vocabulary = _padded(base, added or {}, vocab_size)
    of_kind = {
        kind: {t for t, k in zip(base.tokens, base.types, strict=True) if k == kind} for kind in set(base.types)
    }
    controls = of_kind.get(CONTROL, set())
    special = controls | of_kind.get(UNKNOWN, set()) | of_kind.get(USER_DEFINED, set())  # as in llama.cpp
    keys = _keys("llama", "default", vocabulary) | {SCORES: vocabulary.scores}
    keys |= {f"tokenizer.ggml.{name}_token_id": i for name, i in base.ids.items()}
    keys |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False}
    if not prefix:
        keys["tokenizer.ggml.add_space_prefix"] = False
    if vocabulary.size() == len(base.tokens):
        keys[TEMPLATE] = chat_template(template_version(controls, path.name), special)
    return keys


def _of_json(
    path: pathlib.Path, data: Mapping[str, Any], vocab_size: int, added: Mapping[int, Added]
) -> dict[str, Any]:
    """Return the tokenizer keys of a tokenizer.json."""
    try:
        model = data["model"]
        tokens = {operator.index(i): token for token, i in model["vocab"].items()}
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        if model.get("type", "BPE") != "BPE" or not all(len(pair) == 2 for pair in merges):
            raise ValueError(f"a {model.get('type')} model")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise TokenizerError(
            f"holds no BPE vocabulary with merges ({e}): GGUF has no form for it here", field="model", place=path
        ) from e
    if not -1 < min(tokens, default=0) <= max(tokens, default=0) < vocab_size:
        raise TokenizerError(
            f"has the id {max(tokens)}, but the model has {vocab_size} tokens: it belongs to another model",
            field="model.vocab",
            place=path,
        )
    rows = [tokens.get(i, f"[PAD{i}]") for i in range(max(tokens, default=-1) + 1)]
    used = [NORMAL if i in tokens else UNUSED for i in range(len(rows))]
    if _mentions(data.get("pre_tokenizer"), "ByteLevel"):
        if _mentions(data.get("normalizer")):
            warnings.warn(f"{path}: GGUF has no key for its normalizer, which llama.cpp leaves out", stacklevel=2)
        vocabulary = _padded(Vocabulary(path, rows, [0.0] * len(rows), used, {}), added, vocab_size)
        name = pre_tokenizers.name_of(path, data.get("pre_tokenizer"), model.get("ignore_merges") is True)
        lines = [" ".join(pair) for pair in merges]
        if bad := next((line for line in lines if line.count(" ") != 1), None):
            raise TokenizerError(f"merge {bad!r:.60} contains a space", field="model.merges", place=path)
        return _keys("gpt2", name, vocabulary) | {MERGES: lines, "tokenizer.ggml.add_bos_token": False}
    if not model.get("byte_fallback"):
        raise TokenizerError(
            "is a BPE vocabulary without bytes: GGUF has no form for it here",
            field="model.byte_fallback",
            place=path,
        )
    ranks = _ranks(merges)
    _warn_if_inexact(path, tokens.values(), merges, ranks)
    scores = [-float(ranks.get(token, len(merges))) for token in rows]
    unknown = model.get("unk_token")
    types = [
        UNKNOWN if token == unknown else BYTE if BYTE_PIECE.fullmatch(token) else kind
        for token, kind in zip(rows, used, strict=True)
    ]
    vocabulary = _padded(Vocabulary(path, rows, scores, types, {}), added, vocab_size)
    keys = _keys("llama", "default", vocabulary) | {SCORES: vocabulary.scores}
    if UNKNOWN in types:
        keys["tokenizer.ggml.unknown_token_id"] = types.index(UNKNOWN)
    return keys | {
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": _space_prefix(path, data),
    }  # fmt: skip


def _keys(kind: str, pre: str, vocabulary: Vocabulary) -> dict[str, Any]:
    return {MODEL: kind, PRE: pre, TOKENS: vocabulary.tokens, TYPES: vocabulary.types}


def _padded(base: Vocabulary, added: Mapping[int, Added], vocab_size: int) -> Vocabulary:
    """Return the vocabulary with added tokens, and unused ones up to the rows of the embedding."""
    tokens, scores, types = list(base.tokens), list(base.scores), list(base.types)
    size = max(len(tokens), *(i + 1 for i in added)) if added else len(tokens)
    if size > vocab_size:
        raise TokenizerError(
            f"{size} tokens, but the model has {vocab_size}: it belongs to another model", place=base.path
        )
    more = vocab_size - len(tokens)
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(more)]
    scores, types = scores + [PADDING_SCORE] * more, types + [UNUSED] * more
    for i, (content, special) in added.items():
        special = special or looks_special(content)
        content = content if special else content.replace(SPACE, " ")
        if tokens[i] != content or types[i] in (NORMAL, UNUSED):
            if types[i] == UNUSED or tokens[i] != content:
                scores[i] = ADDED_SCORE
            tokens[i], types[i] = content, CONTROL if special else USER_DEFINED
    return Vocabulary(base.path, tokens, scores, types, base.ids)


def _added(folder: pathlib.Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[int, Added]:
    """Return the added tokens that the files of a folder list, by id; later files override earlier ones."""
    out: dict[int, Added] = {}
    try:
        for content, i in read_object(folder / "added_tokens.json").items():
            out[int(i)] = Added(content, False)
        for key, token in (config.get("added_tokens_decoder") or {}).items():
            out[int(key)] = Added(token["content"], token.get("special") is True)
        for token in data.get("added_tokens") or []:
            out[int(token["id"])] = Added(token["content"], token.get("special") is True)
        if any(i < 0 or not isinstance(token.content, str) for i, token in out.items()):
            raise ValueError("an id below 0, or a token that is no text")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise TokenizerError(f"lists its added tokens in an unknown form ({e})", place=folder) from e
    return dict(sorted(out.items()))


def _same_pieces(data: Mapping[str, Any], model: pathlib.Path) -> bool:
    """Return whether a tokenizer.json, if any, has the pieces of the SentencePiece file at the same ids."""
    if not data:
        return True
    found = data.get("model")
    vocab = found.get("vocab") if isinstance(found, dict) else None
    if not isinstance(vocab, dict):
        return False
    pieces = sentencepiece_model.read(model)[0].tokens
    ids = vocab | {token.get("content"): token.get("id") for token in data.get("added_tokens") or []}
    return all(ids.get(piece) == i for i, piece in enumerate(pieces))


def _ranks(merges: Iterable[tuple[str, ...]]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return ranks


def _warn_if_inexact(
    path: pathlib.Path, tokens: Iterable[str], merges: list[tuple[str, ...]], ranks: Mapping[str, int]
) -> None:
    """Warn if llama.cpp, which joins any two pieces that make a third, may merge what this list does not."""
    listed, pieces = set(merges), set(tokens)
    missing = sum(pair not in listed for piece in pieces for pair in splits(piece, pieces))
    order = [ranks["".join(pair)] for pair in merges]
    if missing or order != sorted(order):
        warnings.warn(
            f"{path}: its merges are not those of a SentencePiece model, to which GGUF's form is limited: "
            "llama.cpp may split rare words otherwise (this package keeps the file, and is exact)",
            stacklevel=2,
        )


def _mentions(component: Any, kind: str | None = None) -> bool:
    """Return whether a component of a tokenizer.json, or a part of it, is of this type (of any, for None)."""
    if not isinstance(component, dict):
        return False
    parts = [p for name in ("normalizers", "pretokenizers") for p in component.get(name) or []]
    if component.get("type") == "Sequence":
        return any(_mentions(part, kind) for part in parts)
    return kind is None or component.get("type") == kind


def _space_prefix(path: pathlib.Path, data: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json puts a space before the first word; TokenizerError if it does more."""
    normalizer, pre = data.get("normalizer"), data.get("pre_tokenizer")
    parts = normalizer.get("normalizers") or [normalizer] if isinstance(normalizer, dict) else []
    kinds = [part.get("type") for part in parts]
    metaspace = isinstance(pre, dict) and pre.get("type") == "Metaspace"
    if set(kinds) - {"Prepend", "Replace"} or not (pre is None or metaspace):
        raise TokenizerError(
            "normalizes or splits text, which GGUF's 'llama' tokenizer does not", field="normalizer", place=path
        )
    if pre is None:
        return "Prepend" in kinds
    scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
    if scheme == "first":
        warnings.warn(
            f"{path}: puts a space before the first word only, where llama.cpp also puts one after every special "
            "token (this package keeps the file, and is exact)",
            stacklevel=2,
        )
    return bool(scheme != "never")


def _special_keys(
    folder: pathlib.Path, config: Mapping[str, Any], data: Mapping[str, Any], keys: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keys of BOS, ends, padding and what is added to a text."""
    ids = {token: i for i, token in enumerate(keys[TOKENS])}
    model_config = read_object(folder / "config.json")
    generation = read_object(folder / "generation_config.json")

    def named(name: str) -> int | None:
        value = config.get(name)
        return ids.get(value.get("content") if isinstance(value, dict) else value)

    found: dict[str, int | None] = {short: named(name) for name, short in SPECIALS.items() if short != "eos"}
    if found["bos"] is None:
        found["bos"] = next(iter(_ids(model_config.get("bos_token_id"), len(ids))), None)
    eos = [
        named("eos_token"),
        *(i for c in (generation, model_config) for i in _ids(c.get("eos_token_id"), len(ids))),
    ]
    ends = list(dict.fromkeys(i for i in eos if i is not None))
    found |= dict(zip(ENDS, ends, strict=False))
    out: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": i for name, i in found.items() if i is not None}
    for end in ("bos", "eos"):
        if (adds := _adds(end, config, data)) is not None:
            out[f"tokenizer.ggml.add_{end}_token"] = adds
    return out


def _ids(value: Any, size: int) -> list[int]:
    """Return the ids of a field that holds a number, a list, or nothing."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and 0 <= i < size]


def _adds(end: str, config: Mapping[str, Any], data: Mapping[str, Any]) -> bool | None:
    """Return whether BOS or EOS is added to a text; None if no file says so."""
    processor = data.get("post_processor")
    parts = processor.get("processors") or [processor] if isinstance(processor, dict) else []
    for part in parts:
        if part.get("type") == "TemplateProcessing" and (single := part.get("single")):
            return "SpecialToken" in single[0 if end == "bos" else -1]
    value = config.get(f"add_{end}_token")
    return value if isinstance(value, bool) else None


def _kept_keys(folder: pathlib.Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what GGUF has no keys for, as texts; chat templates have keys of their own."""
    out: dict[str, Any] = {}
    for name, key in KEPT.items():
        kept = read_object(folder / name)
        kept.pop("chat_template", None)
        if kept:
            out[key] = json.dumps(kept, ensure_ascii=False)
    ids = {k: v for k, v in read_object(folder / "config.json").items() if k in ("bos_token_id", "eos_token_id")}
    if ids and not (ids.get("bos_token_id") == 1 and ids.get("eos_token_id") == 2):
        out[KEPT_IDS] = json.dumps(ids)
    if data:
        if hub.sentencepiece_file(folder) is None:
            out[HF_ALONE] = True
        out[HF_JSON] = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return out
