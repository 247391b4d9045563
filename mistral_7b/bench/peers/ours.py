"""This package as a benchmark engine, through its public API only."""

from __future__ import annotations

import platform
import time

import torch

from ...generate import PREFILL_CHUNK, stream
from ...kernels import backend, threads
from ...model import Mistral7B, ModelArgs
from ...quantization.schemes import compressed_bytes, random_model
from ...sampling.params import SamplingParams
from ..jobs import WARM_UP, Job


class Engine:
    """Chunked prefill as in `generate`, then one token per row and step, in a rolling cache."""

    def __init__(self, job: Job) -> None:
        threads.use(job.threads)
        self.job = job
        self.model = build(job).eval()
        self.tokens = torch.randint(0, self.model.args.vocab_size, (job.rows, job.prompt))
        self.weight_bytes = compressed_bytes(self.model)
        self.kv_token_bytes = kv_token_bytes(self.model)
        self.threads = torch.get_num_threads()
        self.path = f"kernels: {backend.running()}; PyTorch: {torch.backends.cpu.get_cpu_capability()}"
        self.versions = {"torch": torch.__version__, "python": platform.python_version()}

    @torch.inference_mode()
    def begin(self) -> None:
        job = self.job
        self.cache = self.model.rolling_cache(job.rows, job.prompt + job.room)
        for chunk in self.tokens.split(max(1, PREFILL_CHUNK // job.rows), dim=1):
            hidden = self.model.hidden(chunk, self.cache)  # (B, T, D)
        self.logits = self.model.logits(hidden[:, -1:])  # (B, 1, V)

    @torch.inference_mode()
    def step(self) -> None:
        self.logits = self.model.logits(self.model.hidden(self.logits.argmax(-1), self.cache))

    def generated(self, seconds: float) -> float:
        """Return the median tokens per second of `generate`, including sampling and text."""
        params = SamplingParams(temperature=0, max_tokens=self.job.room, ignore_eos=True)
        times: list[float] = []
        pieces = stream(self.model, self.tokens[0].tolist(), params)
        began = time.perf_counter()
        for n, piece in enumerate(pieces):
            now = time.perf_counter()
            if n >= WARM_UP and piece.token_ids:
                times.append((now - began) / len(piece.token_ids))
                if sum(times) > seconds:
                    break
            began = now if piece.token_ids else began
        pieces.close()  # type: ignore[attr-defined]
        return 1 / sorted(times)[len(times) // 2]


def build(job: Job) -> Mistral7B:
    """Return the model of a job: loaded from its source, or with random weights."""
    scheme = None if job.scheme == "none" else job.scheme
    if job.source is not None:
        # Quantized weights are copied to huge pages, but stay mapped when the load time is measured.
        return Mistral7B.from_pretrained(job.source, quantization=scheme, mmap=job.what == "load")
    return random_model(ModelArgs(**job.args), scheme)


def kv_token_bytes(model: Mistral7B) -> int:
    """Return the bytes of one token's keys and values in all layers of a rolling cache."""
    return sum(entry.nbytes for layer in model.rolling_cache(1, 1).layers for entry in layer.entries)
