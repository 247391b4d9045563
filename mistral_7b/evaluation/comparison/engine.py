"""The other side is an engine that runs B's files: transformers, llama.cpp (which gives logits only).

B's files are compared with A as usual. Then the engine's logits are compared with those of the same files here:
what is between these is arithmetic, or a fault of the engine. The noise of its arithmetic is taken as that of
random errors in the weights, of the relative size `unit`. If the distance is more, settings that an engine may
have ignored are tried here: the one with which the logits agree is the cause.

Hidden states decide more: each module is computed here in float64 on the engine's own input (modules.py), and one
that is off by more than EFFECT is a fault, however small its effect on the logits. It also says where they part.

R rows · T tokens · V vocabulary · D width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ...checkpoint.names import expected
from ...errors import EvaluationError
from ...model import ModelArgs
from .causes import EFFECT
from .modules import module_errors
from .result import FAULT, Cause, Result
from .sides import Side
from .streaming import Pair, Stream, run
from .tensors import Difference, noisy

UNITS = {"transformers": 2**-20, "llama.cpp": 2**-8}  # float32; activations rounded to bfloat16 or int8 blocks


class Ran(NamedTuple):
    """An engine's logits (R, T, V) and hidden states (R, T, D), float32, which may be none.

    states    after the embedding, the attention of layer 0, its feed-forward, the attention of layer 1..., each
              with the residual
    """

    logits: Tensor
    states: Sequence[Tensor] = ()


Engine = Callable[[Tensor], Ran]  # of tokens (R, T), each row from position 0


def judge(result: Result, a: Side, b: Side, rows: tuple[Tensor, Tensor], engine: Engine, unit: float, limit: float,
          tell: Callable[[str], None]) -> Result:  # fmt: skip
    """Return the result for the engine in place of B's files; `rows` are what A and B read."""
    tell("running the other engine")
    own, read = rows
    logits, states = engine(read)
    theirs = logits.float()
    if theirs.shape[:2] != read.shape or theirs.shape[2] < b.args.vocab_size:
        raise EvaluationError(
            f"the engine's logits have the shape {tuple(theirs.shape)} for tokens {tuple(read.shape)} of a "
            f"vocabulary of {b.args.vocab_size}",
            field="logits",
        )
    sizes = [Difference(name, unit, unit, unit) for name, _ in expected(b.args)]
    tried = list(_ignored(b.args))
    models = [a, b, noisy(b, sizes), *(b.changed(args=args) for _, _, args in tried)]
    streams = [Stream(model, read if n else own) for n, model in enumerate(models)]
    last = len(streams)
    pairs = [Pair(0, last), Pair(1, last), Pair(1, 2), *(Pair(n, last) for n in range(3, last))]
    label = "running B's files here"
    trace = run(
        [*streams, Stream(b, read, theirs, states)], pairs, progress=lambda n, of, name: tell(f"{label}: {name}")
    )
    figures, noise = trace.figures, trace.figures[2].kld
    distance = figures[1].kld
    notes = [
        f"the engine's mean KLD from the same files here is {distance:.3g}; its arithmetic explains {noise:.3g}"
    ]
    where, worst = "engine", None
    if states:
        off = list(module_errors(b, read, states, lambda n, of, name: tell(f"the engine's modules: {name}")))
        worst = max(off, key=lambda place: place.error)
        where = next((place.module for place in off if place.error > EFFECT), where)
        notes.append(
            f"on its own input each module of the engine is off by at most {worst.error:.2g} from float64 "
            f"({worst.module}); rounding in float32 by {EFFECT:g}"
        )
        result = dataclasses.replace(result, growth=tuple(trace.growth[0]))
    result = dataclasses.replace(result, figures=figures[0].result(), notes=(*result.notes, *notes))
    if distance <= limit * noise and where == "engine":
        return result
    causes = []
    if tried:
        best = min(range(len(tried)), key=lambda n: figures[3 + n].kld)
        cause, text, _ = tried[best]
        after = figures[3 + best].kld
        if after < distance / 2:
            causes = [Cause(cause, where, text, (where,), distance, after, after <= limit * noise)]
    if not causes:
        what = "the engine computes this module in another way" if states else "the engine computes in another way"
        causes = [Cause("engine", where, what, (where,), distance, distance, False)]
    return dataclasses.replace(result, verdict=FAULT, causes=(*result.causes, *causes), expected_kld=noise)


def _ignored(args: ModelArgs) -> Iterator[tuple[str, str, ModelArgs]]:
    """Settings that an engine may have in place of the files': name, in words, and all ModelArgs."""

    def other(**values: object) -> ModelArgs:
        return dataclasses.replace(args, **values)  # type: ignore[arg-type]

    window = args.sliding_window
    if window is not None:
        yield "window_ignored", f"the engine ignores the sliding window of {window}", other(sliding_window=None)
        for near in (window - 1, window + 1):
            if near > 0:
                text = f"the engine's sliding window is {near}, the files' {window}"
                yield "window_off_by_one", text, other(sliding_window=near)
    if args.rope_scaling is not None:
        yield "rope_scaling", "the engine ignores the scaled rotary embedding", other(rope_scaling=None)
    for theta in {1e4, 1e6} - {args.rope_theta}:
        yield (
            "rope_theta",
            f"the engine's theta is {theta:g}, the files' {args.rope_theta:g}",
            other(rope_theta=theta),
        )
    for eps in {1e-5, 1e-6} - {args.norm_eps}:
        yield "norm_eps", f"the engine's epsilon is {eps:g}, the files' {args.norm_eps:g}", other(norm_eps=eps)
