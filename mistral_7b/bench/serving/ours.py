"""This package's engine under load, in its own process together with the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import torch

from ...engine.async_llm import AsyncLLM
from ...engine.config import EngineConfig
from ...kernels import threads
from ...machine import peak_memory
from ...model import Mistral7B, ModelArgs
from ...quantization import random_model
from ...sampling.params import SamplingParams
from ...text.tokenizer import Tokenizer
from ..peers.ours import environment
from .client import Served, Trace, drive, warm_up
from .traffic import Arrival, ServingJob


class Ours:
    """AsyncLLM as a Target."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm

    async def stream(self, prompt: list[int], output: int) -> AsyncIterator[int]:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        async for piece in self.llm.stream(prompt, params):
            yield len(piece.token_ids)


def serve(job: ServingJob) -> Served:
    """Load or create the model of a job, and send it the job's traffic."""
    threads.use(job.threads)
    model = build(job).eval()
    config = EngineConfig(max_sequences=job.max_sequences, max_batch_tokens=job.max_batch_tokens)
    traces, alone, cached = asyncio.run(_serve(model, config, job.traffic.draw(model.args.vocab_size)))
    return Served(
        traces, alone, torch.get_num_threads(), peak_memory(), *environment(), cached,
    )  # fmt: skip


async def _serve(
    model: Mistral7B, config: EngineConfig, arrivals: list[Arrival]
) -> tuple[list[Trace], float, int]:  # fmt: skip
    async with AsyncLLM(model, config, tokenizer=words_for(model)) as llm:
        target = Ours(llm)
        alone = await warm_up(target, arrivals, model.args.vocab_size)
        return await drive(target, arrivals), alone, llm.engine.counts.cached_tokens


def build(job: ServingJob) -> Mistral7B:
    """Return the model of a job: loaded from its source, or with random weights."""
    scheme = None if job.scheme == "none" else job.scheme
    if job.source is not None:
        return Mistral7B.from_pretrained(job.source, quantization=scheme, mmap=False)
    return random_model(ModelArgs(**job.args), scheme)


def words_for(model: Mistral7B) -> Tokenizer | None:
    """Return v0.1's tokenizer for random weights, so that detokenization is timed.

    None if the vocabulary is too small, or for a loaded model, whose tokenizer the engine finds itself.
    """
    return Tokenizer.v1() if model.source is None and model.args.vocab_size >= 32000 else None
