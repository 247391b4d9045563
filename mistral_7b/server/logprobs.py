"""Log-probabilities as OpenAI's two forms write them."""

from __future__ import annotations

from collections.abc import Sequence

from ..completion import TextPiece
from ..sampling import Logprob
from ..tokenizer import Tokenizer
from .answers import ChoiceLogprobs, TextLogprobs, TokenLogprob, TopLogprob

LOWEST = -9999.0  # what OpenAI writes for what is all but impossible: JSON has no infinity
Entry = dict[int, Logprob]


class ChatLogprobs:
    """Those of one completion's tokens: what they add to the text, joined, is the text.

    EOS is no part of a text. The space that SentencePiece writes before a first word is none either, where the
    completion begins a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], top: int) -> None:
        self.tokenizer, self.top = tokenizer, top
        self._at_start = tokenizer.is_control(prompt[-1])

    def of(self, piece: TextPiece) -> ChoiceLogprobs:
        """Those of a piece."""
        content: list[TokenLogprob] = []
        for token, entry in zip(piece.token_ids, piece.logprobs, strict=True):
            if self.tokenizer.is_control(token):
                continue
            best = sorted((e for e in entry.items() if e[1].rank <= self.top), key=lambda e: e[1].rank)
            tops = [self._one(other, found) for other, found in best]
            content.append({**self._one(token, entry[token]), "top_logprobs": tops})
            self._at_start = False
        return {"content": content, "refusal": None}

    def _one(self, token: int, found: Logprob) -> TopLogprob:
        text, data = self.tokenizer.piece(token), self.tokenizer.piece_bytes(token)
        if self._at_start and text.startswith(" "):
            text, data = text[1:], data[1:]
        return {"token": text, "logprob": max(found.logprob, LOWEST), "bytes": list(data)}


class Offsets:
    """Where one token after another stands in a text, in characters.

    The bytes of a character all stand where it does. A completion's tokens follow upon the ids `after`, at
    character `length`.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = (), length: int = 0) -> None:
        self.length = length  # of the text that is certain
        self._tokenizer, self._decoder = tokenizer, tokenizer.stream(after)

    def of(self, token: int) -> int:
        """The offset of the next."""
        text, surface = self._decoder.push(token), self._tokenizer.surface(token)
        self.length += len(text)
        if surface is None or self._decoder.waiting:
            return self.length
        own = 1 if isinstance(surface, bytes) else len(surface)
        return self.length - min(own, len(text))  # a first word's space is no part of the text

    def end(self) -> int:
        """The length of the whole text, when no more tokens come."""
        return self.length + len(self._decoder.flush())


def text_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], entries: Sequence[Entry | None], top: int, offsets: Sequence[int]
) -> TextLogprobs:
    """Those of tokens that stand at these offsets.

    Several tokens may spell the same (a letter, and its byte): `top_logprobs` has the likeliest.
    """
    out: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": list(offsets)}
    for token, entry in zip(tokens, entries, strict=True):
        out["tokens"].append(tokenizer.piece(token))
        out["token_logprobs"].append(None if entry is None else max(entry[token].logprob, LOWEST))
        best: dict[str, float] | None = None
        if entry is not None and top:
            best = {}
            for other, found in sorted(entry.items(), key=lambda e: e[1].rank):
                if found.rank <= top or other == token:
                    best.setdefault(tokenizer.piece(other), max(found.logprob, LOWEST))
        out["top_logprobs"].append(best)
    return out
