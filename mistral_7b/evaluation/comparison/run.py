"""Compare two models: their distance, whether rounding explains it, and if not, what does.

The verdict. Both models run in float32 with the same code on the same text, so arithmetic has no part in their
distance, and models of equal weights have a distance of 0. What is left are weights, settings and tokens:

    noise   every tensor differs by no more than the rounding of its stored types (tensors.py), no setting has an
            effect (causes.py), and the mean KLD is at most RATIO times that of A from itself with random errors of
            the same sizes
    fault   anything else

The third condition is a ratio of two measured distances, so it holds for one bit and for sixteen. It finds what
hides within the errors of a coarse format: errors that depend on each other, such as another fine-tune of the same
base, have more effect than random ones of their size.

The causes. Suspects are undone in B one after another, and all these models run together beside A. A cause is
proved if undoing it lowers the distance, and what remains at the end is noise by the conditions above.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ...errors import EvaluationError
from ...text.default_text import default_text
from . import causes, engine
from .causes import Suspect
from .engine import Engine
from .result import FAULT, NOISE, Cause, Result
from .sides import Side, check_same_shape, open_side
from .streaming import Pair, Stream, Trace, run
from .tensors import Difference, differences, noisy
from .texts import Tokens, check_ids, tokens_of

RATIO = 3.0  # of the mean KLD to that of random errors of the same sizes: sound pairs have 0.3 to 1.5
FLOOR = 1e-9  # mean KLD of float32's own rounding errors
TOKENS, ROW = 2048, 512

Tell = Callable[[str], None]


class Pairing(NamedTuple):
    """Two models and what each reads."""

    a: Side
    b: Side
    tokens: tuple[Tokens, Tokens]
    tell: Tell


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    text: str | Tensor | None = None,
    *,
    text_name: str = "",
    tokens: int = TOKENS,
    row: int = ROW,
    run_b: Engine | None = None,
    unit: float = 2**-20,
    tell: Tell = lambda text: None,
) -> Result:
    """Measure the distance of B from A on a text, decide whether it is noise, and find the cause if not.

    a, b     MODEL or MODEL+ADAPTER: folders of Hugging Face and Mistral, quantized folders, GGUF files, hub ids
    text     a text, which both sides encode; or token ids (R, T); None: the default text
    tokens   how many of the text's tokens at most, in rows of `row` tokens, which are independent
    run_b    an engine that runs B's files: tokens (R, T) to engine.Ran; its arithmetic has errors of the relative
             size `unit` (engine.py)
    tell     called with the name of each step

    Raises EvaluationError for models of different shapes, vocabularies or tokenizers, and for a text without
    anything to predict; CheckpointError, HubError and AdapterError for what cannot be opened.
    """
    left, right = open_side(a), open_side(b)
    check_same_shape(left, right)
    if text is None:
        text_name, text = default_text()
    if isinstance(text, str):
        if tokens < 2 or row < 2:
            raise EvaluationError("at least two tokens are compared", field="tokens" if tokens < 2 else "row")
        read = tokens_of(left, right, text, tokens, row)
    else:
        if text.dim() != 2 or text.shape[1] < 2 or not len(text):
            raise EvaluationError("token ids are rows (R, T) of at least two", field="text")
        for side in (left, right):
            check_ids(side, text)
        read = (Tokens(text), Tokens(text))
    result = _judged(Pairing(left, right, read, tell), text_name)
    if run_b is not None:
        result = engine.judge(result, left, right, (read[0].rows, read[1].rows), run_b, unit, RATIO, tell)
    tell("")
    return result


def _judged(pairing: Pairing, text_name: str) -> Result:
    a, b = pairing.a, pairing.b
    suspects, rest, found, fixed = _examined(pairing)
    probes = causes.differing_settings(a.args, fixed.args)
    first = _first_run(pairing, noisy(a, found), probes)
    text, noise = first.figures[:2]
    more, notes = causes.of_settings(a.args, fixed.args, first.effects)
    if padding := causes.of_padding(a, b, text.extra):
        more.append(padding)
    elif b.args.vocab_size > a.args.vocab_size:
        notes.append(f"B has {b.args.vocab_size - a.args.vocab_size} tokens more, of probability {text.extra:.1g}")
    for own, other, tokens in (("A", "B", pairing.tokens[0]), ("B", "A", pairing.tokens[1])):
        if tokens.borrowed:
            notes.append(f"{own} has no tokenizer: its tokens are those of {other}'s")
    suspects = [*causes.of_tokens(*pairing.tokens), *suspects, *more]
    chat = first.figures[2].kld if len(first.figures) > 2 else 0.0
    expected = noise.kld
    proved: list[Cause] = []
    if suspects or rest:
        proved, expected, found = _undone(pairing, suspects, rest, text.kld, chat)
        sound = False
    else:
        sound = _is_noise(text.kld, noise.kld)
    worst = max(found, key=lambda d: d.error / d.bound)
    return Result(
        a.name, b.name, (a.format, b.format), text_name, text.result(), NOISE if sound else FAULT, expected, worst,
        tuple(proved), tuple(rest), tuple(first.growth[0]), tuple(notes),
    )  # fmt: skip


def _is_noise(kld: float, expected: float) -> bool:
    return kld <= max(FLOOR, RATIO * expected)


def _examined(pairing: Pairing) -> tuple[list[Suspect], list[Difference], list[Difference], Side]:
    """Suspects in heads, adapter and tensors; what they leave unexplained; all differences; B without them."""
    a, fixed = pairing.a, pairing.b
    pairing.tell("comparing the weights")
    suspects = []
    if heads := causes.of_heads(a, fixed):
        suspects.append(heads)
        fixed = heads.undo(fixed)
    found = list(differences(a, fixed))
    if adapter := causes.of_adapter(a, fixed, found):
        suspects.append(adapter)
        fixed = adapter.undo(fixed)
        found = list(differences(a, fixed))
    more, rest = causes.of_tensors(a, fixed, found)
    if base := causes.of_base(a, fixed, found, rest):
        more, rest = [base], []
    for suspect in more:
        fixed = suspect.undo(fixed)
    return [*suspects, *more], rest, found, fixed


def _first_run(pairing: Pairing, noise: Side, probes: dict[str, causes.ModelArgs]) -> Trace:
    """Run both models, and A with random errors; figures of B, of these, and of B's chat if it differs."""
    a, b, (own, other), tell = pairing
    streams = [Stream(a, own.rows), Stream(noise, own.rows), Stream(b, other.rows)]
    pairs = [Pair(0, 2), Pair(0, 1)]
    if _chats_differ(pairing):
        assert own.chat is not None
        assert other.chat is not None
        streams = [streams[0], Stream(a, own.chat), *streams[1:], Stream(b, other.chat)]
        pairs = [Pair(0, 3), Pair(0, 2), Pair(1, 4, width=1)]
    return run(streams, pairs, probes, lambda done, total, name: tell(f"running both models: {name} of {total}"))


def _chats_differ(pairing: Pairing) -> bool:
    own, other = (t.chat for t in pairing.tokens)
    return own is not None and other is not None and own.tolist() != other.tolist()


def _undone(
    pairing: Pairing, suspects: list[Suspect], rest: list[Difference], text: float, chat: float
) -> tuple[list[Cause], float, list[Difference]]:
    """Run B without the first suspect, without the first two, and so on; returns causes, with what they prove.

    `text` and `chat` are the mean KLD before. Also returns the mean KLD that random errors of the final sizes
    give, and the final differences.
    """
    a, (own, other), tell = pairing.a, pairing.tokens, pairing.tell
    fixed = [pairing.b]
    for suspect in suspects:
        fixed.append(suspect.undo(fixed[-1]))
    tell("comparing the weights without the suspects")
    found = list(differences(a, fixed[-1]))
    begun = any(suspect.tokens == "text" for suspect in suspects)
    streams = [Stream(a, own.rows), Stream(noisy(a, found), own.rows)]
    pairs = [Pair(0, 1)]
    for side in fixed[1:]:
        pairs.append(Pair(0, len(streams)))
        streams.append(Stream(side, own.rows if begun else other.rows))
    if of_chat := [suspect for suspect in suspects if suspect.tokens == "chat"]:
        assert own.chat is not None
        streams = [streams[0], Stream(a, own.chat), *streams[1:], Stream(fixed[-1], own.chat)]
        pairs = [Pair(p.a, p.b + 1) for p in pairs] + [Pair(1, len(streams) - 1, width=1)]
    label = "running the models without the suspects"
    trace = run(streams, pairs, progress=lambda done, total, name: tell(f"{label}: {name} of {total}"))
    expected, *after = [figures.kld for figures in trace.figures]
    last = after[len(suspects) - 1] if suspects else text
    clean = not rest and not any(d.beyond for d in found) and _is_noise(last, expected)
    proved, before = [], text
    for suspect, kld in zip(suspects, after, strict=False):
        one, two = (chat, after[-1]) if suspect in of_chat else (before, kld)
        proved.append(
            Cause(suspect.cause, suspect.module, suspect.text, suspect.modules, one, two, clean and two < one)
        )
        before = kld
    return proved, expected, found
