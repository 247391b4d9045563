"""Suspected causes of a fault: from the tensors, the adapter, the settings and the tokens, each with its undoing.

Nothing here is a verdict. A suspect is proved by run.py: the comparison is repeated with B as it would be without
the mistake, and the distance must fall to that of rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ...checkpoint.names import EMBEDDING, OUTPUT, half_split, interleaved, rotated_heads
from ...model import ModelArgs
from .hypotheses import hypotheses
from .sides import Side, Weights
from .streaming import Place
from .tensors import Difference, difference, shared
from .texts import Tokens

EFFECT = 1e-5  # relative: the tolerance of float32 in this package's tests, and a hundred of its rounding errors
PADDING = 1e-4  # mean probability on tokens that only B has, from which they are a fault
WQ = "attention.wq.weight"
SETTINGS = ("rope_theta", "rope_scaling", "sliding_window", "norm_eps")


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A mistake by name, the first module that it is in, in words, and B without it.

    modules   the names of all tensors or settings it is in
    tokens    what it is in: "text" or "chat" for the tokens of one of these; None for weights and settings
    """

    cause: str
    module: str
    text: str
    modules: tuple[str, ...]
    undo: Callable[[Side], Side] = lambda side: side
    tokens: str | None = None


def of_heads(a: Side, b: Side) -> Suspect | None:
    """Other heads of the same total width: B's files are read again with A's.

    A converter that had the wrong number may also have permuted the rows of q and k by it.
    """
    if (a.args.n_heads, a.args.head_dim) == (b.args.n_heads, b.args.head_dim) or b.reread is None:
        return None
    heads = {name: getattr(a.args, name) for name in ("n_heads", "head_dim", "n_kv_heads")}
    reread, wrong = b.reread, b.args

    def permuted_again(name: str, inner: Weights) -> Tensor:
        own, other = rotated_heads(name, a.args), rotated_heads(name, wrong)
        weight = inner(name)
        return weight if own is None or other is None else interleaved(half_split(weight, other), own)

    def configured(side: Side) -> Side:
        return reread(dataclasses.replace(side.args, **heads))

    def permuted(side: Side) -> Side:
        return configured(side).changed(permuted_again)

    probe = f"layers.0.{WQ}"
    ways = [(difference(a, way(b), probe, way(b).weight(probe)).error, way) for way in (configured, permuted)]
    return Suspect(
        "head_shape",
        "layers.0.attention",
        f"{wrong.n_heads} heads of {wrong.head_dim} in B, and {a.args.n_heads} of {a.args.head_dim} in A",
        ("n_heads", "head_dim"),
        min(ways, key=lambda way: way[0])[1],
    )


def of_tensors(a: Side, b: Side, found: Iterable[Difference]) -> tuple[list[Suspect], list[Difference]]:
    """Explain the tensors beyond their bounds; returns suspects, and the tensors that none explains."""
    fixes: dict[str, dict[str, Callable[[Weights], Tensor]]] = {}
    texts: dict[str, str] = {}
    rest = []
    for d in found:
        if not d.beyond:
            continue
        best: tuple[float, Any] = (math.inf, None)
        for hypothesis in hypotheses(d.name, a, b):
            undone = shared(b, d.name, hypothesis.undo(b.weight), a)
            after = difference(a, b, d.name, undone)
            if not after.beyond and after.error < best[0]:
                best = (after.error, hypothesis)
        if best[1] is None:
            rest.append(d)
        else:
            fixes.setdefault(best[1].cause, {})[d.name] = best[1].undo
            texts.setdefault(best[1].cause, best[1].text)
    suspects = [
        Suspect(cause, next(iter(undo)).removesuffix(".weight"), texts[cause], tuple(undo), _with(undo))
        for cause, undo in fixes.items()
    ]
    return suspects, rest


def _with(fixes: Mapping[str, Callable[[Weights], Tensor]]) -> Callable[[Side], Side]:
    """Undo a mistake in these tensors."""

    def weights(name: str, inner: Weights) -> Tensor:
        return fixes[name](inner) if name in fixes else inner(name)

    return lambda side: side.changed(weights)


def of_adapter(a: Side, b: Side, found: list[Difference]) -> Suspect | None:
    """The adapter's update U, if it is in one model and not, or not once, in the other.

    c = <W_B - W_A, U> / <U, U> over all adapted tensors: 0 if both have it, -1 if B lacks it, 1 if A does. The
    rounding errors of any format are independent of U, so that they hide it in no format.
    """
    adapted = a if a.adapter is not None else b
    c, spread = _coefficient(found)
    if adapted.adapter is None or abs(c) < max(0.1, 5 * spread):
        return None
    touched = [d for d in found if d.update[1]]
    if abs(c + 1) < 0.25 and adapted is a:
        cause, text = "adapter_not_applied", "B is the base without the adapter"
    elif abs(c - 1) < 0.25 and adapted is b:
        cause, text = "adapter_not_applied", "A is the base without the adapter that B has"
    else:
        cause, text = "adapter_scale", f"the adapter is in B {1 + c if adapted is a else 1 / (1 - c):.2f} times"
    update = adapted.update

    def weights(name: str, inner: Weights) -> Tensor:
        part = update(name)
        return inner(name) if part is None else inner(name) - c * part

    modules = tuple(d.name for d in touched)
    return Suspect(cause, touched[0].module, text, modules, lambda side: side.changed(weights))


def of_base(a: Side, b: Side, found: list[Difference], rest: list[Difference]) -> Suspect | None:
    """Another base: most matrices are of another model, yet the adapter's update is in them.

    Undoing it leaves A's base with the update as it was measured in B.
    """
    adapted = a if a.adapter is not None else b
    c, spread = _coefficient(found)
    matrices = [d for d in found if not d.name.endswith("norm.weight")]
    unexplained = [d for d in matrices if d in rest]
    if adapted.adapter is None or 2 * len(unexplained) < len(matrices) or abs(c) > 0.25 or spread > 0.25:
        return None
    update = adapted.update

    def weights(name: str, inner: Weights) -> Tensor:
        part = update(name)
        return a.weight(name) if part is None else a.weight(name) + c * part

    return Suspect(
        "wrong_base",
        unexplained[0].module,
        f"the adapter is merged into another base: its update is there ({1 + c:.2f} times), other weights differ",
        tuple(d.name for d in rest),
        lambda side: side.changed(weights, args=dataclasses.replace(side.args, vocab_size=a.args.vocab_size)),
    )


def _coefficient(found: list[Difference]) -> tuple[float, float]:
    """The part of the update in B - A, and its standard deviation if B - A were independent of it."""
    products, squares = (math.fsum(d.update[i] for d in found) for i in (0, 1))
    if not squares:
        return 0.0, math.inf
    spread = math.sqrt(math.fsum(d.update[1] * d.update[2] / d.elements for d in found if d.update[1]))
    return products / squares, spread / squares


def differing_settings(a: ModelArgs, b: ModelArgs) -> dict[str, ModelArgs]:
    """For each setting in which the models differ, A's ModelArgs with B's value."""
    fields = [name for name in SETTINGS if getattr(a, name) != getattr(b, name)]
    return {name: dataclasses.replace(a, **{name: getattr(b, name)}) for name in fields}


def of_settings(a: ModelArgs, b: ModelArgs, effects: Mapping[str, Place]) -> tuple[list[Suspect], list[str]]:
    """Return suspects for settings that change the attention of A, and notes on those that do not."""
    suspects, notes = [], []
    for field, place in effects.items():
        own, other = getattr(a, field), getattr(b, field)
        if place.error <= EFFECT:
            notes.append(
                f"{field} is {own} in A and {other} in B, without effect on these tokens"
                + ("; use longer rows (--row)" if field == "sliding_window" else "")
            )
            continue
        cause, text = field, f"{field} is {other} in B and {own} in A"
        if field == "sliding_window":
            if other is None:
                cause, text = "window_ignored", f"B has no sliding window, and A one of {own}"
            elif own is not None and abs(other - own) == 1:
                cause, text = "window_off_by_one", f"the sliding window is {other} in B and {own} in A"
        module = "layers.0.attention_norm" if field == "norm_eps" else "layers.0.attention"
        undo = _with_setting(field, own)
        suspects.append(Suspect(cause, module, text, (field,), undo))
    return suspects, notes


def _with_setting(field: str, value: object) -> Callable[[Side], Side]:
    return lambda side: side.changed(args=dataclasses.replace(side.args, **{field: value}))  # type: ignore[arg-type]


def of_padding(a: Side, b: Side, extra: float) -> Suspect | None:
    """Rows of the vocabulary that only B has, if they take part of the probability."""
    rows = a.args.vocab_size
    if b.args.vocab_size == rows or extra <= PADDING:
        return None

    def weights(name: str, inner: Weights) -> Tensor:
        return inner(name)[:rows] if name in (EMBEDDING, OUTPUT) else inner(name)

    return Suspect(
        "padding_rows",
        "output",
        f"{b.args.vocab_size - rows} rows of padding in B take {extra:.2%} of the probability",
        ("output",),
        lambda side: side.changed(weights, args=dataclasses.replace(side.args, vocab_size=rows)),
    )


def of_tokens(a: Tokens, b: Tokens) -> list[Suspect]:
    """Suspects for other beginnings of texts, and for another chat template."""
    out = []
    ahead = b.rows.shape[1] - a.rows.shape[1]
    starts = [
        t.rows[0, : max(0, t.rows.shape[1] - min(a.rows.shape[1], b.rows.shape[1])) or 1].tolist() for t in (a, b)
    ]
    if ahead or starts[0] != starts[1]:
        cause = {-1: "bos_missing", 1: "bos_doubled"}.get(ahead, "bos")
        out.append(Suspect(cause, "tokenizer", _BOS[cause], ("text",), tokens="text"))
    if a.chat is None or b.chat is None or a.chat.tolist() == b.chat.tolist():
        return out
    own, other = a.chat[0].tolist(), b.chat[0].tolist()
    if other == [a.bos, *own]:
        cause = "bos_doubled"
    elif [a.bos, *other] == own:
        cause = "bos_missing"
    else:
        at = next(
            (i for i, (x, y) in enumerate(zip(own, other, strict=False)) if x != y), min(len(own), len(other))
        )
        text = (
            f"the chat templates are different: a conversation's tokens part at {at} ({len(own)} and {len(other)})"
        )
        return [*out, Suspect("chat_template", "chat template", text, ("chat",), tokens="chat")]
    if cause not in [suspect.cause for suspect in out]:
        out.append(Suspect(cause, "chat template", f"{_BOS[cause]} (in chats)", ("chat",), tokens="chat"))
    return out


_BOS = {
    "bos_missing": "B begins without the BOS of A",
    "bos_doubled": "B begins with one more BOS than A",
    "bos": "B begins with another token than A",
}
