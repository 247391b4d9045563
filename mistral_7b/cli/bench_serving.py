"""`mistral-7b bench --serving`: many requests at once, at one rate of arrivals after another."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shlex
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..engine.config import EngineConfig
from .inputs import UsageError

if TYPE_CHECKING:
    from ..benchmark.serving.run import ServingPlan
    from .bench import Bench


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """What is asked of the engine, and how often."""

    serving: bool = False
    """Measure many requests at once instead: throughput, and how long each takes. With the flags below and
    --shape, --layers, --scheme, --threads, --rounds, --json, --plot; for a peer --keep and --peer-python."""
    rate: tuple[float, ...] = (math.inf,)
    """Arrivals a second, at random and independent of each other; inf: all at once."""
    requests: tuple[int, ...] = (32,)
    """How many requests; with several numbers each rate is measured with each."""
    seconds: float | None = None
    """Let requests arrive for so long, however many that makes; those all at once are --requests still."""
    prompt_tokens: tuple[int, ...] = (128,)
    """Tokens of a prompt; two numbers: drawn between them."""
    output_tokens: tuple[int, ...] = (64,)
    """Tokens of a completion; two numbers: drawn between them."""
    shared: float = 0.0
    """The share of each prompt, 0 to 1, that is the same text for all."""
    seed: int = 0
    """Of all that is drawn."""
    max_sequences: int = EngineConfig.max_sequences
    """Completions that are computed together at most, by a peer too."""
    max_batch_tokens: int = EngineConfig.max_batch_tokens
    """Tokens of one step of the engine at most."""
    llama_server: str | None = None
    """llama.cpp's llama-server, to be measured under the same requests, on random weights of the same shape."""


ELSEWHERE = ("--what", "--context", "--prompt", "--peers", "--quick")


def check(args: Bench) -> None:
    """UsageError for flags that do not go together, and numbers that cannot be."""
    options, plain = args.traffic, type(args)()
    if not options.serving:
        if foreign := _changed(options, ServingOptions()):
            raise UsageError(f"{', '.join(foreign)}: only with --serving", field=foreign[0])
        return
    if foreign := [flag for flag in _changed(args, plain) if flag in ELSEWHERE]:
        raise UsageError(
            f"{', '.join(foreign)}: not with --serving, which has --prompt-tokens, --llama-server...",
            field=foreign[0],
        )
    for name in ("requests", "prompt_tokens", "output_tokens"):
        if not (values := getattr(options, name)) or min(values) < 1:
            raise UsageError(f"{_flag(name)} must be at least 1", field=_flag(name))
    for name in ("prompt_tokens", "output_tokens"):
        values = getattr(options, name)
        if len(values) > 2 or values[0] > values[-1]:
            raise UsageError(
                f"{_flag(name)} takes a number, or the least and the most, not {_words(values)}", field=_flag(name)
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
    """Measure it all and show it."""
    from .bench import show

    plan = plan_of(args, argv)
    from ..benchmark.serving import plot, report
    from ..benchmark.serving.run import run as measure_all

    show(args, partial(measure_all, plan), report, plot.draw)
    return 0


def plan_of(args: Bench, argv: Sequence[str]) -> ServingPlan:
    """The plan that the flags ask for. UsageError, naming the flag, for one that cannot be."""
    from ..benchmark.serving.run import ServingPlan
    from ..benchmark.serving.traffic import Traffic
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
        threads=args.threads, rounds=args.rounds, server=options.llama_server, peer_python=args.peer_python,
        files=args.keep, command=command(argv),
    )  # fmt: skip


def counts(rate: float, options: ServingOptions) -> tuple[int, ...]:
    """How many requests are sent at a rate, for each time that it is measured."""
    if options.seconds is None or math.isinf(rate):
        return tuple(dict.fromkeys(options.requests))
    return (max(1, round(rate * options.seconds)),)


def command(argv: Sequence[str]) -> str:
    """The command as it was given; of paths the last part, for the rest is nobody else's."""
    words = (pathlib.Path(word).name if pathlib.Path(word).is_absolute() else word for word in argv)
    return f"mistral-7b bench {shlex.join(words)}"


def _changed(args: object, plain: object) -> list[str]:
    names = [f.name for f in dataclasses.fields(args)]  # type: ignore[arg-type]
    return [_flag(name) for name in names if getattr(args, name) != getattr(plain, name)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _words(values: Sequence[float]) -> str:
    return " ".join(map(str, values))
