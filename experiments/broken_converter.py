"""A converter that can be broken: writes a model in Hugging Face's, Mistral's or GGUF format, with one mistake.

For compare_faults.py. It shares no code with what it is to be found by: it reads and writes files with safetensors
and gguf's own writer, and permutes with its own expressions.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMATS = ("huggingface", "mistral", "gguf", "gguf-q4_0")
LAYER = {  # Hugging Face's name -> Mistral's, GGUF's
    "input_layernorm": ("attention_norm", "attn_norm"),
    "self_attn.q_proj": ("attention.wq", "attn_q"),
    "self_attn.k_proj": ("attention.wk", "attn_k"),
    "self_attn.v_proj": ("attention.wv", "attn_v"),
    "self_attn.o_proj": ("attention.wo", "attn_output"),
    "post_attention_layernorm": ("ffn_norm", "ffn_norm"),
    "mlp.gate_proj": ("feed_forward.w1", "ffn_gate"),
    "mlp.down_proj": ("feed_forward.w2", "ffn_down"),
    "mlp.up_proj": ("feed_forward.w3", "ffn_up"),
}
OUTER = {
    "model.embed_tokens": ("tok_embeddings", "token_embd"),
    "model.norm": ("norm", "output_norm"),
    "lm_head": ("output", "output"),
}


@dataclasses.dataclass
class Model:
    """Hugging Face's tensors and configuration, and what the tokenizer's files say."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    vocabulary: Path  # the SentencePiece file
    add_bos: bool = True
    template: str | None = None  # chat template
    permuted: str = "right"  # or "not", "k as q": what is done to the rows of q and k between the formats

    @classmethod
    def read(cls, folder: Path) -> Model:
        config = json.loads((folder / "config.json").read_text())
        return cls(load_file(folder / "model.safetensors"), config, folder / "tokenizer.model.v3")

    def copy(self) -> Model:
        return dataclasses.replace(self, tensors=dict(self.tensors), config=copy.deepcopy(self.config))

    def layers(self) -> range:
        return range(self.config["num_hidden_layers"])

    def set_theta(self, theta: float) -> None:
        self.config["rope_theta"] = self.config["rope_parameters"]["rope_theta"] = theta

    def write(self, out: Path, format: str, like: Path | None = None) -> Path:
        """Write the model; `like` is a sound GGUF file, whose tokenizer is copied."""
        if format.startswith("gguf"):
            assert like is not None
            return self._write_gguf(out.with_suffix(".gguf"), like, format.endswith("q4_0"))
        out.mkdir(parents=True)
        shutil.copyfile(self.vocabulary, out / "tokenizer.model.v3")
        settings: dict[str, Any] = {}
        if not self.add_bos:
            settings["add_bos_token"] = False
        if self.template is not None:
            settings |= {"chat_template": self.template, "bos_token": "<s>", "eos_token": "</s>"}
        if settings:
            (out / "tokenizer_config.json").write_text(json.dumps(settings))
        if format == "huggingface":
            shutil.copyfile(self.vocabulary, out / "tokenizer.model")
            (out / "config.json").write_text(json.dumps(self.config))
            save_file(
                {name: t.contiguous() for name, t in self._for("huggingface").items()}, out / "model.safetensors"
            )
        else:
            (out / "params.json").write_text(json.dumps(self._params()))
            save_file(
                {name: t.contiguous() for name, t in self._for("mistral").items()},
                out / "consolidated.safetensors",
            )
        return out

    def _for(self, format: str) -> dict[str, Tensor]:
        """The tensors by another format's names, their rows permuted as it has them, if this is done right."""
        column = {"mistral": 0, "gguf": 1}.get(format)
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        out = {}
        for name, tensor in self.tensors.items():
            stem = name.removesuffix(".weight")
            number, _, inner = stem.removeprefix("model.layers.").partition(".")
            own = {"self_attn.q_proj": heads, "self_attn.k_proj": groups}.get(inner)
            if own is not None:
                wrong = heads if inner.startswith("self_attn.k") and self.permuted == "k as q" else own
                if format == "huggingface":  # written from Mistral's rows
                    rows = paired(tensor, own)
                    tensor = rows if self.permuted == "not" else halved(rows, wrong)
                elif self.permuted != "not":
                    tensor = paired(tensor, wrong)
            if column is not None:
                layer = f"layers.{number}." if column == 0 else f"blk.{number}."
                stem = layer + LAYER[inner][column] if inner in LAYER else OUTER[stem][column]
            out[f"{stem}.weight"] = tensor
        if format == "mistral" and "output.weight" not in out and self.config["tie_word_embeddings"]:
            out["output.weight"] = out["tok_embeddings.weight"].clone()
        return out

    def _params(self) -> dict[str, Any]:
        c = self.config
        out = {
            "dim": c["hidden_size"], "n_layers": c["num_hidden_layers"], "head_dim": c["head_dim"],
            "hidden_dim": c["intermediate_size"], "n_heads": c["num_attention_heads"],
            "n_kv_heads": c["num_key_value_heads"], "norm_eps": c["rms_norm_eps"], "vocab_size": c["vocab_size"],
            "rope_theta": c["rope_theta"], "max_seq_len": c["max_position_embeddings"],
            "tied_embeddings": c["tie_word_embeddings"],
        }  # fmt: skip
        return out if c["sliding_window"] is None else {**out, "sliding_window": c["sliding_window"]}

    def _write_gguf(self, out: Path, like: Path, quantized: bool) -> Path:
        c = self.config
        reader, writer = gguf.GGUFReader(like), gguf.GGUFWriter(out, "llama")
        ours = {
            "llama.attention.head_count": c["num_attention_heads"],
            "llama.attention.head_count_kv": c["num_key_value_heads"],
            "llama.attention.key_length": c["head_dim"],
            "llama.attention.value_length": c["head_dim"],
            "llama.rope.dimension_count": c["head_dim"],
            "llama.rope.freq_base": c["rope_theta"],
            "llama.attention.sliding_window": c["sliding_window"] or 0,
            "llama.attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
            "llama.vocab_size": c["vocab_size"],
        }
        if not self.add_bos:
            ours["tokenizer.ggml.add_bos_token"] = False
        if self.template is not None:
            ours["tokenizer.chat_template"] = self.template
        kinds = gguf.GGUFValueType
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key == "general.architecture":
                continue
            value, kind = field.contents(), field.types[0]
            inner = field.types[-1] if kind == kinds.ARRAY else None
            if key.startswith("tokenizer.ggml.") and kind == kinds.ARRAY and key != "tokenizer.ggml.merges":
                value = padded_list(key, value, c["vocab_size"])
            writer.add_key_value(key, ours.pop(key, value), kind, inner)
        for key, value in ours.items():
            kind = (
                kinds.STRING
                if isinstance(value, str)
                else kinds.BOOL
                if isinstance(value, bool)
                else kinds.FLOAT32
            )
            writer.add_key_value(key, value, kind)
        for name, tensor in self._for("gguf").items():
            values = tensor.float().numpy()
            if values.ndim == 1:
                writer.add_tensor(name, values)
                continue
            kind = gguf.GGMLQuantizationType.Q4_0 if quantized else gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return out


def padded_list(key: str, values: list[Any], size: int) -> list[Any]:
    """An array of the tokenizer with entries for rows of padding."""
    like = {"tokens": [f"[PAD{i}]" for i in range(len(values), size)]}.get(
        key.rpartition(".")[2], [5 if key.endswith("token_type") else 0.0] * (size - len(values))
    )
    return [*values, *like]


def paired(rows: Tensor, heads: int) -> Tensor:
    """Hugging Face's rows in the order of Mistral's: x0 y0 x1 y1 from x0 x1 y0 y1."""
    width = len(rows) // heads
    order = [h * width + i // 2 + (i % 2) * (width // 2) for h in range(heads) for i in range(width)]
    return rows[order]


def halved(rows: Tensor, heads: int) -> Tensor:
    """Mistral's rows in the order of Hugging Face's."""
    width = len(rows) // heads
    order = [h * width + 2 * (i % (width // 2)) + i // (width // 2) for h in range(heads) for i in range(width)]
    return rows[order]


def noise_like(t: Tensor, size: float, seed: int) -> Tensor:
    drawn = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed))
    return drawn * (size * t.float().norm() / math.sqrt(t.numel()))


def write_adapter(out: Path, model: Model, size: float = 0.05, rank: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    """Write an adapter of PEFT for q, v and down; returns the updates of the weights."""
    out.mkdir()
    tensors, updates, names = {}, {}, ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    for n in model.layers():
        for i, name in enumerate(names):
            weight = model.tensors[f"model.layers.{n}.{name}.weight"].float()
            draw = torch.Generator().manual_seed(31 * n + i)
            a = torch.randn(rank, weight.shape[1], generator=draw)
            b = torch.randn(len(weight), rank, generator=draw)
            b *= size * weight.norm() / (2 * b @ a).norm()
            key = f"base_model.model.model.layers.{n}.{name}.lora"
            tensors |= {f"{key}_A.weight": a.contiguous(), f"{key}_B.weight": b.contiguous()}
            updates[f"model.layers.{n}.{name}.weight"] = (2 * b @ a).numpy()
    save_file(tensors, out / "adapter_model.safetensors")
    modules = [name.rpartition(".")[2] for name in names]
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules, "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps({**about, "task_type": "CAUSAL_LM"}))
    return updates


def merged(model: Model, updates: dict[str, np.ndarray[Any, Any]]) -> Model:
    out = model.copy()
    for name, update in updates.items():
        tensor = out.tensors[name]
        out.tensors[name] = (tensor.float() + torch.from_numpy(update)).to(tensor.dtype)
    return out
