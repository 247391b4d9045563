"""Failures of the system for grammar processes: no file descriptors left, or a killed engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_compile_queue import until

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/engine")))}

FILES = """
import json, os, resource, signal, sys
from test_compile_queue import *
from mistral_7b.engine.inputs import RequestOptions
tokenizer = Tokenizer.from_pretrained()
args = tiny_args(vocab_size=tokenizer.vocab_size, sliding_window=64, max_seq_len=256)
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)

def leave(files):
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for fd in taken[len(taken) - files:]:
        os.close(fd)

def run_out(left, killed):
    config = EngineConfig(max_sequences=4, max_batch_tokens=64, page_size=4)
    llm = LLM(tiny_model(args), config, tokenizer=tokenizer)
    params = [SamplingParams(max_tokens=20, ignore_eos=True, structured_outputs=spec)
              for spec in (None, StructuredOutputs(regex="[a-z ]{60}"))]
    free, bad = (llm.inputs.text("a", p, RequestOptions()) for p in params)
    for request in (free, bad):
        llm.engine.add(request)
    for _ in range(3):
        llm.engine.step()
    process = bad.sequences[0].grammar._process
    os.kill(process._pid, signal.SIGKILL)
    process.exit_signal()
    if killed == "server":
        llm.inputs.grammars._server._process.kill()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, most))
    leave(left)
    while not llm.engine.idle:
        llm.engine.step()
    print(type(bad.error).__name__, bad.error)
    print(free.error, len(free.completions[0].token_ids))
    leave(left)
    try:
        llm.inputs.text("a", SamplingParams(structured_outputs=StructuredOutputs(regex="b")), RequestOptions())
    except Exception as e:
        print(type(e).__name__, e)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))
    print(llm.generate("a", SamplingParams(structured_outputs=StructuredOutputs(regex="bc")))[0].outputs[0].text)

for left, killed in json.loads(sys.argv[1]):
    run_out(left, killed)
"""


def test_running_out_of_files_ends_only_its_request() -> None:
    """A process ends during a step, and no other can be started: with or without a file left, of either kind."""
    cases = [(0, "worker"), (1, "worker"), (0, "server"), (1, "server")]
    done = subprocess.run(
        [sys.executable, "-c", FILES, json.dumps(cases)], capture_output=True, text=True, timeout=120, env=ENV
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 4 * len(cases)
    for i, case in enumerate(cases):
        bad, free, asked, again = said[4 * i : 4 * i + 4]
        for error in (bad, asked):
            assert error.startswith("ProcessError no process could be started"), case
            assert "Too many open files" in error, case
        assert free == "None 20", case
        assert again == "bc", case


KILLED = """
import time
from test_compile_queue import *
tokenizer = Tokenizer.from_pretrained()
grammars = Grammars(tokenizer, tokenizer.vocab_size, LONG)
asking = [Asking(grammars, slow(i)) for i in range(6)]
assert until(lambda: "T" in workers(grammars).values(), 20)
print(grammars._server._process.pid, *workers(grammars), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("first", ["engine", "fork server"])
def test_workers_end_within_a_second_of_a_kill(first: str) -> None:
    """Both compiling and suspended workers."""
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=ENV) as engine:
        assert engine.stdout is not None
        server, *pids = map(int, engine.stdout.readline().split())
        assert len(pids) > 2
        assert all(alive(pid) for pid in (server, *pids))
        if first == "fork server":
            os.kill(server, signal.SIGKILL)
        engine.kill()
        assert until(lambda: not any(alive(pid) for pid in (server, *pids)), 1.0)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
