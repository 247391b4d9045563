"""This package as a benchmark engine, through its public API only."""

from __future__ import annotations

import platform
import time

import torch
from torch import Tensor

from ...generate import PREFILL_CHUNK, stream
from ...kernels import backend, threads
from ...lora import apply, read_adapter
from ...lora.adapters import Adapters, Run
from ...model import Mistral7B, ModelArgs
from ...quantization.schemes import compressed_bytes, random_model
from ...sampling.params import SamplingParams
from ..jobs import WARM_UP, Job

ADAPTER = "adapter"


class Engine:
    """Chunked prefill as in `generate`, then one token per row and step, in a rolling cache."""

    def __init__(self, job: Job) -> None:
        threads.use(job.threads)
        self.job = job
        model, rest, factors = build(job).eval(), None, 0  # bytes of the adapter's factors
        if job.adapter is not None:
            adapter = read_adapter(job.adapter, model.args)
            linears = [f for name, f in adapter.targets.items() if name != "tok_embeddings"]
            factors = sum(f.a.numel() + f.b.numel() for f in linears) * model.norm.weight.element_size()
            model, rest = apply(model, adapter)
        self.model, self.adapter, self.adapters = model, rest, Adapters(model)
        if rest is not None:
            self.adapters.load(ADAPTER, rest)
        self.tokens = torch.randint(0, self.model.args.vocab_size, (job.rows, job.prompt))
        self.weight_bytes = compressed_bytes(model) + factors
        self.kv_token_bytes = kv_token_bytes(self.model)
        self.threads = torch.get_num_threads()
        self.path, self.versions = environment()

    @torch.inference_mode()
    def begin(self) -> None:
        job = self.job
        self.cache = self.model.rolling_cache(job.rows, job.prompt + job.room)
        for chunk in self.tokens.split(max(1, PREFILL_CHUNK // job.rows), dim=1):
            hidden = self.hidden(chunk)  # (B, T, D)
        self.logits = self.projected(hidden[:, -1:])  # (B, 1, V)

    @torch.inference_mode()
    def step(self) -> None:
        self.logits = self.projected(self.hidden(self.logits.argmax(-1)))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states of tokens (B, T), every row with the adapter if there is one."""
        with self.adapters.over(self.runs(tokens.numel())) as model:
            return model.hidden(tokens, self.cache)

    def projected(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (B, 1, D)."""
        with self.adapters.over(self.runs(len(hidden))) as model:
            return model.logits(hidden)

    def runs(self, rows: int) -> list[Run]:
        return [(None if self.adapter is None else ADAPTER, rows)]

    def generated(self, seconds: float) -> float:
        """Return the median tokens per second of `generate`, including sampling and text."""
        params = SamplingParams(temperature=0, max_tokens=self.job.room, ignore_eos=True)
        times: list[float] = []
        pieces = stream(self.model, self.tokens[0].tolist(), params, adapter=self.adapter)
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


def environment() -> tuple[str, dict[str, str]]:
    """Return the instruction sets and kernels that run, and versions."""
    path = f"kernels: {backend.running()}; PyTorch: {torch.backends.cpu.get_cpu_capability()}"
    return path, {"torch": torch.__version__, "python": platform.python_version()}


def kv_token_bytes(model: Mistral7B) -> int:
    """Return the bytes of one token's keys and values in all layers of a rolling cache."""
    return sum(entry.nbytes for layer in model.rolling_cache(1, 1).layers for entry in layer.entries)
