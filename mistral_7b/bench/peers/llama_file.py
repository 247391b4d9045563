"""Write a GGUF file of random weights, of any shape and type, at disk speed.

Speed does not depend on the values of weights, but llama.cpp needs every tensor, and blocks with plausible scales.
All tensors are slices of one pool of random blocks. The vocabulary is artificial, one word per token, so that a
server has text to send.

Runs under the Python that has gguf: python -m mistral_7b.bench.peers.llama_file FILE TYPE ARGS-AS-JSON
"""

from __future__ import annotations

import json
import sys
from typing import Any

import gguf
import numpy as np

from ..work import BITS

WEIGHT = 0.02  # standard deviation of the weights
# Inputs of a block, and its fields: float16 scales with their values, and random bytes with their number. With
# integer scales, the values are those that give weights a standard deviation of about WEIGHT.
BLOCKS: dict[str, tuple[int, dict[str, float | int]]] = {
    "Q4_0": (32, {"d": WEIGHT / 4.6, "q": 16}),
    "Q8_0": (32, {"d": WEIGHT / 73.9, "q": 32}),
    "Q4_K": (256, {"d": 7e-5, "m": 7.5 * 7e-5, "s": 12, "q": 128}),
    "Q6_K": (256, {"q": 192, "s": 16, "d": 1.1e-5}),
}


def random_blocks(kind: str, weights: int) -> np.ndarray[Any, Any]:
    """Return the bytes of `weights` weights (of whole blocks) of a type in BLOCKS, or of BF16."""
    draw = np.random.default_rng(0)
    if kind == "BF16":
        # bfloat16 is the upper half of float32
        wide = draw.uniform(-WEIGHT, WEIGHT, weights).astype(np.float32)
        return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    inputs, fields = BLOCKS[kind]
    types = [(name, "<f2") if isinstance(of, float) else (name, "u1", of) for name, of in fields.items()]
    blocks = np.empty(weights // inputs, dtype=types)
    for name, of in fields.items():
        if isinstance(of, float):
            blocks[name] = of
        else:
            blocks[name] = np.frombuffer(draw.bytes(blocks[name].size), np.uint8).reshape(-1, of)
    return blocks.view(np.uint8)


def write(path: str, kind: str, args: dict[str, Any]) -> None:
    """Write the file. ValueError if a row is not a whole number of blocks.

    Q4_K_M is Q4_K, with Q6_K for the output, and for attn_v and ffn_down of the layers in `args["promoted"]`.
    """
    D, F, V, K = args["dim"], args["hidden_dim"], args["vocab_size"], args["head_dim"]
    q, kv = args["n_heads"] * K, args["n_kv_heads"] * K
    most = {"Q4_K_M": "Q4_K"}.get(kind, kind)
    block = BLOCKS[most][0] if most in BLOCKS else 1
    if any(n % block for n in (D, F, q)):
        raise ValueError(f"rows of {D}, {F} and {q} weights must be whole blocks of {block}")
    writer = gguf.GGUFWriter(path, "llama")
    add_facts(writer, args)
    pools = {of: random_blocks(of, max(D * V, D * F)) for of in {most, "Q6_K" if kind == "Q4_K_M" else most}}

    def matrix(name: str, rows: int, columns: int, promoted: bool = False) -> None:
        of = "Q6_K" if promoted and kind == "Q4_K_M" else most
        width = round(columns * BITS[of] / 8)  # bytes per row
        raw = pools[of][: rows * width].reshape(rows, width)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[of])

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))

    matrix("token_embd", V, D)
    for n in range(args["n_layers"]):
        at = f"blk.{n}."
        norm(at + "attn_norm")
        norm(at + "ffn_norm")
        for name, rows, columns in (
            ("attn_q", q, D), ("attn_k", kv, D), ("attn_v", kv, D), ("attn_output", D, q),
            ("ffn_gate", F, D), ("ffn_up", F, D), ("ffn_down", D, F),
        ):  # fmt: skip
            matrix(at + name, rows, columns, name in ("attn_v", "ffn_down") and n in args.get("promoted", ()))
    norm("output_norm")
    if not args["tie_embeddings"]:
        matrix("output", V, D, promoted=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_facts(writer: Any, args: dict[str, Any]) -> None:
    writer.add_context_length(args["max_seq_len"])
    writer.add_embedding_length(args["dim"])
    writer.add_block_count(args["n_layers"])
    writer.add_feed_forward_length(args["hidden_dim"])
    writer.add_head_count(args["n_heads"])
    writer.add_head_count_kv(args["n_kv_heads"])
    writer.add_key_length(args["head_dim"])
    writer.add_value_length(args["head_dim"])
    writer.add_rope_dimension_count(args["head_dim"])
    writer.add_rope_freq_base(args["rope_theta"])
    writer.add_layer_norm_rms_eps(args["norm_eps"])
    writer.add_vocab_size(args["vocab_size"])
    add_vocabulary(writer, args["vocab_size"])


def add_vocabulary(writer: Any, size: int) -> None:
    """Add SentencePiece's three control tokens, and a word for each other token."""
    kind = gguf.TokenType
    words = size - 3
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"\u2581w{n}" for n in range(words))])
    writer.add_token_scores([0.0] * 3 + [-float(n) for n in range(words)])
    writer.add_token_types([kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.NORMAL] * words)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
