"""Folders of tokenizer files as fine-tunes bring them: small, but of every kind, made without the package."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from mistral_7b.checkpoint.hub import DEMO

SPACE = "\u2581"
PIECES = DEMO / "tokenizer.model.v3"  # 4096 pieces
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = "{# tools \u00e9 #}" + CHATML
GENERATION = {"bos_token_id": 1, "eos_token_id": [4096, 2], "temperature": 0.7, "transformers_version": "4.40.0"}
CONTROLS, WORDS = ("<|im_end|>", "<|im_start|>"), ("<tool_call>", "a b  c")  # ids 4096 to 4099


def write(folder: pathlib.Path, name: str, data: Any) -> None:
    (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def decoder_entry(content: str, special: bool) -> dict[str, Any]:
    return {
        "content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
        "special": special,
    }  # fmt: skip


def write_settings(folder: pathlib.Path, **more: Any) -> None:
    """Write tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json."""
    added = [("<unk>", 0, True), ("<s>", 1, True), ("</s>", 2, True)]
    added += [(t, 4096 + i, True) for i, t in enumerate(CONTROLS)] + [
        (t, 4098 + i, False) for i, t in enumerate(WORDS)
    ]
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "<|im_end|>",
        "added_tokens_decoder": {str(i): decoder_entry(t, special) for t, i, special in added},
        "unk_token": "<unk>", "pad_token": "</s>", "model_max_length": 32768, "legacy": True,
        "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}],
    }  # fmt: skip
    write(folder, "tokenizer_config.json", {**config, **more})
    names = {"bos_token": "<s>", "eos_token": decoder_entry("<|im_end|>", True), "unk_token": "<unk>"}
    write(folder, "special_tokens_map.json", names)
    write(folder, "generation_config.json", GENERATION)
    write(folder, "config.json", {"bos_token_id": 1, "eos_token_id": 4096})


def sentencepiece(folder: pathlib.Path) -> None:
    """tokenizer.model with added tokens beside it, as OpenHermes has it."""
    shutil.copyfile(PIECES, folder / "tokenizer.model")
    write(folder, "added_tokens.json", {t: 4096 + i for i, t in enumerate(CONTROLS + WORDS)})
    write_settings(folder)


def fast(folder: pathlib.Path, first_only: bool = False) -> None:
    """tokenizer.json with the pieces and merges of a SentencePiece model, as Mistral's releases have it."""
    model = SentencePieceProcessor(model_file=str(PIECES))
    ids = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    plain = {p: i for p, i in ids.items() if not (model.IsControl(i) or model.IsByte(i) or model.IsUnknown(i))}
    merges = generate_merges(plain, {p: model.get_score(i) for p, i in plain.items()})
    out = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = [decoders.Strip(" ", 1, 0)]
    if first_only:
        out.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        out.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    out.decoder = decoders.Sequence(parts)
    special = [model.id_to_piece(i) for i in range(model.vocab_size()) if model.IsControl(i) or model.IsUnknown(i)]
    out.add_special_tokens([AddedToken(t, normalized=False) for t in (*special, *CONTROLS)])
    out.add_tokens([AddedToken(t, normalized=False) for t in WORDS])
    out.save(str(folder / "tokenizer.json"))
    write_settings(folder, tokenizer_class="PreTrainedTokenizerFast")


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def byte_level(folder: pathlib.Path, pre: str = "smollm") -> None:
    """A byte-level BPE trained on this file, with ChatML tokens before the vocabulary and a word after it."""
    out = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    parts = SPLITS[pre]
    out.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    out.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    out.train_from_iterator([pathlib.Path(__file__).read_text()] * 2, trainer)
    out.add_tokens([AddedToken("<tool_call>", normalized=False)])
    out.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "chat_template": CHATML,
    }  # fmt: skip
    write(folder, "tokenizer_config.json", config)
    write(folder, "config.json", {"bos_token_id": 0, "eos_token_id": 2})


KINDS: dict[str, Any] = {
    "sentencepiece": sentencepiece, "fast": fast, **{pre: lambda f, pre=pre: byte_level(f, pre) for pre in SPLITS},
}  # fmt: skip

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ETAOIN", " ", "  ", "\n", "\t", "\r\n", "0123456789",
    ".,;:!?'\"()[]{}<>|/_-+=#", "\u00e9\u00fc\u00df\u0130\u0131", "\u0431\u0432\u0433",
    "\u4f60\u597d\u3042\uac00", "\U0001f600\u200d\U0001f469",
    "\u0301\u0308", "\u200b\u00a0\u3000\u2028", "\u00bd\u0661\u2167", "\u2581", "\0\x07\x7f",
)  # fmt: skip
SPELLED = (
    "<|im_start|>", "<|im_end|>", "</s>", "<s>", "<unk>", "<tool_call>", "a b  c", "[INST]", "<0x0A>", "'ll", "'S",
)  # fmt: skip


def fuzzed(count: int, seed: int = 0) -> list[str]:
    """Random texts of words, symbols, many scripts, and spelled tokens."""
    draw = random.Random(seed)
    sources = pathlib.Path(__file__).read_text().split()
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(12)):
            kind = draw.random()
            if kind < 0.35:
                parts.append(draw.choice(["", " "]) + draw.choice(sources))
            elif kind < 0.5:
                parts.append(draw.choice(SPELLED))
            else:
                alphabet = draw.choice(ALPHABETS)
                parts.append("".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 6))))
        texts.append("".join(parts))
    return texts
