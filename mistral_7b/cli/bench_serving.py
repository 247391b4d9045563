"""`mistral-7b bench --serving`: concurrent requests over a sweep of arrival rates."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..engine.config import EngineConfig
from .flags import changed, flag_of
from .inputs import UsageError

if TYPE_CHECKING:
    from ..bench.serving.run import ServingPlan
    from .bench import Bench


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """Options of --serving."""

    serving: bool = False
    """Measure throughput and latency of concurrent requests.
    Uses the flags below and --shape, --layers, --scheme, --threads, --rounds, --json, --plot; for a peer --keep,
    --peer-python."""
    rate: tuple[float, ...] = (math.inf,)
    """Arrivals per second (Poisson); inf: all at once."""
    requests: tuple[int, ...] = (32,)
    """Number of requests; several numbers are measured at each rate."""
    seconds: float | None = None
    """Duration of arrivals, instead of --requests (which still applies to rate inf)."""
    prompt_tokens: tuple[int, ...] = (128,)
    """Prompt length in tokens; two numbers: a uniform range."""
    output_tokens: tuple[int, ...] = (64,)
    """Completion length in tokens; two numbers: a uniform range."""
    shared: float = 0.0
    """Fraction of each prompt, 0 to 1, that is a prefix common to all."""
    seed: int = 0
    """Seed of arrivals and prompts."""
    max_sequences: int = EngineConfig.max_sequences
    """Maximum number of concurrent sequences, also for a peer."""
    max_batch_tokens: int = EngineConfig.max_batch_tokens
    """Maximum number of tokens per engine step."""
    llama_server: str | None = None
    """Path of llama.cpp's llama-server, to measure with the same requests and random weights."""


ELSEWHERE = ("--adapter", "--what", "--context", "--prompt", "--peers", "--quick")


def check(args: Bench) -> None:
    """Raise UsageError for conflicting flags and invalid numbers."""
    options, plain = args.traffic, type(args)()
    if not options.serving:
        if foreign := changed(options, ServingOptions()):
            raise UsageError(f"{', '.join(foreign)}: only with --serving", field=foreign[0])
        return
    if foreign := [flag for flag in changed(args, plain) if flag in ELSEWHERE]:
        raise UsageError(
            f"{', '.join(foreign)}: not with --serving, which has --prompt-tokens, --llama-server...",
            field=foreign[0],
        )
    for name in ("requests", "prompt_tokens", "output_tokens"):
        if not (values := getattr(options, name)) or min(values) < 1:
            raise UsageError(f"{flag_of(name)} must be at least 1", field=flag_of(name))
    for name in ("prompt_tokens", "output_tokens"):
        values = getattr(options, name)
        if len(values) > 2 or values[0] > values[-1]:
            raise UsageError(
                f"{flag_of(name)} takes a number, or the least and the most, not {_words(values)}",
                field=flag_of(name),
            )
    if not options.rate or not min(options.rate) > 0:
        raise UsageError(
            f"--rate takes numbers above 0, or inf, not {_words(options.rate) or 'none'}", field="--rate"
        )
    if options.seconds is not None and not options.seconds > 0:
        raise UsageError(f"--seconds must be above 0, not {options.seconds}", field="--seconds")
    if not 0 <= options.shared <= 1:
        raise UsageError(f"--shared is a share from 0 to 1, not {options.shared}", field="--shared")


def run(args: Bench, argv: Sequence[str]) -> int:
    """Run all measurements and print the results."""
    from .bench import show

    plan = plan_of(args, argv)
    from ..bench.serving import plot, report
    from ..bench.serving.run import run as measure_all

    show(args, partial(measure_all, plan), report, plot.draw)
    return 0


def plan_of(args: Bench, argv: Sequence[str]) -> ServingPlan:
    """Return the plan of the flags. Raises UsageError, naming the flag, if it is invalid."""
    from ..bench.serving.run import ServingPlan
    from ..bench.serving.traffic import Traffic
    from .bench import check, schemes, subject

    check(args)
    options = args.traffic
    EngineConfig(max_sequences=options.max_sequences, max_batch_tokens=options.max_batch_tokens)
    prompt, output = ((t[0], t[-1]) for t in (options.prompt_tokens, options.output_tokens))
    name, source, model_args = subject(args, prompt[1] + output[1], "--prompt-tokens and --output-tokens")
    points = tuple(
        Traffic(n, None if math.isinf(rate) else rate, prompt, output, options.shared, options.seed)
        for rate in dict.fromkeys(options.rate)
        for n in counts(rate, options)
    )
    return ServingPlan(
        name, model_args, source, schemes(args, source), points, options.max_sequences, options.max_batch_tokens,
        threads=args.threads, rounds=args.rounds, server=options.llama_server,
        peer_python=args.peer_python or sys.executable, files=args.keep, command=command(argv),
    )  # fmt: skip


def counts(rate: float, options: ServingOptions) -> tuple[int, ...]:
    """Return the numbers of requests to measure at a rate."""
    if options.seconds is None or math.isinf(rate):
        return tuple(dict.fromkeys(options.requests))
    return (max(1, round(rate * options.seconds)),)


def command(argv: Sequence[str]) -> str:
    """Return the command line, with absolute paths reduced to their last part for privacy."""
    words = (pathlib.Path(word).name if pathlib.Path(word).is_absolute() else word for word in argv)
    return f"mistral-7b bench {shlex.join(words)}"


def _words(values: Sequence[float]) -> str:
    return " ".join(map(str, values))
