"""Hostile GGUF files: good ones damaged, and ones grown by the grammar; and what opening any must be like.

Written by itself, byte by byte, so that it can say what no decent writer would.
"""

from __future__ import annotations

import pathlib
import random
import struct
import warnings
from typing import Any

import tokenizers
import torch
from sentencepiece import SentencePieceProcessor

from mistral_7b import CheckpointError, Mistral7B, TokenizerError
from mistral_7b.checkpoint.gguf import file as gguf_file
from mistral_7b.checkpoint.gguf import tokenizer as gguf_tokenizer
from mistral_7b.checkpoint.names import expected, rename
from mistral_7b.checkpoint.reading import open_checkpoint
from mistral_7b.model import ModelArgs

Typed = tuple[int, Any]  # a value and its type's code; of arrays the elements' type and they
U8, U32, I32, F32, BOOL, TEXT, ARRAY, U64, F64 = 0, 4, 5, 6, 7, 8, 9, 10, 12
FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", U32: "<I", I32: "<i", F32: "<f", U64: "<Q", 11: "<q", F64: "<d"}
BLOCKS = ModelArgs(
    dim=32, n_layers=1, head_dim=8, hidden_dim=32, n_heads=4, n_kv_heads=2, vocab_size=9, rope_theta=1e6,
    sliding_window=None, max_seq_len=64,
)  # fmt: skip
K_BLOCKS = ModelArgs(
    dim=256, n_layers=1, head_dim=2, hidden_dim=2, n_heads=1, n_kv_heads=1, vocab_size=3, rope_theta=1e6,
    sliding_window=None, max_seq_len=64,
)  # fmt: skip
AWKWARD = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 255, 256, 4095, 4096, 65535,
    65536, (1 << 20) + 1, (1 << 31) - 1,
    1 << 31, (1 << 32) - 1, 1 << 32,
    (1 << 40) + 32, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1,
)  # fmt: skip


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def plain(code: int, value: Any) -> bytes:
    if code == TEXT:
        return text(value)
    return bytes([value]) if code == BOOL else struct.pack(FORMS[code], value)


def typed(code: int, value: Any) -> bytes:
    if code != ARRAY:
        return struct.pack("<I", code) + plain(code, value)
    inner, elements = value
    return struct.pack("<IIQ", ARRAY, inner, len(elements)) + b"".join(plain(inner, e) for e in elements)


Tensor = tuple[str, tuple[int, ...], int, int, bytes]  # name, sizes (innermost first), type, offset, data


def built(pairs: dict[str, Typed], tensors: list[Tensor], version: int = 3, alignment: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    head += b"".join(text(key) + typed(*value) for key, value in pairs.items())
    data = bytearray()
    for name, sizes, kind, offset, content in tensors:
        head += text(name) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
        head += struct.pack("<IQ", kind, offset)
        data[len(data) : offset] = bytes(max(0, offset - len(data)))
        data[offset : offset + len(content)] = content
    return head + bytes(-len(head) % alignment) + data


def pairs_of(args: ModelArgs) -> dict[str, Typed]:
    values = {
        "embedding_length": args.dim, "block_count": args.n_layers, "feed_forward_length": args.hidden_dim,
        "attention.head_count": args.n_heads, "attention.head_count_kv": args.n_kv_heads,
        "attention.key_length": args.head_dim, "attention.value_length": args.head_dim,
        "rope.dimension_count": args.head_dim, "context_length": args.max_seq_len, "vocab_size": args.vocab_size,
    }  # fmt: skip
    return {
        "general.architecture": (TEXT, "llama"),
        **{f"llama.{key}": (U32, value) for key, value in values.items()},
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.freq_base": (F32, args.rope_theta),
    }


def tokenizer_pairs(size: int) -> dict[str, Typed]:
    pieces = ["<unk>", "<s>", "</s>", *"\u2581abcdefgh"][:size]
    return {
        "tokenizer.ggml.model": (TEXT, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (TEXT, pieces)),
        "tokenizer.ggml.scores": (ARRAY, (F32, [-float(i) for i in range(size)])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [2, 3, 3] + [1] * (size - 3))),
        "tokenizer.ggml.bos_token_id": (U32, 1),
    }


def added_token_pairs(size: int) -> dict[str, Typed]:
    """A tokenizer of a fine-tune: an added token, a template, and what this package keeps."""
    types = [2, 3, 3, *[1] * (size - 5), 4, 3][-size:]
    return tokenizer_pairs(size) | {
        "tokenizer.ggml.token_type": (ARRAY, (I32, types if size > 4 else [2, 3, 3][:size])),
        "tokenizer.ggml.eot_token_id": (U32, size - 1),
        "tokenizer.chat_template": (TEXT, "{{ messages }}"),
        "huggingface.generation_config": (TEXT, '{"eos_token_id": [2]}'),
        "tokenizer.huggingface.json": (TEXT, '{"model": {"vocab": {"a": 0}}}'),
    }


def byte_level_pairs(size: int) -> dict[str, Typed]:
    return {
        "tokenizer.ggml.model": (TEXT, "gpt2"),
        "tokenizer.ggml.pre": (TEXT, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, (TEXT, ["<e>", "a", "b", "ab", *"cdefg"][:size])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [3] + [1] * (size - 1))),
        "tokenizer.ggml.merges": (ARRAY, (TEXT, ["a b"] if size > 3 else [])),
        "tokenizer.ggml.eos_token_id": (U32, 0),
    }


TOKENIZERS = (tokenizer_pairs, added_token_pairs, byte_level_pairs)


def tensors_of(args: ModelArgs, draw: random.Random, kinds: list[str]) -> list[Tensor]:
    out, offset = [], 0
    for name, shape in expected(args):
        fitting = [k for k in kinds if shape[-1] % gguf_file.KINDS[k].block == 0 and len(shape) > 1]
        kind = gguf_file.KINDS[draw.choice(fitting or ["F32"])]
        size = torch.Size(shape).numel() // kind.block * kind.size
        out.append((rename(name, "mistral", "gguf") or "", shape[::-1], kind.code, offset, draw.randbytes(size)))
        offset += size + -size % 32
    return out


def seeds() -> list[bytes]:
    """Good files, with every type of tensor between them."""
    draw, out = random.Random(0), []
    for kinds, more in (
        (["Q8_0", "Q4_0", "F16"], {}), (["Q4_1", "Q5_0", "Q5_1", "IQ4_NL"], added_token_pairs(9)),
        (["BF16", "F32"], byte_level_pairs(9)),
    ):  # fmt: skip
        out.append(built(pairs_of(BLOCKS) | more, tensors_of(BLOCKS, draw, kinds)))
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"):
        pairs = pairs_of(K_BLOCKS) | tokenizer_pairs(3)
        out.append(built(pairs, tensors_of(K_BLOCKS, draw, [kind]), version=2))
    tied = [t for t in tensors_of(BLOCKS, draw, ["Q8_0"]) if t[0] != "output.weight"]
    out.append(built(pairs_of(BLOCKS) | tokenizer_pairs(9) | {"general.alignment": (U32, 32)}, tied))
    return out


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """A file with a few things wrong, most of them in the header, which the first third surely holds."""
    out = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at = draw.randrange(max(1, min(len(out), 1700) if draw.random() < 0.9 else len(out)))
        what = draw.randrange(7)
        if what == 0:
            out[at : at + 1] = bytes([draw.randrange(256)])
        elif what == 1:
            out[at : at + 1] = bytes([(out[at] if at < len(out) else 0) ^ 1 << draw.randrange(8)])
        elif what == 2:
            out[at : at + 8] = struct.pack("<Q", draw.choice(AWKWARD))
        elif what == 3:
            out[at : at + 4] = struct.pack("<I", draw.choice(AWKWARD) & 0xFFFFFFFF)
        elif what == 4:
            del out[at : at + draw.choice((1, 4, 8, 100, len(out)))]
        elif what == 5:
            begin = draw.randrange(len(out) + 1)
            out[at:at] = out[begin : begin + draw.choice((1, 4, 8, 40))]
        else:
            begin = draw.randrange(len(out) + 1)
            piece = out[begin : begin + draw.choice((1, 4, 8, 40))]
            out[at : at + len(piece)] = piece
    return bytes(out)


def value(draw: random.Random) -> Typed:
    code = draw.choice((*FORMS, BOOL, TEXT, ARRAY, ARRAY))
    if code == ARRAY:
        inner = draw.choice((*FORMS, TEXT))
        return ARRAY, (inner, [_one(inner, draw) for _ in range(draw.choice((0, 1, 2, 9)))])
    return code, _one(code, draw)


def _one(code: int, draw: random.Random) -> Any:
    if code == TEXT:
        return draw.choice(
            (b"", b"llama", b"none", b"linear", b"yarn", b"<s>", b"\xff", b"x" * 70, "\u2581".encode())
        )
    if code in (F32, F64):
        return draw.choice((0.0, -0.0, 1.0, 1e-5, 1e4, 1e6, 1e30, -1.0, float("inf"), float("nan")))
    if code == BOOL:
        return draw.choice((0, 1, 1, 2, 255))
    size = struct.calcsize(FORMS[code]) * 8
    number = draw.choice(AWKWARD) % (1 << size)
    return number - (1 << size) if FORMS[code].islower() and number >= 1 << (size - 1) else number


def grown(draw: random.Random) -> bytes:
    """A file that is well-formed, whatever it says: pairs and tensors are replaced, dropped, added."""
    args = draw.choice((BLOCKS, K_BLOCKS))
    pairs = pairs_of(args) | (draw.choice(TOKENIZERS)(args.vocab_size) if draw.random() < 0.5 else {})
    names = [
        *pairs, "llama.expert_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "split.count",
        "llama.attention.sliding_window", "general.alignment", "tokenizer.ggml.eos_token_id", "llama.x", "",
    ]  # fmt: skip
    for key in draw.sample(names, draw.choice((0, 1, 1, 2, 4))):
        if draw.random() < 0.2:
            pairs.pop(key, None)
        elif key in pairs and draw.random() < 0.6 and pairs[key][0] in FORMS:
            pairs[key] = (pairs[key][0], _one(pairs[key][0], draw))
        else:
            pairs[key] = value(draw)
    tensors = tensors_of(args, draw, draw.sample(list(gguf_file.KINDS), 4))
    for _ in range(draw.choice((0, 0, 1, 2))):
        i = draw.randrange(len(tensors))
        name, sizes, kind, offset, content = tensors[i]
        tensors[i] = draw.choice((
            (draw.choice(("", "rope_freqs.weight", "x" * 80, tensors[0][0])), sizes, kind, offset, content),
            (name, tuple(draw.choice((s, s, draw.choice(AWKWARD))) for s in sizes), kind, offset, content),
            (name, (*sizes, *[1] * draw.randrange(4)), kind, offset, content),
            (name, sizes, draw.choice((*range(42), 255, 1 << 31)), offset, content),
            (name, sizes, kind, (offset + 32 * draw.randrange(9)) // draw.choice((1, 2)), content),
        ))  # fmt: skip
    return built(pairs, tensors, draw.choice((2, 3, 3, 3, 1, 4, 3 << 24)), draw.choice((32, 32, 32, 8, 64)))


def survives(path: pathlib.Path, load: bool = True) -> bool:
    """Whether a file opens; whatever it holds, it opens whole, or is refused by an error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as e:
            if str(path) not in str(e):
                raise AssertionError("an error that does not say which file") from e
            return False
        for name, shape in expected(checkpoint.args):
            if name in checkpoint.tensors:
                assert tuple(checkpoint.read(name, torch.bfloat16).shape) == shape
        if load:
            Mistral7B.from_pretrained(path)
    try:
        files = gguf_tokenizer.files(path, gguf_file.read(path).metadata)
        if "tokenizer.model" in files:
            SentencePieceProcessor(model_proto=files["tokenizer.model"]).encode("a b\u2581[INST]\0")
        if "tokenizer.json" in files:
            tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a b\u2581[INST]\0")
    except TokenizerError:
        pass
    return True
