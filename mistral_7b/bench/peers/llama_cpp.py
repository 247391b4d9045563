"""llama.cpp in its fastest CPU setup, through its C API, as in llama-bench.

Runs under the Python that has llama_cpp (`--peer-python`), which needs neither torch nor transformers.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as c

from ...errors import BenchmarkError
from ...machine import features
from ..jobs import Job
from ..work import BITS, table_weights

CHUNK = 512  # tokens per call, llama.cpp's default


@c.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    """Discard llama.cpp's log, so that stderr holds errors only."""


class Engine:
    def __init__(self, job: Job) -> None:
        if job.source is None:
            raise BenchmarkError("llama.cpp needs a GGUF file")
        c.llama_log_set(silent, ctypes.c_void_p(0))
        c.llama_backend_init()
        self.job = job
        self.threads = job.threads or os.cpu_count() or 1
        self.model = c.llama_model_load_from_file(job.source.encode(), c.llama_model_default_params())
        if not self.model:
            raise BenchmarkError(f"llama.cpp cannot open {job.source}")
        params = c.llama_context_default_params()
        params.n_ctx = job.rows * (job.prompt + job.room)
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = job.rows
        params.n_threads = params.n_threads_batch = self.threads
        params.no_perf = True
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise BenchmarkError("llama.cpp cannot create a context of this size", hint="use a smaller --context")
        a = job.args
        table = round(table_weights(a) * BITS[job.scheme] / 8)
        self.weight_bytes = c.llama_model_size(self.model) - (0 if a["tie_embeddings"] else table)
        self.kv_token_bytes = 2 * a["n_layers"] * a["n_kv_heads"] * a["head_dim"] * 2  # float16
        self.path = features(c.llama_print_system_info().decode())
        self.versions = {"llama-cpp-python": llama_cpp.__version__, "python": platform.python_version()}
        draw = np.random.default_rng(0)
        self.tokens = draw.integers(0, a["vocab_size"], (job.rows, job.prompt), dtype=np.int32)
        self.batch = c.llama_batch_init(CHUNK, 0, 1)

    def begin(self) -> None:
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        self.held = 0
        width = max(1, CHUNK // self.job.rows)
        for start in range(0, self.job.prompt, width):
            self._decode(self.tokens[:, start : start + width])

    def step(self) -> None:
        self._decode(self.newest[:, None])

    def _decode(self, tokens: Any) -> None:
        """Decode tokens (B, T) after the cached ones; keep each row's most likely next token."""
        rows, T = tokens.shape
        batch = self.batch
        batch.n_tokens = rows * T
        for row in range(rows):
            for t in range(T):
                i = row * T + t
                batch.token[i] = int(tokens[row, t])
                batch.pos[i] = self.held + t
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = t == T - 1
        code = c.llama_decode(self.context, batch)
        if code:
            raise BenchmarkError(f"llama_decode returned {code}")
        self.held += T
        vocab = self.job.args["vocab_size"]
        self.newest = np.array(
            [
                np.ctypeslib.as_array(c.llama_get_logits_ith(self.context, (row + 1) * T - 1), (vocab,)).argmax()
                for row in range(rows)
            ]
        )
