"""Requests and their arrival times, drawn before a measurement starts."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

BOS, CONTROLS = 1, 3  # tokens below CONTROLS (<unk>, <s>, </s>) are never drawn
Span = tuple[int, int]  # minimum and maximum, inclusive


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request: arrives `at` seconds after the first, for exactly `output` tokens."""

    at: float
    prompt: list[int]
    output: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Poisson arrivals of `requests` requests, `rate` per second; None: all at once.

    prompt, output  numbers of tokens, uniform between two bounds
    shared          fraction of each prompt that is a prefix common to all
    seed            of all random draws; rates with one seed use the same requests
    """

    requests: int
    rate: float | None = None
    prompt: Span = (128, 128)
    output: Span = (64, 64)
    shared: float = 0.0
    seed: int = 0

    def draw(self, vocabulary: int) -> list[Arrival]:
        """Return the requests in order of arrival, with tokens below `vocabulary`."""
        request_rng, arrival_rng = random.Random(self.seed), random.Random(f"{self.seed} arrivals")

        def tokens(n: int) -> list[int]:
            return request_rng.choices(range(min(CONTROLS, vocabulary - 1), vocabulary), k=n)

        common, at, arrivals = [BOS, *tokens(self.prompt[1] - 1)], 0.0, []
        for _ in range(self.requests):
            length, output = request_rng.randint(*self.prompt), request_rng.randint(*self.output)
            prompt = common[: max(1, round(self.shared * length))]
            arrivals.append(Arrival(at, prompt + tokens(length - len(prompt)), output))
            at += arrival_rng.expovariate(self.rate) if self.rate is not None else 0.0
        return arrivals

    @property
    def name(self) -> str:
        """Number and rate of requests, for display."""
        return f"{self.requests} at once" if self.rate is None else f"{self.requests} at {self.rate:g}/s"


@dataclasses.dataclass(frozen=True)
class ServingJob:
    """One engine under one traffic. `args` are fields of ModelArgs; `source` is a path.

    `max_sequences` and `max_batch_tokens` are those of EngineConfig. The peer runs as many sequences concurrently,
    with its own batch size.
    """

    engine: str
    scheme: str
    args: dict[str, Any]
    source: str | None
    traffic: Traffic
    max_sequences: int
    max_batch_tokens: int
    threads: int | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServingJob:
        fields = json.loads(text)
        traffic = fields["traffic"]
        for name in ("prompt", "output"):
            traffic[name] = tuple(traffic[name])
        return cls(**{**fields, "traffic": Traffic(**traffic)})
