"""The other side is an engine that runs B's files and gives logits only: transformers, llama.cpp.

B's files are compared with A as usual. Then the engine's logits are compared with those of the same files here:
what is between these is arithmetic, or a fault of the engine. The noise of its arithmetic is taken as that of
random errors in the weights, of the relative size `unit`. If the distance is more, settings that an engine may
have ignored are tried here: the one with which the logits agree is the cause.

R rows · T tokens · V vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from torch import Tensor

from ...checkpoint.names import expected
from ...errors import EvaluationError
from ...model import ModelArgs
from .result import FAULT, Cause, Result
from .sides import Side
from .streaming import Pair, Stream, run
from .tensors import Difference, noisy

UNITS = {"transformers": 2**-20, "llama.cpp": 2**-8}  # float32; activations rounded to bfloat16 or int8 blocks
Logits = Callable[[Tensor], Tensor]  # tokens (R, T) -> logits (R, T, V), each row from position 0


def judge(result: Result, a: Side, b: Side, rows: tuple[Tensor, Tensor], logits: Logits, unit: float, limit: float,
          tell: Callable[[str], None]) -> Result:  # fmt: skip
    """Return the result for the engine in place of B's files; `rows` are what A and B read."""
    tell("running the other engine")
    own, read = rows
    theirs = logits(read).float()
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
    progress: Callable[[int, int, str], None] = lambda done, total, name: tell(f"running B's files here: {name}")  # noqa: E731
    figures = run([*streams, Stream(b, read, theirs)], pairs, progress=progress).figures
    engine, noise = figures[1].kld, figures[2].kld
    result = dataclasses.replace(result, figures=figures[0].result())
    note = f"the engine's mean KLD from the same files here is {engine:.3g}; its arithmetic explains {noise:.3g}"
    if engine <= limit * noise:
        return dataclasses.replace(result, notes=(*result.notes, note))
    causes = []
    if tried:
        best = min(range(len(tried)), key=lambda n: figures[3 + n].kld)
        cause, text, _ = tried[best]
        after = figures[3 + best].kld
        if after < engine / 2:
            causes = [Cause(cause, "engine", text, ("engine",), engine, after, after <= limit * noise)]
    return dataclasses.replace(
        result, verdict=FAULT, causes=(*result.causes, *causes), notes=(*result.notes, note), expected_kld=noise
    )


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
