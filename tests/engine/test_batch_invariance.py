"""Whatever runs beside a request, whenever it comes and however scarce pages are: it gets what it gets alone.

Each schedule is drawn from a number: requests of a bank come between steps, are given up or not, over a pool that
may hold but one of them. What they get must be what `generate` gives, and an engine of their own: the same bits on
the quantized path of a CPU and in deterministic mode, else the same tokens, and log-probabilities up to rounding.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of, truth

from mistral_7b.engine.completion import CompletionOutput, RequestOutput
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.inputs import InputProcessor, RequestOptions
from mistral_7b.engine.memory import pool_for
from mistral_7b.engine.pages import PagePool
from mistral_7b.engine.request import Request
from mistral_7b.engine.speculation import Speculation
from mistral_7b.engine.window import most_pages
from mistral_7b.generate import generate
from mistral_7b.kernels.cpu.compiler import library
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.sampling.params import SamplingParams

W = 8
KINDS = ["float64", "float64 without a window", "int8", "int8 without a window", "int4", "bfloat16", "int8 keys"]
EXACT = {kind for kind in KINDS if not kind.startswith("float64")}
LONGEST, MOST = 41, 14  # tokens of a prompt, tokens that come


@functools.cache
def model_of(kind: str) -> Mistral7B:
    args = tiny_args(sliding_window=None if "without" in kind else W)
    if kind in ("float64", "float64 without a window"):
        return tiny_model(args, torch.float64)
    if kind == "bfloat16":
        args = tiny_args(head_dim=16)
    scheme = {"int8": Scheme("int8"), "int4": Scheme("int4"), "bfloat16": Scheme("bf16", deterministic=True)}
    return quantize(tiny_model(args, torch.bfloat16), scheme[kind.split()[0]])


@functools.cache
def draft_of(kind: str) -> Mistral7B:
    """A model that is often wrong and often right."""
    model = tiny_model(model_of("float64").args, torch.float32)
    for p in model.parameters():
        p += 0.1 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    params: SamplingParams


@functools.cache
def bank() -> list[Job]:
    """Prompts that begin alike and end anywhere about a page, a window or a chunk; parameters of every sort."""
    draw = random.Random(0)
    bases = [tokens_of((LONGEST,), seed=i).tolist() for i in range(2)]
    bases[1][:24] = (bases[1][:4] * 6)[:24]  # repeats itself
    lengths = [1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 20, 24, 25, 31, 32, 33, 40, 41]
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(seed=1, logprobs=0),
        SamplingParams(seed=2, n=2, presence_penalty=1.0, logprobs=1),
        SamplingParams(seed=3, top_p=0.8, top_k=20, min_p=0.01),
        SamplingParams(seed=4, n=3, temperature=0.7),
        SamplingParams(seed=5, stop_token_ids=[3, 5, 7, 11, 13, 17, 19]),
        SamplingParams(seed=6, min_tokens=5, stop_token_ids=list(range(30)), logit_bias={4: 3.0, 5: -100.0}),
        SamplingParams(temperature=0, prompt_logprobs=1, logprobs=1),
        SamplingParams(seed=7, prompt_logprobs=0, n=2),
    ]
    jobs = []
    for i, length in enumerate([*lengths, 8, 16, 24, 40, 33]):
        prompt = bases[i % 2][:length]
        most = draw.choice([1, 5, 9, MOST])
        p = params[i % len(params)]
        jobs.append(Job(tuple(prompt), replace(p, max_tokens=max(most, p.min_tokens))))
    return jobs


@functools.cache
def alone(kind: str, which: int) -> RequestOutput:
    """What `generate` gives for a job of the bank: nothing of the engine."""
    job = bank()[which]
    kv = torch.int8 if kind == "int8 keys" else None
    return generate(model_of(kind), list(job.prompt), job.params, kv_dtype=kv)[0]


class Schedule:
    """A course of events drawn from a number."""

    def __init__(self, kind: str, seed: int, **fixed: Any) -> None:
        self.kind, self.draw = kind, random.Random(seed)
        model, draw = model_of(kind), self.draw
        page, sequences = draw.choice([1, 3, 4, 8, 16]), draw.randint(3, 6)
        self.speculations = [
            None, None, Speculation(row_cost=0.01, min_ngram=1), Speculation(draft_of(kind), 3, row_cost=0.01),
        ]  # fmt: skip
        settings: dict[str, Any] = {
            "page_size": page, "max_sequences": sequences,
            "max_batch_tokens": sequences + page + draw.choice([0, 3, 8, 40]),
            "prefix_caching": draw.random() < 0.7, "speculation": draw.choice(self.speculations),
            "kv_dtype": "int8" if kind == "int8 keys" else None,
        }  # fmt: skip
        config = EngineConfig(**{**settings, **fixed})
        few = most_pages(LONGEST + MOST, model.args.sliding_window, config)
        self.engine = engine_of(model, config, few + draw.choice([0, 1, 5, 60]))
        self.inputs = InputProcessor(self.engine, None, "there is none here")
        self.requests: list[tuple[int, Request]] = []
        self.given_up: set[str] = set()

    def play(self, n: int) -> Schedule:
        """n requests, in bursts, some of them given up."""
        draw = self.draw
        favourites = draw.sample(range(len(bank())), 4)
        while len(self.requests) < n or not self.engine.idle:
            for _ in range(draw.choice([0, 0, 1, 4]) if len(self.requests) < n else 0):
                which = draw.choice(favourites) if draw.random() < 0.5 else draw.randrange(len(bank()))
                job = bank()[which]
                asked = RequestOptions(
                    priority=draw.choice([0, 0, 0, -1, 2]), speculation=draw.choice(self.speculations)
                )
                request = self.inputs.text(list(job.prompt), job.params, asked)
                self.engine.add(request)
                self.requests.append((which, request))
            for _ in range(draw.choice([1, 1, 2, 5])):
                self.engine.step()
            self.engine.check()
            if self.requests and draw.random() < 0.06:
                _, request = draw.choice(self.requests)
                if not request.finished:
                    self.given_up.add(request.id)
                    self.engine.abort(request.id)
        return self

    def check(self) -> Schedule:
        for which, request in self.requests:
            assert request.error is None, request.error
            cut = request.id in self.given_up
            same(request.output(), alone(self.kind, which), exact=self.kind in EXACT, cut=cut)
        return self


def engine_of(model: Mistral7B, config: EngineConfig, n_pages: int) -> Engine:
    a = model.args
    pool = PagePool(
        a.n_layers, a.n_kv_heads, a.head_dim, n_pages, config.page_size,
        dtype=model.norm.weight.dtype, int8=config.kv_dtype == "int8",
    )  # fmt: skip
    return Engine(model, pool, config)


def same(got: RequestOutput, wanted: RequestOutput, exact: bool, cut: bool = False) -> None:
    """AssertionError unless two outputs are alike, or one is the other's beginning where it was cut short."""
    for mine, theirs in zip(got.outputs, wanted.outputs, strict=True):
        n = len(mine.token_ids)
        assert mine.token_ids == theirs.token_ids[: n if cut else None]
        if not cut:
            assert (mine.finish_reason, mine.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
        _same_logprobs(mine.logprobs, _cut(theirs, n), exact)
    if not cut:
        _same_logprobs(got.prompt_logprobs, wanted.prompt_logprobs, exact)


def _cut(output: CompletionOutput, n: int) -> list[Any] | None:
    return None if output.logprobs is None else output.logprobs[:n]


def _same_logprobs(mine: Sequence[Any] | None, theirs: Sequence[Any] | None, exact: bool) -> None:
    if exact or mine is None or theirs is None:
        assert mine == theirs
        return
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        assert list(a) == list(b)
        assert [p.rank for p in a.values()] == [p.rank for p in b.values()]
        far = max(abs(p.logprob - q.logprob) for p, q in zip(a.values(), b.values(), strict=True))
        assert far < 3e-6  # log-probabilities are rounded to float32


def needs_kernels(kind: str) -> Any:
    without = kind in EXACT and library() is None
    return pytest.param(kind, marks=pytest.mark.skipif(without, reason="exact with the compiled kernels"))


kinds = pytest.mark.parametrize("kind", [needs_kernels(kind) for kind in KINDS])


@kinds
def test_a_request_gets_what_it_gets_alone(kind: str) -> None:
    """The engine and `generate` agree on each job, before anything runs beside it."""
    config = EngineConfig(max_sequences=3, max_batch_tokens=64, kv_dtype="int8" if kind == "int8 keys" else None)
    for which, job in enumerate(bank()):
        engine = engine_of(model_of(kind), config, 40)
        request = InputProcessor(engine, None, "there is none here").text(
            list(job.prompt), job.params, RequestOptions()
        )
        engine.add(request)
        while not request.finished:
            engine.step()
        same(request.output(), alone(kind, which), exact=kind in EXACT)


@kinds
def test_whatever_runs_beside_it_a_request_gets_what_it_gets_alone(kind: str) -> None:
    seen = dict.fromkeys(["preemptions", "cached_tokens", "accepted_tokens"], 0)
    for seed in range(16):
        engine = Schedule(kind, seed).play(6).check().engine
        assert engine.pool.held == 0
        for name in seen:
            seen[name] += getattr(engine.counts, name)
    assert all(seen.values()), f"these schedules try too little: {seen}"


@pytest.mark.parametrize("pooling", ["mean", "last"])
@kinds
def test_embeddings_too_whatever_runs_beside_them(kind: str, pooling: str) -> None:
    """Read in parts, thrown out and read again, or found computed: the same state."""
    model, seen = model_of(kind), 0
    for seed in range(3):
        schedule = Schedule(kind, seed, kv_dtype=None, max_sequences=5, page_size=3, max_batch_tokens=9)
        engine, wanted = schedule.engine, []
        for which in (5, 17, 18, 19, 20, 17):
            prompt = list(bank()[which].prompt)
            request = schedule.inputs.embedding(prompt, pooling, RequestOptions())
            with torch.inference_mode():
                hidden = model.hidden(torch.tensor([prompt]), model.rolling_cache(1))[0].double()
            wanted.append((request, hidden.mean(0) if pooling == "mean" else hidden[-1]))
            engine.add(request)
            schedule.play(schedule.draw.choice([0, 1]) + len(schedule.requests)) if seed else engine.step()
        while not engine.idle:
            engine.step()
            engine.check()
        for request, state in wanted:
            got = torch.tensor(request.embedding(normalize=False), dtype=torch.float64)
            torch.testing.assert_close(got, state.float().double(), rtol=0, atol=0 if kind in EXACT else 1e-6)
            seen += 1
    assert seen == 18


@pytest.mark.parametrize("kind", ["float64", "float64 without a window"])
def test_log_probabilities_are_the_references(kind: str) -> None:
    """The reference has no cache, no pages, no window but the mask, and nothing of the package."""
    schedule = Schedule(kind, 1, max_sequences=4, max_batch_tokens=12, page_size=4).play(12)
    seen = 0
    for which, request in schedule.requests:
        job = bank()[which]
        for output in request.output().outputs:
            if output.logprobs is None and request.params.prompt_logprobs is None:
                continue
            table = truth(model_of(kind), torch.tensor([*job.prompt, *output.token_ids])).log_softmax(-1)
            entries = list(enumerate(output.logprobs or (), len(job.prompt) - 1))
            if not schedule.given_up and request.params.prompt_logprobs is not None:
                entries += [(i - 1, entry) for i, entry in enumerate(request.prompt_logprobs) if entry is not None]
            for place, entry in entries:
                for token, found in entry.items():
                    assert abs(float(table[place, token]) - found.logprob) < 3e-6
                    seen += 1
    assert seen > 20


@pytest.mark.parametrize("page", [2, 4, 8])
@pytest.mark.parametrize("pages", [1, 2, 5])
@pytest.mark.parametrize("kind", ["float64", "float64 without a window"])
def test_trap_06_a_prompt_of_exactly_k_pages_twice(kind: str, page: int, pages: int) -> None:
    model, params = model_of(kind), SamplingParams(max_tokens=2 * page + 1, temperature=0, logprobs=1)
    prompt = tokens_of((page * pages,), seed=9).tolist()
    wanted = generate(model, prompt, params)[0]
    config = EngineConfig(page_size=page, max_sequences=2, max_batch_tokens=16)
    engine = engine_of(model, config, 60)
    for time in range(3):
        request = InputProcessor(engine, None, "there is none here").text(prompt, params, RequestOptions())
        engine.add(request)
        while not request.finished:
            engine.step()
        same(request.output(), wanted, exact=False)
        assert request.cached == (page * (pages - 1) if time else 0)
    longer = prompt + wanted.outputs[0].token_ids  # its own answer is found as well
    request = InputProcessor(engine, None, "there is none here").text(longer, params, RequestOptions())
    engine.add(request)
    while not request.finished:
        engine.step()
    same(request.output(), generate(model, longer, params)[0], exact=False)
    assert request.cached == (len(longer) - 1) // page * page


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_mode_is_what_makes_floats_exact(dtype: torch.dtype) -> None:
    """The configuration's word, through LLM; and what it refuses."""
    from mistral_7b.engine.llm import LLM
    from mistral_7b.errors import EngineError

    model = tiny_model(tiny_args(head_dim=16), dtype)
    config = EngineConfig(max_sequences=5, max_batch_tokens=30, page_size=4, deterministic=True)
    llm = LLM(model, config)
    jobs = bank()[:12]
    prompts, params = [list(job.prompt) for job in jobs], [job.params for job in jobs]
    together = llm.generate(prompts, params)
    for i, output in enumerate(together):
        same(output, LLM(model, config).generate(prompts[i], params[i])[0], exact=library() is not None)
        if library() is not None and dtype == torch.bfloat16:
            same(output, alone("bfloat16", i), exact=True)
    with refused(EngineError, field="deterministic"):
        LLM(model_of("float64"), config)
    assert pool_for(model, config).dtype == dtype
