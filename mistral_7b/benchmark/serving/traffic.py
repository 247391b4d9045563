"""Requests and the moments at which they arrive, drawn before anything runs."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

BOS, CONTROLS = 1, 3  # <unk>, <s>, </s>: nothing is drawn below
Span = tuple[int, int]  # the least and the most, both included


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request: it comes `at` seconds after the first, and wants so many tokens, whatever they are."""

    at: float
    prompt: list[int]
    output: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """`requests` that arrive independently of each other (Poisson), `rate` of them a second; None: all at once.

    prompt, output  tokens, drawn evenly between two numbers
    shared          the share of each prompt that is the beginning of one text common to all
    seed            of everything that is drawn; rates of one seed ask the same questions
    """

    requests: int
    rate: float | None = None
    prompt: Span = (128, 128)
    output: Span = (64, 64)
    shared: float = 0.0
    seed: int = 0

    def draw(self, vocabulary: int) -> list[Arrival]:
        """The requests in their order, of tokens below `vocabulary`."""
        asked, clock = random.Random(self.seed), random.Random(f"{self.seed} arrivals")

        def tokens(n: int) -> list[int]:
            return asked.choices(range(min(CONTROLS, vocabulary - 1), vocabulary), k=n)

        common, at, arrivals = [BOS, *tokens(self.prompt[1] - 1)], 0.0, []
        for _ in range(self.requests):
            length, output = asked.randint(*self.prompt), asked.randint(*self.output)
            prompt = common[: max(1, round(self.shared * length))]
            arrivals.append(Arrival(at, prompt + tokens(length - len(prompt)), output))
            at += clock.expovariate(self.rate) if self.rate is not None else 0.0
        return arrivals

    @property
    def name(self) -> str:
        """How many and how often, for people."""
        return f"{self.requests} at once" if self.rate is None else f"{self.requests} at {self.rate:g}/s"


@dataclasses.dataclass(frozen=True)
class ServingJob:
    """One engine under one kind of traffic. `args` are the fields of ModelArgs; `source` is a file or folder.

    `max_sequences` and `max_batch_tokens` are those of EngineConfig. The peer computes as many sequences together,
    in batches as large as it likes.
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
