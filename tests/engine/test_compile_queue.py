"""The limits on grammars that compile at once and on processes, and the end of abandoned compilations."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_args, tiny_model
from waiting import until

from mistral_7b.engine.config import EngineConfig, GrammarLimits
from mistral_7b.engine.grammar import compile_queue
from mistral_7b.engine.grammar.client import Grammars, GrammarState
from mistral_7b.engine.llm import LLM
from mistral_7b.errors import AbandonedError, EngineError, GrammarError, Mistral7BError, QueueFullError
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer
from tests.engine.drawing import allowed

LONG = GrammarLimits(compile_seconds=60)


def slow(i: int = 0) -> StructuredOutputs:
    """A grammar that takes seconds to compile."""
    return StructuredOutputs(grammar="start: s\ns: " + " | ".join(f'"a{i}" "{j}" s' for j in range(60_000)))


def quick(i: int = 0) -> StructuredOutputs:
    return StructuredOutputs(regex=f"{i}a*")


@pytest.fixture
def grammars() -> Grammars:
    tokenizer = Tokenizer.from_pretrained()
    return Grammars(tokenizer, tokenizer.vocab_size, LONG)


def workers(grammars: Grammars) -> dict[int, str]:
    """The live workers of the fork server and their states: "R" is running, "T" is suspended."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, (state, parent) = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == grammars._server._process.pid and state != "Z":
            found[pid] = state
    return found


class Asking(threading.Thread):
    """A request whose grammar is compiled on a thread, with its state or error."""

    def __init__(self, grammars: Grammars, spec: StructuredOutputs) -> None:
        super().__init__(daemon=True)
        self.grammars, self.spec, self.gone = grammars, spec, threading.Event()
        self.state: GrammarState | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.state = self.grammars.start(self.spec, [1], disconnected=self.gone)
        except Mistral7BError as e:
            self.error = e


def ended(asking: list[Asking], seconds: float = 5.0) -> list[str]:
    """Disconnect all requests; the names of the errors they end with."""
    for each in asking:
        each.gone.set()
    for each in asking:
        each.join(seconds)
        assert not each.is_alive()
    return [type(each.error).__name__ for each in asking]


def test_slow_grammars_do_not_delay_ordinary_ones(grammars: Grammars) -> None:
    """Few of them compile at once, and an ordinary grammar waits at most a time slice for each one ahead."""
    hostile = [Asking(grammars, slow(i)) for i in range(12)]
    most = grammars.compile_queue.max_quick + grammars.compile_queue.max_slow
    running: list[int] = []
    took: list[float] = []
    for i in range(4):
        began = time.monotonic()
        ordinary = Asking(grammars, quick(i))
        while ordinary.is_alive():
            busy = sum(state != "T" for state in workers(grammars).values())
            running.append(busy - 1 - i)  # one has been forked ahead of its need, and i are idle
            time.sleep(0.01)
        took.append(time.monotonic() - began)
        assert ordinary.state is not None
    assert sum(each.is_alive() for each in hostile) >= 10
    # The ordinary one may have ended without being idle yet, and a process may run for a moment after SIGSTOP: so
    # what counts is what five looks in a row see.
    assert max(map(min, zip(*(running[i:] for i in range(5)), strict=False))) <= most + 1
    assert took[0] < 12 * compile_queue.TIME_SLICE + 3  # on a busy machine
    assert max(took[1:]) < 3
    assert "T" in workers(grammars).values()
    assert ended(hostile).count("AbandonedError") >= 10
    assert until(lambda: len(workers(grammars)) <= 1 + 4 + 2, 2)


def test_new_grammars_wait_for_a_turn(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_queue, "TIME_SLICE", 60.0)
    asking = [Asking(grammars, slow(i)) for i in range(grammars.compile_queue.max_quick + 3)]
    assert until(lambda: len(grammars.compile_queue._waiting) >= 3, 20)
    assert len(workers(grammars)) <= grammars.compile_queue.max_quick + 1  # one has been forked ahead of its need
    assert ended(asking).count("AbandonedError") >= 3


def test_suspended_grammars_compile_to_the_same_masks(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspended compilation yields the masks of an uninterrupted one."""
    monkeypatch.setattr(compile_queue, "TIME_SLICE", 0.0)
    schemas = [{"properties": {f"{i}-{j}": {"type": "integer"} for j in range(400)}} for i in range(5)]
    medium = [StructuredOutputs(json=schema) for schema in schemas]
    asking = [Asking(grammars, spec) for spec in medium]
    for each in asking:
        each.join(60)
    masks = [each.state.masks()[0][0] for each in asking if each.state is not None]
    assert len(masks) == 5
    assert all(np.array_equal(mask, masks[0]) for mask in masks)  # they begin alike
    assert not any(
        grammars.compile_queue.is_compiling(each.state._process) for each in asking if each.state is not None
    )


def test_full_queues_refuse_with_the_limit(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_queue, "MAX_SUSPENDED", 2)
    at_once = grammars.compile_queue.max_slow + compile_queue.MAX_SUSPENDED
    asking = [Asking(grammars, slow(i)) for i in range(at_once + 2)]
    assert until(lambda: sum(not each.is_alive() for each in asking) >= 2, 20)
    full = [each.error for each in asking if not each.is_alive()]
    assert all(isinstance(error, QueueFullError) and "2 grammars that take long" in str(error) for error in full)
    late = [each for each in asking if each.is_alive()]
    monkeypatch.setattr(compile_queue, "QUEUE_TIMEOUT", 0.5)
    assert until(lambda: sum(not each.is_alive() for each in late) >= compile_queue.MAX_SUSPENDED, 20)
    assert all("others before it took 0.5 s" in str(each.error) for each in late if not each.is_alive())
    ended(asking)
    monkeypatch.setattr(compile_queue, "MAX_WAITING", 0)
    with pytest.raises(QueueFullError, match="0 grammars wait to be compiled"):
        grammars.start(quick(), [1])
    monkeypatch.setattr(compile_queue, "MAX_WAITING", 1)
    monkeypatch.setattr(compile_queue, "QUEUE_TIMEOUT", 0.2)
    grammars.compile_queue.max_quick = 0
    with pytest.raises(QueueFullError, match=r"did not come in 0\.2 s"):
        grammars.start(quick(), [1])


def test_an_abandoned_compilation_ends(grammars: Grammars) -> None:
    first, second = Asking(grammars, slow()), Asking(grammars, slow())  # which share a process
    assert until(lambda: any(len(p.waiting_states) == 2 for p in grammars._alive), 10)
    (process,) = grammars._alive
    first.gone.set()
    first.join(2)
    assert isinstance(first.error, AbandonedError)
    assert second.is_alive()
    assert process._pid in workers(grammars)
    second.gone.set()
    second.join(2)
    assert isinstance(second.error, AbandonedError)
    assert until(lambda: process._pid not in workers(grammars), 1)
    assert not grammars.compile_queue.is_compiling(process)
    grammars.start(quick(), [1])


def test_an_abandoned_request_leaves_the_queue(grammars: Grammars) -> None:
    grammars.compile_queue.max_quick = 0
    waiting, next_one = Asking(grammars, quick(0)), Asking(grammars, quick(1))
    assert until(lambda: len(grammars.compile_queue._waiting) == 2, 10)
    assert ended([waiting]) == ["AbandonedError"]
    grammars.compile_queue.max_quick = 1
    next_one.join(10)
    assert next_one.state is not None
    assert len(workers(grammars)) == 2  # it, and one that was forked before it is needed


def test_waiting_requests_poll_slowly(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting requests do not wake each other."""
    looks, look = [0], grammars.compile_queue._update

    def counted() -> None:
        looks[0] += 1
        look()

    monkeypatch.setattr(grammars.compile_queue, "_update", counted)
    grammars.compile_queue.max_quick = 0
    waiting = [Asking(grammars, quick(i)) for i in range(4)]
    assert until(lambda: len(grammars.compile_queue._waiting) == 4, 10)
    looks[0] = 0
    time.sleep(1)
    assert 4 < looks[0] < 60  # ten each
    ended(waiting)


def test_a_failed_compilation_frees_its_turn(grammars: Grammars) -> None:
    for i in range(8):
        with pytest.raises(GrammarError):
            grammars.start(StructuredOutputs(regex=f"{i}("), [1])
        with pytest.raises(GrammarError, match="too deep or too large"):  # a crash
            grammars.start(StructuredOutputs(grammar=deep(i)), [1])
    grammars.start(quick(), [1])
    assert [
        *grammars.compile_queue._quick,
        *grammars.compile_queue._slow,
        *grammars.compile_queue._suspended,
    ] == []


def deep(i: int) -> str:
    return f'start: r0\n{chr(10).join(f"r{j}: r{j + 1}" for j in range(6000))}\nr6000: "{i}"'


def test_evicted_processes_restart_with_the_same_masks() -> None:
    """The least recently used processes end; their states restart in others, with the same masks."""
    tokenizer = Tokenizer.from_pretrained()
    few = Grammars(tokenizer, tokenizer.vocab_size, max_idle=1, max_processes=4)
    many = Grammars(tokenizer, tokenizer.vocab_size)
    pairs = [(few.start(quick(i), [1]), many.start(quick(i), [1])) for i in range(10)]
    assert until(lambda: len(workers(many)) == 10 + 1, 10)  # the one that is kept for the next request comes last
    chance = random.Random(0)
    for _ in range(6):
        chance.shuffle(pairs)
        for one, other in pairs:
            mask = one.masks()[0][0]
            assert np.array_equal(mask, other.masks()[0][0])
            token = int(chance.choice([t for t in allowed(mask) if t != tokenizer.eos_id]))
            one.accept(token)
            other.accept(token)
        assert until(lambda: len(workers(few)) <= 4 + 1, 2)
    used = [state for state, _ in pairs[:2]]
    for state in used:
        state.masks()
    few.start(quick(99), [1])
    assert all(not state._process.terminated for state in used)


def test_a_pending_state_survives_the_eviction_of_its_process(grammars: Grammars) -> None:
    state = grammars.start(quick(), [1])
    wanted = state.masks()[0][0]
    for _ in range(3):
        state._process.suspend()
        state.ask()
        state._process.kill(EngineError("to make room"))
        assert state.wait()
        assert state.answer is not None
        assert np.array_equal(state.answer.masks[0], wanted)


def test_a_batch_with_more_grammars_than_processes_is_served() -> None:
    tokenizer = Tokenizer.from_pretrained()
    args = tiny_args(vocab_size=tokenizer.vocab_size, sliding_window=64, max_seq_len=256)
    config = EngineConfig(max_sequences=2, max_batch_tokens=64, page_size=4)
    llm = LLM(tiny_model(args), config, tokenizer=tokenizer)
    llm.inputs.grammars._max_idle, llm.inputs.grammars._max_processes = 1, 3
    params = [SamplingParams(max_tokens=8, structured_outputs=quick(i)) for i in range(9)]
    outputs = llm.generate(["a"] * 9, params)
    assert [output.outputs[0].text.strip("a") for output in outputs] == [str(i) for i in range(9)]
    assert len(workers(llm.inputs.grammars)) <= 3 + 1
