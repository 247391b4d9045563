"""Folders with true tokenizer files, as fine-tunes of Mistral 7B have them, and texts to try them with."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

import mistral_7b

V1 = MistralTokenizer._data_path() / "tokenizer.model.v1"
V3 = MistralTokenizer._data_path() / "mistral_instruct_tokenizer_240323.model.v3"
DEMO = Path(mistral_7b.__file__).parent / "demo" / "tokenizer.model.v3"  # small, so that its files open fast
CHATML = ("<|im_end|>", "<|im_start|>")
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
# Spellings of control tokens, and what is special about spaces, bytes and characters of several tokens.
ODD = [
    "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<|endoftext|>", "<tool_call>",
    "</tool_call>", "<|im_", "start|>", "<0x0A>", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\x00", "\x1b",
    "\u200b", "\u200d", "\ufeff", "a\u0301", "é", "日本語", "한국", "🙂", "👩‍👩‍👧", "𒀀", "\u00a0", "\u3000",
    "user", "assistant", "Hello", "world", "1234", "don't", ".", "\u0120", "\ufffd", "def f(x):\n    return",
]  # fmt: skip
TEXTS = st.lists(
    st.sampled_from(ODD)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=6),
    max_size=10,
).map("".join)
SPELLINGS = [
    text for text in ODD if text.startswith(("<", "[")) and text.endswith((">", "]")) and "0x" not in text
]


def harmless(text: str) -> bool:
    """Whether a text spells no added token."""
    return not any(spelling in text for spelling in SPELLINGS)


def write(folder: Path, **files: Any) -> Path:
    """Write JSON files: config={...} is config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def decoder_entry(text: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": text, "special": special, **plain, **flags}


def sentencepiece_folder(folder: Path, model: Path = DEMO, added: tuple[str, ...] = CHATML, **config: Any) -> Path:
    """tokenizer.model with added tokens behind its own, as OpenHermes has them."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model, folder / "tokenizer.model")
    first = pieces(model)[2]
    decoder = {str(first + n): decoder_entry(text) for n, text in enumerate(added)}
    named = {"bos_token": "<s>", "eos_token": added[0] if added else "</s>", "unk_token": "<unk>"}
    values = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder, **named, **config}
    return write(folder, tokenizer_config=values, config=MISTRAL)


@functools.cache
def pieces(model: Path) -> tuple[dict[str, int], list[tuple[str, str]], int]:
    """The vocabulary of a SentencePiece file, its merges in the order of their scores, and its size."""
    import sentencepiece
    from transformers.tokenization_utils_base import generate_merges

    m = sentencepiece.SentencePieceProcessor(model_file=str(model))
    names = [m.id_to_piece(i) for i in range(len(m))]
    merges = generate_merges({n: i for i, n in enumerate(names)}, {n: m.get_score(i) for i, n in enumerate(names)})
    return {name: i for i, name in enumerate(names)}, merges, len(names)


def byte_fallback_folder(
    folder: Path, style: str = "prepend", model: Path = DEMO, added: list[AddedToken] | None = None, **config: Any
) -> Path:
    """tokenizer.json with byte fallback.

    prepend   a normalizer puts a space before each part, as transformers 4 wrote
    first     Metaspace puts one before the first part only
    never     no space is put anywhere
    """
    vocab, merges, _ = pieces(model)
    t = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "prepend":
        t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=style, split=False)
    t.decoder = decoders.Sequence(steps if style == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    if added is None:
        added = [AddedToken(name, special=True, normalized=False) for name in CHATML]
    t.add_tokens(added)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(folder, tokenizer_config={"tokenizer_class": "LlamaTokenizer", **named, **config}, config=MISTRAL)


@functools.cache
def byte_level_json(size: int = 700) -> str:
    """A byte-level BPE tokenizer.json, trained on some of this package's source and other scripts."""
    t = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    t.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    source = Path(mistral_7b.__file__).with_name("model.py").read_text(encoding="utf-8")
    t.train_from_iterator([source, "日本語 日本 語日 ünïcödé naïve 🙂🙂🙂 👩‍👩‍👧 한국 " * 40], trainer)
    return t.to_str()


def byte_level_folder(folder: Path, added: list[AddedToken] | None = None, **config: Any) -> Path:
    """tokenizer.json with byte-level BPE, as SmolLM2 has it: no BOS, and ends of two names."""
    t = tokenizers.Tokenizer.from_str(byte_level_json())
    t.add_tokens(added or [])
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    return write(folder, tokenizer_config=values, config=MISTRAL)
