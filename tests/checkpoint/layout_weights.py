"""Small weights of Mistral's architecture in every layout that they come in."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType
from gguf.quants import dequantize, quantize
from releases import RELEASES
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mistral_7b.checkpoint.gguf.file import read

State = Mapping[str, Tensor]
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}  # K types
PARAMS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "head_dim": "head_dim",
    "hidden_dim": "intermediate_size", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps", "vocab_size": "vocab_size",
}  # fmt: skip
# Hugging Face's, Mistral's and GGUF's names
WHOLE = (
    ("model.embed_tokens", "tok_embeddings", "token_embd"), ("model.norm", "norm", "output_norm"),
    ("lm_head", "output", "output"),
)  # fmt: skip
LAYER = (
    ("self_attn.q_proj", "attention.wq", "attn_q"), ("self_attn.k_proj", "attention.wk", "attn_k"),
    ("self_attn.v_proj", "attention.wv", "attn_v"), ("self_attn.o_proj", "attention.wo", "attn_output"),
    ("mlp.gate_proj", "feed_forward.w1", "ffn_gate"), ("mlp.down_proj", "feed_forward.w2", "ffn_down"),
    ("mlp.up_proj", "feed_forward.w3", "ffn_up"), ("input_layernorm", "attention_norm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
)  # fmt: skip


def config(release: str, vocab: int, **changes: Any) -> dict[str, Any]:
    """A release's config.json with small sizes."""
    return {**RELEASES[f"{release}, Hugging Face"][1], **SMALL, "vocab_size": vocab, **changes}


def names(layers: int) -> list[tuple[str, str, str]]:
    out = [*WHOLE]
    for n in range(layers):
        out += [(f"model.layers.{n}.{a}", f"layers.{n}.{b}", f"blk.{n}.{c}") for a, b, c in LAYER]
    return [(f"{a}.weight", f"{b}.weight", f"{c}.weight") for a, b, c in out]


def state_of(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random weights by Hugging Face's names; a tied output is left out."""
    sizes = tuple(config[k] for k in (*SMALL, "vocab_size"))
    state = _state(sizes, dtype)
    return {k: v for k, v in state.items() if k != "lm_head.weight" or not config.get("tie_word_embeddings")}


@functools.cache
def _state(sizes: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    dim, hidden, layers, heads, kv_heads, head_dim, vocab = sizes
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = {
        "q_proj": (q, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, q),
        "gate_proj": (hidden, dim), "up_proj": (hidden, dim), "down_proj": (dim, hidden),
        "embed_tokens": (vocab, dim), "lm_head": (vocab, dim),
    }  # fmt: skip
    draw, out = torch.Generator().manual_seed(vocab), {}
    for name, _, _ in names(layers):
        shape = shapes.get(name.split(".")[-2], (dim,))
        noise = torch.randn(shape, generator=draw)
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        out[name] = (1 + 0.3 * noise if len(shape) == 1 else noise * scale).to(dtype)
    return out


def write_config(folder: pathlib.Path, config: Mapping[str, Any], **generation: Any) -> None:
    """config.json, and generation_config.json if anything is said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **generation}))


def parts(state: State, count: int) -> list[dict[str, Tensor]]:
    every = list(state.items())
    return [dict(every[i * len(every) // count : (i + 1) * len(every) // count]) for i in range(count)]


def safetensors(folder: pathlib.Path, state: State) -> None:
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})


def pickle(folder: pathlib.Path, state: State) -> None:
    """pytorch_model.bin, with the buffers that early transformers wrote."""
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    torch.save({**state, **old}, folder / "pytorch_model.bin")


def sharded(
    folder: pathlib.Path, state: State, stem: str = "model", suffix: str = "safetensors", count: int = 3
) -> None:
    """Shards and their index."""
    write: Callable[..., object] = torch.save
    if suffix == "safetensors":
        write = functools.partial(save_file, metadata={"format": "pt"})
    table: dict[str, str] = {}
    for i, part in enumerate(parts(state, count), 1):
        file = f"{stem}-{i:05}-of-{count:05}.{suffix}"
        write(part, folder / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def shards(folder: pathlib.Path, state: State) -> None:
    sharded(folder, state)


def pickled_shards(folder: pathlib.Path, state: State) -> None:
    sharded(folder, state, "pytorch_model", "bin", 2)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k: all firsts of a head's pairs, then all seconds, to pair after pair."""
    half = weight.shape[0] // heads // 2
    rows = [(h * 2 + part) * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


def halved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    out = torch.empty_like(weight)
    out[interleaved(torch.arange(len(weight)), heads)] = weight
    return out


def renamed(state: State, config: Mapping[str, Any], to: int) -> dict[str, Tensor]:
    """The same weights by Mistral's (1) or GGUF's (2) names, with their rows of q and k."""
    out = {}
    for row in names(config["num_hidden_layers"]):
        if (value := state.get(row[0])) is None:
            continue
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(row[0].split(".")[-2])
        out[row[to]] = value if heads is None else interleaved(value, config[heads])
    return out


def params(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """params.json."""
    out = {ours: config[theirs] for ours, theirs in PARAMS.items()}
    out |= {"rope_theta": 1e6} if config["rope_theta"] == 1e6 else {"sliding_window": config["sliding_window"]}
    (folder / "params.json").write_text(json.dumps(out))


def consolidated(folder: pathlib.Path, state: State, config: Mapping[str, Any], pickled: bool = False) -> None:
    """Mistral's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    params(folder, config)
    given = renamed(state, config, 1)
    if pickled:
        torch.save(given, folder / "consolidated.00.pth")
    else:
        save_file(given, folder / "consolidated.safetensors")


def pieces_in_gguf(model: pathlib.Path, added: list[str], early: bool = False) -> dict[str, list[Any]]:
    """Tokens, scores and types as llama.cpp's converters write them; `early`: added ones as a user's own."""
    m = SentencePieceProcessor(model_file=str(model))
    size, kinds = len(m), []
    for i in range(size):
        kinds.append(
            TokenType.UNKNOWN if m.IsUnknown(i) else TokenType.CONTROL if m.IsControl(i)
            else TokenType.BYTE if m.IsByte(i) else TokenType.NORMAL
        )  # fmt: skip
    more = [TokenType.USER_DEFINED if early else TokenType.CONTROL] * len(added)
    return {
        "token_list": [*(m.id_to_piece(i) for i in range(size)), *added],
        "token_scores": [*(m.get_score(i) for i in range(size)), *[-1000.0] * len(added)],
        "token_types": [*kinds, *more],
    }


def write_gguf(
    path: pathlib.Path, config: Mapping[str, Any], state: State, kind: str, keys: Mapping[str, Any], split: int = 1
) -> None:
    """A GGUF file by the gguf package. `keys`: calls of its writer, "add_" + name -> argument."""
    given = list(renamed(state, config, 2).items())
    for i in range(split):
        file = path if split == 1 else path.with_name(f"{path.stem}-{i + 1:05}-of-{split:05}.gguf")
        writer = gguf.GGUFWriter(file, "llama")
        if split > 1:
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", split)
            writer.add_int32("split.tensors.count", len(given))
        if i == 0:
            _metadata(writer, config, kind, keys)
        for name, value in given[i::split]:
            _add(writer, name, value.float().numpy(), kind if value.dim() > 1 else "F32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _metadata(writer: Any, config: Mapping[str, Any], kind: str, keys: Mapping[str, Any]) -> None:
    fields = {
        "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
        "head_count": "num_attention_heads", "head_count_kv": "num_key_value_heads", "vocab_size": "vocab_size",
        "layer_norm_rms_eps": "rms_norm_eps", "rope_freq_base": "rope_theta", "rope_dimension_count": "head_dim",
        "key_length": "head_dim", "value_length": "head_dim",
    }  # fmt: skip
    writer.add_name("a model")
    for name, field in fields.items():
        getattr(writer, f"add_{name}")(config[field])
    for name, value in keys.items():
        getattr(writer, f"add_{name}")(value)


def _add(writer: Any, name: str, value: np.ndarray, kind: str) -> None:
    code = GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, value.astype(np.float32 if kind == "F32" else np.float16))
    else:
        writer.add_tensor(name, quantize(value, code), raw_dtype=code)


def read_gguf(files: list[pathlib.Path], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a GGUF file by Hugging Face's names, dequantized by the gguf package.

    The package's reader of the table takes seconds off the gguf package's, which makes an array of each token.
    """
    found = {}
    for file in files:
        raw = np.memmap(file, np.uint8, "r")
        for name, entry in read(file).entries.items():
            data = raw[entry.offset : entry.offset + entry.nbytes].reshape(*entry.shape[:-1], -1)
            values = dequantize(data, GGMLQuantizationType[entry.kind.name])
            found[name] = torch.from_numpy(values.astype(np.float32).reshape(entry.shape))
    out = {}
    for theirs, _, name in names(config["num_hidden_layers"]):
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(theirs.split(".")[-2])
        if name in found:
            out[theirs] = found[name] if heads is None else halved(found[name], config[heads])
    return out
