"""One measurement, as plain data that goes from the command to a process of its own, and what comes back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

What = Literal["decode", "prefill", "batch16", "load"]
Scheme = Literal["int4", "int8", "bf16", "none"]

OURS, LLAMA, TRANSFORMERS = "mistral_7b", "llama.cpp", "transformers"
BATCH, BATCH_PROMPT = 16, 32  # rows that decode together, and the prompt of each


@dataclasses.dataclass(frozen=True)
class Job:
    """Work for one engine. `args` are the fields of ModelArgs; `source` is a file or folder to open."""

    engine: str
    scheme: str
    what: str
    args: dict[str, Any]
    source: str | None = None  # none: random weights of this shape
    rows: int = 1
    prompt: int = 512  # tokens each row holds before anything is decoded
    threads: int | None = None  # none: as many as PyTorch takes by itself
    quick: bool = False
    started: float | None = None  # load: when the process was started (seconds since 1970)

    @property
    def room(self) -> int:
        """Tokens a row may decode, warming up included."""
        return WARM_UP + STEPS[self.quick].most

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a process found: `seconds` of every repetition, each of which made or read `tokens`."""

    seconds: list[float]
    tokens: int
    weight_bytes: int  # that one pass through the model reads
    kv_token_bytes: int  # keys and values of one token, all layers
    peak_rss_bytes: int
    threads: int
    path: str  # the code that ran: instruction sets, kernels
    versions: dict[str, str]
    generate_tokens_per_s: float | None = None  # decoding through `generate`, sampling and text included


@dataclasses.dataclass(frozen=True)
class Repetitions:
    """At least `least`, then until `most` of them or `seconds` have passed."""

    least: int
    most: int
    seconds: float


WARM_UP = 3  # steps; a prompt is read once
STEPS = {False: Repetitions(8, 64, 15.0), True: Repetitions(3, 8, 2.0)}  # by Job.quick
PROMPTS = {False: Repetitions(3, 9, 10.0), True: Repetitions(2, 3, 2.0)}
LOADS = {False: 3, True: 1}  # processes, after one that warms the page cache
