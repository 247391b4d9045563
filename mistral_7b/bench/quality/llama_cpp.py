"""llama.cpp's quantizer and its logits, through its C API.

Runs under the Python that has llama_cpp (`--peer-python`), which needs neither torch nor gguf.

R rows · T tokens · V vocabulary
"""

from __future__ import annotations

import ctypes
import pathlib
import platform
from typing import Any, BinaryIO

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as c

from ...errors import BenchmarkError
from ...machine import features
from ..peers.llama_cpp import silent

FLOAT32, NO_FLASH_ATTENTION = 0, 0  # ggml's type, llama.cpp's constant


def evaluate(kind: str | None, source: str, file: str, tokens: str, logits: str, threads: int) -> dict[str, Any]:
    """Quantize `source` to `file`, as type `kind` (None: evaluate `source` itself), and write its logits.

    `source` is a GGUF file in float32. Tokens (R, T) int32 are read from the .npy file `tokens`; logits (R, T, V)
    float32 are written to `logits` without a header. Returns the record's fields `path` and `versions`.
    """
    c.llama_log_set(silent, ctypes.c_void_p(0))
    c.llama_backend_init()
    if kind is not None:
        quantize(source, file, kind, threads)
    with pathlib.Path(logits).open("wb") as out:
        write_logits(source if kind is None else file, np.load(tokens), out, threads)
    return {
        "path": features(c.llama_print_system_info().decode()),
        "versions": {"llama-cpp-python": llama_cpp.__version__, "python": platform.python_version()},
    }


def quantize(source: str, file: str, kind: str, threads: int) -> None:
    """Quantize as llama-quantize does by default, without an importance matrix."""
    params = c.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}"), threads
    if code := c.llama_model_quantize(source.encode(), file.encode(), ctypes.byref(params)):
        raise BenchmarkError(f"llama_model_quantize to {kind} returned {code}")


def write_logits(file: str, tokens: Any, out: BinaryIO, threads: int) -> None:
    """Write the logits of each row of tokens (R, T), with keys and values in float32 and no flash attention."""
    model = c.llama_model_load_from_file(file.encode(), c.llama_model_default_params())
    if not model:
        raise BenchmarkError("llama.cpp cannot open the GGUF file of this model")
    params = c.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = T = tokens.shape[1]
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = FLOAT32
    params.flash_attn_type = NO_FLASH_ATTENTION
    context = c.llama_init_from_model(model, params)
    if not context:
        raise BenchmarkError(f"llama.cpp cannot create a context of {T} tokens")
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    batch = c.llama_batch_init(T, 0, 1)
    batch.n_tokens = T
    for row in tokens:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        for t, token in enumerate(row):
            batch.token[t], batch.pos[t], batch.logits[t] = int(token), t, True
            batch.n_seq_id[t], batch.seq_id[t][0] = 1, 0
        if code := c.llama_decode(context, batch):
            raise BenchmarkError(f"llama_decode returned {code}")
        np.ctypeslib.as_array(c.llama_get_logits(context), (T, vocab)).tofile(out)
