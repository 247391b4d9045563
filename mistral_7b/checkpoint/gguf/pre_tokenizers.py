"""How byte-level BPE splits text before merging: names in GGUF, and components of a tokenizer.json.

llama.cpp knows a vocabulary's pre-tokenizer by name (`tokenizer.ggml.pre`); a tokenizer.json holds its parts.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from ...errors import TokenizerError
from .vocabulary import PRE

CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
WORDS = rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """Patterns applied one after the other; then, with `words`, GPT-2's own pattern."""

    patterns: tuple[str, ...] = ()
    digits: bool = False  # every digit is split off by itself, before the pattern
    words: bool = False
    ignore_merges: bool = False  # a word that is in the vocabulary is one token
    add_bos: bool = False  # llama.cpp's default for `tokenizer.ggml.add_bos_token`

    def components(self) -> list[dict[str, Any]]:
        """Return the `pre_tokenizer` parts of a tokenizer.json."""
        digits = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        return digits + [_split(pattern) for pattern in self.patterns] + [_byte_level(self.words)]


GPT_2 = PreTokenizer(words=True)
SMOLLM = PreTokenizer(digits=True, words=True)
LLAMA_3 = PreTokenizer((rf"{WORDS}|\p{{N}}{{1,3}}|{REST}",), ignore_merges=True, add_bos=True)
QWEN_2 = PreTokenizer((rf"{WORDS}|\p{{N}}|{REST}",))
GPT_4O = PreTokenizer(
    ("|".join([f"{pattern}(?i:{CONTRACTIONS})?" for pattern in CASED] + [r"\p{N}{1,3}", CASED_REST]),)
)
TEKKEN = PreTokenizer(("|".join([*CASED, r"\p{N}", CASED_REST]),), ignore_merges=True, add_bos=True)
DEFAULT = PreTokenizer(  # of files without a name
    (
        r"[\p{P}\$\+<=>\^~\|]+",
        rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )
)
PRE_TOKENIZERS = {  # of equal ones the first name is written
    "gpt-2": GPT_2, "phi-2": GPT_2, "mpt": GPT_2, "olmo": GPT_2, "exaone4": GPT_2, "mellum": GPT_2,
    "smollm": SMOLLM, "starcoder": SMOLLM, "refact": SMOLLM, "command-r": SMOLLM, "codeshell": SMOLLM,
    "exaone": SMOLLM, "minerva-7b": SMOLLM, "mellum2": SMOLLM,
    "llama-bpe": LLAMA_3, "llama3": LLAMA_3, "llama-v3": LLAMA_3, "falcon3": LLAMA_3, "pixtral": LLAMA_3,
    "dbrx": dataclasses.replace(LLAMA_3, ignore_merges=False, add_bos=False),
    "smaug-bpe": dataclasses.replace(LLAMA_3, ignore_merges=False, add_bos=False),
    "qwen2": QWEN_2, "deepseek-r1-qwen": QWEN_2, "megrez": QWEN_2, "stablelm2": QWEN_2, "hunyuan": QWEN_2,
    "tekken": TEKKEN, "gpt-4o": GPT_4O, "llama4": GPT_4O, "default": DEFAULT,
}  # fmt: skip


def named(path: pathlib.Path, name: Any) -> PreTokenizer:
    """Return the pre-tokenizer of a GGUF file; TokenizerError for an unknown name."""
    if name is None:
        return DEFAULT
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"the pre-tokenizer is {name!r}; known are {', '.join(PRE_TOKENIZERS)}",
            field=PRE,
            place=path,
            hint="choose another tokenizer with --tokenizer",
        )
    return PRE_TOKENIZERS[name]


def name_of(path: pathlib.Path, pre_tokenizer: Any, ignore_merges: bool) -> str:
    """Return llama.cpp's name for the `pre_tokenizer` of a tokenizer.json; TokenizerError if it has none."""
    components = _flat(pre_tokenizer)
    for name, known in PRE_TOKENIZERS.items():
        theirs = _flat({"type": "Sequence", "pretokenizers": known.components()})
        if theirs == components and known.ignore_merges == ignore_merges:
            return name
    raise TokenizerError(
        f"splits text as {json.dumps(pre_tokenizer, ensure_ascii=False):.200}, for which no name in GGUF is known",
        field="pre_tokenizer",
        place=path,
        hint="convert to another format",
    )


def _flat(component: Any) -> list[tuple[Any, ...]]:
    """Return a pre-tokenizer as a list of what each part does; spelling and defaults do not matter."""
    if not isinstance(component, dict):
        return []
    kind = component.get("type")
    if kind == "Sequence":
        return [part for inner in component.get("pretokenizers") or [] for part in _flat(inner)]
    if kind == "Split":
        pattern = component.get("pattern") or {}
        behavior = str(component.get("behavior")).lower()
        return [(kind, pattern.get("Regex"), pattern.get("String"), behavior, bool(component.get("invert")))]
    if kind == "Digits":
        return [(kind, bool(component.get("individual_digits")))]
    if kind == "ByteLevel":
        return [(kind, bool(component.get("add_prefix_space", True)), bool(component.get("use_regex", True)))]
    return [(kind, json.dumps(component, sort_keys=True))]


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(words: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
