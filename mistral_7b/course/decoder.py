"""Many prompts at once with the learner's model, pages and scheduler: the end of the course, exercise 14."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..engine.inputs import InputProcessor, RequestOptions
from ..engine.llm import run
from ..engine.pages import PagePool
from ..engine.scheduler import Scheduler
from ..model import Mistral7B
from ..sampling.params import SamplingParams
from ..text.tokenizer import Tokenizer


def decode_all(
    model: Mistral7B, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams, pages: int = 64
) -> list[str]:
    """Continue several texts together, with continuous batching over `pages` KV pages of 16 tokens."""
    args, config = model.args, EngineConfig(page_size=16, max_sequences=4, max_batch_tokens=64)
    dtype = model.norm.weight.dtype
    pool = PagePool(args.n_layers, args.n_kv_heads, args.head_dim, pages, config.page_size, dtype=dtype)
    engine = Engine(model, pool, config)
    engine.scheduler = Scheduler(pool, args.sliding_window, config)
    inputs = InputProcessor(engine, tokenizer)
    requests = [inputs.text(prompt, params, RequestOptions()) for prompt in prompts]
    run(engine, requests)
    engine.scheduler.check_pages()
    return [request.output().outputs[0].text for request in requests]
