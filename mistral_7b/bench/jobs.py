"""A job (one measurement) and its result, as plain data exchanged with a worker process."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

What = Literal["decode", "prefill", "batch16", "load"]

OURS, LLAMA, TRANSFORMERS = "mistral_7b", "llama.cpp", "transformers"
BATCH, BATCH_PROMPT = 16, 32  # rows of a batch, and tokens in the prompt of each


@dataclasses.dataclass(frozen=True)
class Job:
    """A workload for one engine. `args` are fields of ModelArgs; `source` is a file or folder."""

    engine: str
    scheme: str
    what: str
    args: dict[str, Any]
    source: str | None = None  # None: random weights of this shape
    rows: int = 1
    prompt: int = 512  # prompt tokens of each row
    threads: int | None = None  # None: PyTorch's default
    quick: bool = False
    started: float | None = None  # load: start time of the process (Unix time)
    adapter: str | None = None  # a LoRA adapter of every row, a file or folder

    @property
    def room(self) -> int:
        """Number of tokens a row may decode, including warmup."""
        return WARM_UP + STEPS[self.quick].most

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of a process: `seconds` of every repetition, each of `tokens` tokens."""

    seconds: list[float]
    tokens: int
    weight_bytes: int  # read by one forward pass
    kv_token_bytes: int  # keys and values of one token in all layers
    peak_rss_bytes: int
    threads: int
    path: str  # instruction sets and kernels that ran
    versions: dict[str, str]
    generate_tokens_per_s: float | None = None  # decoding with `generate`, including sampling and text


@dataclasses.dataclass(frozen=True)
class Repetitions:
    """At least `least` repetitions, then until `most` repetitions or `seconds` are reached."""

    least: int
    most: int
    seconds: float


WARM_UP = 3  # warmup steps; prefill warms up with one prompt
STEPS = {False: Repetitions(8, 64, 15.0), True: Repetitions(3, 8, 2.0)}  # by Job.quick
PROMPTS = {False: Repetitions(3, 9, 10.0), True: Repetitions(2, 3, 2.0)}
LOADS = {False: 3, True: 1}  # number of processes, after one that warms the page cache
