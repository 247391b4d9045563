"""Whatever fails of what a request brought with it ends this request, and the others get what they get alone.

Faults are injected at *every* call that a step makes into the victim's own objects. A profiler counts the calls of
their methods, and raises at the k-th, for each k until there are no more; then each method that was called fails
for good, from its first call on and from a later one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import pytest
import torch
from tiny import tiny_args, tiny_model

from mistral_7b.engine import engine, masks
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.grammar.client import GrammarState
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.request import Request, SequenceState
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import EngineError, Mistral7BError
from mistral_7b.lora.adapters import LowRanks
from mistral_7b.lora.files import Adapter, Factors
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer

CONFIG = EngineConfig(max_sequences=8, max_batch_tokens=32, page_size=4)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
PROMPT, TOKENS = "abab abab", 3
# Everything that a request can bring with it.
ASKED: dict[str, dict[str, Any]] = {
    "text": {"stop": ["zzz", "qq"], "repetition_penalty": 1.2, "presence_penalty": 0.5, "min_tokens": 2, "n": 2},
    "numbers": {"logprobs": 2, "prompt_logprobs": 1, "logit_bias": {700: 1.0}, "temperature": 0},
    "grammar": {"structured_outputs": StructuredOutputs(regex="[a-z ]{3,40}"), "n": 2},
}
WHAT = {  # some of the calls into which faults must have been injected
    "text": {"StreamDecoder.push", "StopStrings.push", "_StopMatcher.push", "History.add", "ToolCallStream.push"},
    "numbers": {"StreamDecoder.push", "Speculator.propose", "Speculator.update", "PromptLookup.propose"},
    "grammar": {"GrammarState.ask", "GrammarState.wait", "GrammarState.take", "Speculator.propose"},
}
SPECULATION = Speculation(row_cost=0.0, max_draft=3, min_ngram=1)


Place = tuple[type, str]  # a method of a class


class InjectedError(Exception):
    """No error of the project's own."""


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps wait for their grammars on however busy a machine: a late one would change the order of calls."""
    for module in (engine, masks):
        monkeypatch.setattr(module, "PATIENCE", 30.0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = Tokenizer.from_pretrained()
    args = tiny_args(vocab_size=tokenizer.vocab_size, sliding_window=16, max_seq_len=512)
    return LLM(tiny_model(args, torch.float32), CONFIG, tokenizer=tokenizer)


def own_objects(request: Request) -> Iterator[Any]:
    """What a request brought with it, and what belongs to that: the engine's own bookkeeping is not among it."""
    seen: set[int] = set()
    found: list[Any] = [request.params, request.sink, request.speculation, *request.completions]
    found += [part for s in request.sequences for part in (s.grammar, s.speculator)]
    while found:
        thing = found.pop()
        module = type(thing).__module__ or ""
        if isinstance(thing, (list, tuple)):
            found += list(thing)
        elif module.startswith("mistral_7b.") and id(thing) not in seen:
            others = isinstance(thing, (Request, SequenceState, Tokenizer))
            if others or (module.endswith("grammar.client") and not isinstance(thing, GrammarState)):
                continue
            seen.add(id(thing))
            yield thing
            found += list(vars(thing).values()) if hasattr(thing, "__dict__") else []


@contextmanager
def faults(request: Request, at: int, places: list[Place]) -> Iterator[None]:
    """Raise at call number `at` of a method of the request's own objects; `places` gets all calls."""

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or frame.f_code.co_varnames[:1] != ("self",):
            return
        code = frame.f_code
        if "mistral_7b" not in code.co_filename or id(frame.f_locals.get("self")) not in own:
            return
        places.append((type(frame.f_locals["self"]), code.co_name))
        if len(places) == at + 1:
            raise InjectedError(places[-1])

    own = {id(thing): thing for thing in own_objects(request)}
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def requests_of(llm: LLM, name: str) -> tuple[Request, list[Request]]:
    """The victim, and two beside it."""
    params = SamplingParams(**{"max_tokens": TOKENS, "seed": 1, **ASKED[name]})
    asked = RequestOptions(speculation=None if name == "text" else SPECULATION)
    if name == "text":
        messages = [{"role": "user", "content": PROMPT}]
        victim = llm.inputs.chat(messages, params, asked, lambda *_: None, [TOOL])
    else:
        victim = llm.inputs.text(PROMPT, params, asked, lambda *_: None)
    beside = [
        SamplingParams(max_tokens=TOKENS, seed=3),
        SamplingParams(max_tokens=TOKENS, temperature=0, stop="zzz"),
    ]
    return victim, [llm.inputs.text("the others", p, RequestOptions()) for p in beside]


def played(llm: LLM, requests: list[Request], inject: Callable[[], Any]) -> None:
    for request in requests:
        llm.engine.add(request)
    for _ in range(400):
        if llm.engine.idle:
            return
        with inject():
            llm.engine.step()
        llm.engine.check()
    raise AssertionError("requests do not end")


@contextmanager
def broken(request: Request, place: Place, after: int) -> Iterator[list[int]]:
    """A method of the request's own objects that fails for good, after some calls; the list counts failures."""
    kind, name = place
    owner = next(base for base in kind.__mro__ if name in vars(base))
    original, calls, failed = vars(owner)[name], [0], [0]
    function = original.fget if isinstance(original, property) else original

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(self is thing for thing in own_objects(request)):
            calls[0] += 1
            if calls[0] > after:
                failed[0] += 1
                raise InjectedError(place)
        return function(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, property(failing) if isinstance(original, property) else failing)
        yield failed


def check_end(victim: Request, place: Place) -> None:
    assert isinstance(victim.error, Mistral7BError), f"{place} failed, and no error says so"
    assert isinstance(victim.error.__cause__, InjectedError)


@pytest.mark.parametrize("name", ASKED)
def test_a_fault_in_a_request_s_own_objects_ends_it_alone(llm: LLM, name: str) -> None:
    victim, others = requests_of(llm, name)
    every: list[Place] = []
    played(llm, [others[0], victim, others[1]], lambda: faults(victim, 10**9, every))
    wanted = [r.completions[0].token_ids for r in others]
    undisturbed = [c.token_ids for c in victim.completions]

    for at in range(len(every)):  # once
        victim, others = requests_of(llm, name)
        places: list[Place] = []
        played(llm, [others[0], victim, others[1]], lambda v=victim, n=at, p=places: faults(v, n, p))
        assert [r.completions[0].token_ids for r in others] == wanted, places[at]
        assert all(r.error is None for r in others)
        assert places[at] == every[at]
        if victim.error is None:  # a call made for all was made again, for each alone
            assert [c.token_ids for c in victim.completions] == undisturbed
        else:
            check_end(victim, places[at])

    for place in dict.fromkeys(every):  # for good
        for after in {0, every.count(place) // 2}:
            victim, others = requests_of(llm, name)
            with broken(victim, place, after) as failed:
                played(llm, [others[0], victim, others[1]], nullcontext)
            assert failed[0]
            assert [r.completions[0].token_ids for r in others] == wanted, place
            assert all(r.error is None for r in others)
            check_end(victim, place)

    hit = {f"{kind.__name__}.{method}" for kind, method in every}
    assert WHAT[name] <= hit


def test_an_adapter_that_fails_ends_its_own_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layers, and in the projection to logits."""
    args = llm.engine.model.args
    torch.manual_seed(0)
    for name, target in (
        ("layer", "layers.0.attention.wq"),
        ("head", "output"),
        ("good", "layers.1.attention.wv"),
    ):
        out = llm.engine.model.get_submodule(target).out_features
        factors = Factors(torch.randn(2, args.dim), torch.randn(out, 2), 0.1)
        llm.engine.load_adapter(name, Adapter({target: factors}))  # type: ignore[arg-type]
    names = [None, "good", "layer", "head"]

    def made() -> list[Request]:
        params = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1)
        return [llm.inputs.text("a prompt", params, RequestOptions(adapter=name)) for name in names]

    alone = made()
    played(llm, alone, nullcontext)
    add, loaded = LowRanks.add, llm.engine.adapters.names

    def failing(self: LowRanks, *args: Any) -> None:
        if any(loaded[i] in ("layer", "head") and self.own[i] is not None for i in self.mixture.which.tolist()):
            raise InjectedError("the adapter's layer")
        add(self, *args)

    monkeypatch.setattr(LowRanks, "add", failing)
    for order in (range(4), reversed(range(4))):
        requests = made()
        played(llm, [requests[i] for i in order], nullcontext)
        for request, before in zip(requests[:2], alone[:2], strict=True):
            assert request.error is None
            assert request.completions[0].token_ids == before.completions[0].token_ids
        for request in requests[2:]:
            assert isinstance(request.error, EngineError)
            assert isinstance(request.error.__cause__, InjectedError)
