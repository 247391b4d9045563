"""Grammars that crash their compiler, loop or fail later end their own request and affect no other.

The faults are llguidance's own (crashes of its native code cannot be caught in the process that they happen in);
llama.cpp#26600 and vllm#30730 are of the same kind.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Any

import pytest
import torch
from example_counts import MANY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny import tiny_args, tiny_model
from waiting import less

from mistral_7b.engine.config import EngineConfig, GrammarLimits
from mistral_7b.engine.grammar import client
from mistral_7b.engine.grammar.client import Grammars
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.request import Request
from mistral_7b.errors import ConfigError, GrammarError, Mistral7BError
from mistral_7b.quantization import quantize
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer

QUICK = GrammarLimits(compile_seconds=1.0, mask_seconds=0.1, request_seconds=0.5)
CONFIG = EngineConfig(max_sequences=24, max_batch_tokens=64, page_size=4, grammar_limits=QUICK)
LEAST = -(2**63)


def chain(n: int) -> dict[str, Any]:
    """A chain of references."""
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{n}": {"type": "string"}}}


def rules(n: int, name: str) -> str:
    """A chain of Lark rules (or terminals)."""
    return f"start: {name}0\n" + "\n".join(f"{name}{i}: {name}{i + 1}" for i in range(n)) + f'\n{name}{n}: "a"'


OPTIONAL = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(600)}}
OBJECTS = {"anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(2001)]}
ALTERNATIVES = "start: s\ns: " + " | ".join(f'"a" "{i}" s' for i in range(2100)) + ' | "a"'
AMBIGUOUS = 'start: s\ns: s s | "a" | ""'
HOSTILE: dict[str, dict[str, Any]] = {
    "constant in a grammar": {"grammar": 'start: %json {"const": -9223372036854775808}'},
    "constant": {"json": {"const": LEAST}},
    "bounds": {"json": {"type": "integer", "minimum": LEAST, "maximum": LEAST}},
    "references": {"json": chain(3000)},
    "rules": {"grammar": rules(6000, "r")},
    "terminals": {"grammar": rules(6000, "R")},
    "optional properties": {"json": OPTIONAL},
    "objects": {"json": OBJECTS},
    "alternatives": {"grammar": ALTERNATIVES},
    "ambiguous": {"grammar": AMBIGUOUS},
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    """An engine whose tokens are bit-identical regardless of the other requests."""
    tokenizer = Tokenizer.from_pretrained()
    args = tiny_args(vocab_size=tokenizer.vocab_size, sliding_window=64, max_seq_len=1024)
    model = tiny_model(args, torch.bfloat16)
    quantize(model, "int8")
    return LLM(model, CONFIG, tokenizer=tokenizer)


def beside(llm: LLM) -> list[Request]:
    """Requests that must not be affected: without a grammar, with one, and one that shares its process."""
    regex = StructuredOutputs(regex="[a-z]{8}( [a-z]{8}){2}")
    asked = [
        SamplingParams(max_tokens=16, seed=1),
        SamplingParams(max_tokens=16, seed=2, structured_outputs=regex),
    ]
    return [llm.inputs.text("def f(", params, RequestOptions()) for params in (*asked, asked[1])]


def run(llm: LLM, requests: list[Request]) -> None:
    for request in requests:
        llm.engine.add(request)
    end = time.monotonic() + 60
    while not llm.engine.idle:
        llm.engine.step()
        assert time.monotonic() < end, "requests do not end"
    llm.engine.check()


@pytest.fixture(scope="module")
def wanted(llm: LLM) -> list[list[int]]:
    requests = beside(llm)
    run(llm, requests)
    return [r.completions[0].token_ids for r in requests]


def check_beside(llm: LLM, wanted: list[list[int]], params: SamplingParams, **chat: Any) -> Mistral7BError | None:
    """Run a hostile request among others; return its error."""
    others = beside(llm)
    try:
        if chat:
            bad = llm.inputs.chat([{"role": "user", "content": "hi"}], params, RequestOptions(), **chat)
        else:
            bad = llm.inputs.text("def f(", params, RequestOptions())
    except Mistral7BError as e:
        run(llm, others)
        error: Mistral7BError | None = e
    else:
        run(llm, [others[0], bad, *others[1:]])
        error = bad.error
    assert all(r.error is None for r in others)
    assert [r.completions[0].token_ids for r in others] == wanted
    assert error is None or (isinstance(error, Mistral7BError) and "\n" not in str(error))
    return error


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_ends_only_its_request(llm: LLM, wanted: list[list[int]], name: str) -> None:
    params = SamplingParams(max_tokens=40, seed=1, n=2, structured_outputs=StructuredOutputs(**HOSTILE[name]))
    check_beside(llm, wanted, params)


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("name", ["constant", "optional properties", "references", "objects"])
def test_a_hostile_tool_ends_only_its_request(llm: LLM, wanted: list[list[int]], name: str, choice: str) -> None:
    parameters = {"type": "object", "properties": {"x": HOSTILE[name]["json"]}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    wants = None if choice == "required" else StructuredOutputs(choice=["yes", "no"])
    params = SamplingParams(max_tokens=40, seed=1, structured_outputs=wants)
    check_beside(llm, wanted, params, tools=[tool], tool_choice=choice)


@pytest.mark.parametrize("name", ["rules", "terminals"])
def test_a_crash_raises_one_grammar_error(llm: LLM, name: str) -> None:
    with refused(GrammarError, field="structured_outputs") as e:
        llm.inputs.text(
            "a", SamplingParams(structured_outputs=StructuredOutputs(**HOSTILE[name])), RequestOptions()
        )
    assert len(str(e.value)) < 300


def test_an_ambiguous_grammar_ends_at_its_cpu_limit(llm: LLM, wanted: list[list[int]]) -> None:
    """Its masks take ever longer. Other requests' steps wait for it briefly, and it ends with its limit named."""
    a = next(t for t in range(4096) if llm.tokenizer.surface(t) == "a")  # type: ignore[union-attr]
    ambiguous = StructuredOutputs(grammar=AMBIGUOUS)
    params = SamplingParams(
        max_tokens=900, min_tokens=800, n=8, logit_bias={a: 100}, structured_outputs=ambiguous
    )  # fmt: skip

    def longest_step() -> float:
        bad = llm.inputs.text("a", params, RequestOptions())
        beside_it = SamplingParams(max_tokens=600, ignore_eos=True, seed=1)
        free = llm.inputs.text("def f(", beside_it, RequestOptions())
        longest = 0.0
        for request in (bad, free):
            llm.engine.add(request)
        while not llm.engine.idle:
            began, before = time.monotonic(), len(free.completions[0].token_ids)
            llm.engine.step()
            if not bad.finished and not free.finished:
                assert len(free.completions[0].token_ids) == before + 1, "a step passed it over"
                longest = max(longest, time.monotonic() - began)
        assert isinstance(bad.error, GrammarError)
        assert bad.error.field == "structured_outputs"
        assert free.error is None
        return longest

    less(0.5, longest_step)  # on a busy machine; the moment is 10 ms
    run(llm, others := beside(llm))
    assert [r.completions[0].token_ids for r in others] == wanted


@pytest.mark.parametrize("sent", [signal.SIGSEGV, signal.SIGKILL])
def test_states_restart_when_their_shared_process_ends(llm: LLM, wanted: list[list[int]], sent: int) -> None:
    """Their process is killed during several completions: all have the same output."""
    for killed_at in (1, 3, 8):
        requests = beside(llm)
        for request in requests:
            llm.engine.add(request)
        for _ in range(killed_at):
            llm.engine.step()
        pids = {r.sequences[0].grammar._process._pid for r in requests[1:]}  # type: ignore[union-attr]
        assert len(pids) == 1, "equal grammars share a process"
        for pid in pids:
            os.kill(pid, sent)
        run(llm, [])
        assert [r.completions[0].token_ids for r in requests] == wanted
        assert all(r.error is None for r in requests)


def test_a_killed_fork_server_is_restarted(llm: LLM, wanted: list[list[int]]) -> None:
    llm.inputs.grammars._server._process.kill()
    llm.inputs.grammars._processes.clear()
    others = beside(llm)
    run(llm, others)
    assert [r.completions[0].token_ids for r in others] == wanted


def test_processes_end_with_their_engine() -> None:
    tokenizer = Tokenizer.from_pretrained()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    state = grammars.start(StructuredOutputs(regex="a+"), [])
    pid, server = state._process._pid, grammars._server._process
    os.kill(pid, 0)
    del grammars, state
    assert server.wait(10) == 0
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.05)
    pytest.fail("a worker is left")


def test_invalid_limits_are_refused() -> None:
    for wrong in ({"mask_seconds": 0}, {"compile_seconds": "1"}, {"memory_bytes": 5}, {"request_seconds": True}):
        with refused(ConfigError, field=next(iter(wrong))):
            GrammarLimits(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------ at random

NUMBERS = st.sampled_from([LEAST, LEAST + 1, 2**63 - 1, 2**63, 10**40, -1, 0, 1, 3, 0.5, 1e300, -1e-300, 999983])
PATTERNS = st.sampled_from(["(a|b)*a(a|b){40}c", "^.{9999}$", "(", "a*"])
ODD = st.sampled_from([{}, {"type": "strin"}, {"$ref": "#"}, {"enum": []}, {"not": {}}, {"type": []}])
LEAVES = st.one_of(
    ODD,
    st.builds(lambda n: {"const": n}, NUMBERS),
    st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": b}, NUMBERS, NUMBERS),
    st.builds(lambda a: {"type": "number", "multipleOf": a}, NUMBERS),
    st.builds(lambda n: {"type": "string", "minLength": n}, st.sampled_from([0, 3, 10**4, 10**9])),
    st.builds(lambda p: {"type": "string", "pattern": p}, PATTERNS),
    st.builds(lambda n: {"properties": {f"k{i}": {} for i in range(n)}}, st.sampled_from([2, 700])),
    st.builds(lambda n: {"anyOf": [{"required": [f"k{i}"]} for i in range(n)]}, st.sampled_from([3, 900])),
    st.builds(chain, st.sampled_from([5, 200, 2500])),
)


def keys(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": a}, "patternProperties": {".*": b}, "required": ["x", "y"]}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda s, n: {"type": "array", "items": s, "minItems": n}, inner, st.sampled_from([0, 2, 10**6])
        ),
        st.builds(lambda a, b: {"allOf": [a, b]}, inner, inner),
        st.builds(lambda a, b: {"oneOf": [a, b, a]}, inner, inner),
        st.builds(keys, inner, inner),
    ),
    max_leaves=6,
)
LARGE = '%json {"const": -9223372036854775808}'  # at which llguidance's own reading crashes
PARTS = [
    '"a"',
    "/a+/",
    '""',
    "s",
    "t",
    "(s t)*",
    "s{2,900}",
    "X",
    '"a"~5',
    "<[*]>",
    "/(?s:.)*/",
    "%json {}",
    LARGE,
]
LARKS = st.builds(
    lambda a, b, c: f"start: s\ns: {' '.join(a)} | {' '.join(b)}\nt: {' | '.join(c)}\nX: /[a-z]{{1,300}}/",
    *[st.lists(st.sampled_from(PARTS), min_size=1, max_size=6)] * 3,
)
SPECS = st.one_of(
    st.builds(lambda s: {"json": s}, SCHEMAS),
    st.builds(lambda s: {"grammar": s}, LARKS),
    st.builds(
        lambda n, name: {"grammar": rules(n, name)}, st.sampled_from([9, 6000]), st.sampled_from(["r", "R"])
    ),
    st.builds(lambda s: {"regex": s}, st.text(alphabet="ab()[]{}*+?|\\.^$,019-", max_size=40)),
)
ENDS = Counter[str]()


@settings(MANY, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=SPECS, seed=st.integers(0, 3))
def test_random_hostile_grammars_do_not_change_other_outputs(
    llm: LLM, wanted: list[list[int]], spec: dict[str, Any], seed: int
) -> None:
    params = SamplingParams(max_tokens=12, seed=seed, n=1 + seed, structured_outputs=StructuredOutputs(**spec))
    error = check_beside(llm, wanted, params)
    kinds = [kind for kind in ("CPU time", "failed") if kind in str(error)]
    ENDS["served" if error is None else kinds[0] if kinds else "refused"] += 1


@pytest.mark.wording
def test_random_hostile_grammars_cover_every_kind() -> None:
    """A check of the test above: its samples were often served, often refused, and often ended midway."""
    assert ENDS["served"] > 30
    assert ENDS["refused"] > 30
    assert ENDS["CPU time"] + ENDS["failed"] > 5


def test_an_unresponsive_process_times_out(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In wall-clock time: its request ends, and independent requests continue meanwhile."""
    params = SamplingParams(max_tokens=16, structured_outputs=StructuredOutputs(regex="[q-z]{40}"))
    stuck = llm.inputs.text("a", params, RequestOptions())
    pid = stuck.sequences[0].grammar._process._pid  # type: ignore[union-attr]
    monkeypatch.setattr(client, "ANSWER_TIMEOUT", 1.0)
    os.kill(pid, signal.SIGSTOP)
    try:
        free = llm.inputs.text("def f(", SamplingParams(max_tokens=16, seed=1), RequestOptions())
        run(llm, [stuck, free])
    finally:
        os.kill(pid, signal.SIGKILL)
    assert isinstance(stuck.error, GrammarError)
    assert free.error is None
