"""The loop that one can learn from gives what the engine gives."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import tiny_args, tiny_model, tokens_of

from mistral_7b.engine.llm import LLM
from mistral_7b.generate import generate
from mistral_7b.sampling.params import SamplingParams

FILE = Path(__file__).parent.parent / "examples" / "loop.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_loop", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WAYS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40),
    "seeded": SamplingParams(seed=3, max_tokens=40),
    "narrowed": SamplingParams(temperature=1.4, top_k=20, top_p=0.8, min_p=0.02, seed=4, max_tokens=40),
    "to the end of the context": SamplingParams(seed=5, max_tokens=None),
}


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("way", WAYS)
def test_the_loop_gives_the_engines_tokens(example: ModuleType, way: str, window: int | None) -> None:
    """Prompts shorter and longer than the window and a chunk of the loop, and texts that end by EOS."""
    model = tiny_model(tiny_args(sliding_window=window, max_seq_len=620), torch.float64)
    llm, lengths, ends = LLM(model), set(), set()
    for n in (1, 8, 30, 530):
        prompt = tokens_of((n,), seed=n).tolist()
        wanted = llm.generate(prompt, WAYS[way])[0].outputs[0]
        assert list(example.loop(model, prompt, WAYS[way])) == wanted.token_ids
        assert generate(model, prompt, WAYS[way])[0].outputs[0].token_ids == wanted.token_ids
        lengths.add(len(wanted.token_ids))
        ends.add(wanted.finish_reason)
    assert max(lengths) > 2 * 8
    assert way != "seeded" or window is None or ends == {"stop", "length"}


def test_the_example_runs() -> None:
    done = subprocess.run([sys.executable, str(FILE), "import os"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("import os")
    assert len(done.stdout) > len("import os\n") + 20
