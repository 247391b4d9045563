"""What the rounding of activations costs a GGUF file: KL divergence from its own dequantized weights in float32.

    python experiments/gguf_rounding.py FILE.gguf TEXT [--tokens 1024]

For files with a byte-level BPE tokenizer, such as SmolLM2-135M-Instruct; its vocabulary and merges are read from
the file. With llama-cpp-python installed, llama.cpp is measured too, on the same tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import pathlib

import gguf
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from mistral_7b import Mistral7B
from mistral_7b.bench.quality.ours import float_model
from mistral_7b.checkpoint.reading import open_checkpoint


def tokens_of(path: pathlib.Path, text: str) -> list[int]:
    reader = gguf.GGUFReader(path)
    names, merges = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer.encode(text).ids


def llama_cpp_logits(path: pathlib.Path, tokens: list[int]) -> Tensor:
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    size = len(tokens) + 1
    model = llama_cpp.Llama(
        str(path), n_ctx=size, n_batch=size, n_ubatch=size, logits_all=True, type_k=0, type_v=0, flash_attn=False,
        verbose=False,
    )  # fmt: skip
    model.eval(tokens)
    logits = torch.tensor(model.scores[: len(tokens)])
    model.close()  # while its log is still quiet
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    tokens = tokens_of(options.file, options.text.read_text(encoding="utf-8"))[: options.tokens]
    batch = torch.tensor(tokens)[None]
    with torch.no_grad():
        exact = float_model(open_checkpoint(options.file))(batch)[0][0].log_softmax(-1)
        rows = {"this package": Mistral7B.from_pretrained(options.file, dtype=torch.float32)(batch)[0][0]}
    if importlib.util.find_spec("llama_cpp"):
        rows["llama.cpp"] = llama_cpp_logits(options.file, tokens)
    for name, logits in rows.items():
        kl = (exact.exp() * (exact - logits.log_softmax(-1))).sum(-1)
        top = (exact.argmax(-1) == logits.argmax(-1)).float().mean()
        print(f"{name}: {len(tokens)} tokens, KL mean {kl.mean():.2e}, max {kl.max():.2e}, top-1 {top:.1%}")


if __name__ == "__main__":
    main()
