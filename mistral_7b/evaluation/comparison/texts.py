"""The tokens of both sides: the same text as each encodes it, with its own beginning, and one conversation.

R rows · T tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import EvaluationError, TokenizerError
from ...text.tokenizer import Tokenizer
from .sides import Side

CONVERSATION = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "It is Paris."},
    {"role": "user", "content": "And that of Italy?"},
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a side reads: rows (R, T) of the text, and the conversation (1, T), None without a chat template.

    borrowed    whether the side has no tokenizer, and these are of the other side's
    """

    rows: Tensor
    chat: Tensor | None = None
    bos: int | None = None
    borrowed: bool = False


def tokens_of(a: Side, b: Side, text: str, most: int, row: int) -> tuple[Tokens, Tokens]:
    """Encode the text by both sides' tokenizers; rows have equal ends, and begin with what each side begins with.

    A side without a tokenizer uses the other's. Raises EvaluationError if neither has one, if they differ in the
    text's own tokens, or if the text is shorter than two tokens.
    """
    first, second = _tokenizer(a), _tokenizer(b)
    one, other = first or second, second or first
    if one is None or other is None:
        raise EvaluationError(
            "neither A nor B has a tokenizer", field="text", hint="put the tokenizer's files beside the weights"
        )
    ids = one.encode(text, bos=False)
    if ids != (theirs := other.encode(text, bos=False)):
        at = next(
            (i for i, (x, y) in enumerate(zip(ids, theirs, strict=False)) if x != y), min(len(ids), len(theirs))
        )
        raise EvaluationError(
            f"the tokenizers of A and B are different: they part at token {at} of the text",
            field="tokenizer",
            hint="compare models of one vocabulary",
        )
    starts = [t.encode("") for t in (one, other)]
    width = min(row, a.args.max_seq_len, b.args.max_seq_len) - max(map(len, starts))
    body = rows_of(ids[:most], width)
    least = min(len(start) for start in starts) + body.shape[1]
    if least < 2:
        raise EvaluationError("the text has less than two tokens: there is nothing to predict", field="text")
    for side in (a, b):
        check_ids(side, body)
    return (
        Tokens(_begun(body, starts[0]), _chat(one), one.bos_id, first is None),
        Tokens(_begun(body, starts[1]), _chat(other), other.bos_id, second is None),
    )


def rows_of(ids: Sequence[int], width: int) -> Tensor:
    """Cut ids into rows of `width`, or one shorter row; the rest is left out."""
    width = min(max(width, 1), len(ids))
    if width < 1:
        raise EvaluationError("the text is empty: there is nothing to predict", field="text")
    return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)


def check_ids(side: Side, tokens: Tensor) -> None:
    """Raise EvaluationError for a token beyond the vocabulary of a side."""
    if int(tokens.max()) >= side.args.vocab_size:
        raise EvaluationError(
            f"token {int(tokens.max())} exceeds the vocabulary of {side.args.vocab_size}",
            field="vocab_size",
            place=side.name,
            hint="the tokenizer belongs to another model",
        )


def _tokenizer(side: Side) -> Tokenizer | None:
    try:
        return Tokenizer.from_pretrained(side.path)
    except TokenizerError:
        return None


def _begun(rows: Tensor, start: list[int]) -> Tensor:
    return torch.cat([torch.tensor(start, dtype=rows.dtype).expand(len(rows), -1), rows], 1)


def _chat(tokenizer: Tokenizer) -> Tensor | None:
    if tokenizer.chat is None:
        return None
    try:
        return torch.tensor([tokenizer.encode_chat(CONVERSATION)])
    except TokenizerError:  # a template that has no place for this conversation
        return None
