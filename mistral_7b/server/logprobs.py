"""Log-probabilities as OpenAI's two forms write them: of the tokens that a text is made of, and of no others.

    tokens   " So"   " it"   "<0xE9>" "<0xBE>" "<0x98>"   "! En"   "d."        the stop text is " End"
    text     "So"    " it"     龘 (e9      be       98)    "!"

A token is told once all of its text is certain. What the space before a first word, a stop text or a tool call
take away is no text, so that the tokens told so far, joined, are the text so far.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..completion import NO_TOKEN, TextPiece
from ..sampling import Logprob
from ..tokenizer import SPACE, Tokenizer
from ..tool_calls import ToolCallStream
from .answers import ChoiceLogprobs, TextLogprobs, TokenLogprob, TopLogprob

LOWEST = -9999.0  # what OpenAI writes for what is all but impossible: JSON has no infinity
Entry = dict[int, Logprob]


@dataclass
class Part:
    """What a token adds to a text: `data`, at character `offset`.

    The bytes of one character all stand where it does, and the last completes it. `first`: the token stands where
    a text's first word does, which loses its space.
    """

    token: int
    entry: Entry | None
    first: bool
    data: bytes
    characters: int = 0  # that end with it
    offset: int = 0


class Parts:
    """The tokens of a completion as parts of its text, which follows upon the ids `after` at character `length`.

    With `calls`, tool calls are told apart from the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, after: Sequence[int] = (), length: int = 0, calls: bool = False
    ) -> None:
        self.length = length  # of the text that has been told
        self._tokenizer, self._decoder = tokenizer, tokenizer.stream(after)
        self._first = not after or tokenizer.is_control(after[-1])
        self._calls = ToolCallStream(tokenizer.tool_calls_id if calls else None, str)
        self._bytes: list[Part] = []  # of a character that is not complete
        self._read: list[Part] = []  # may be a tool call's
        self._content: deque[Part] = deque()  # content, unless a stop text comes first
        self._given: float = 0  # bytes of the text that are not told yet

    def of(self, piece: TextPiece) -> list[Part]:
        """The tokens that are told with this piece: those of its text, or nearly."""
        for token, entry in zip(piece.token_ids, piece.logprobs, strict=True):
            if piece.stop_reason != token:  # which is no text
                self.push(token, entry)
        if piece.finish_reason is not None:
            self.end()
        return self.told(len(piece.text.encode()), last=piece.finish_reason is not None)

    def push(self, token: int, entry: Entry | None) -> None:
        """Take the next token."""
        text, surface = self._decoder.push(token), self._tokenizer.surface(token)
        part = Part(token, entry, self._first, surface if isinstance(surface, bytes) else b"")
        self._first = self._first and surface is None
        if isinstance(surface, bytes):
            self._bytes.append(part)
            self._complete(text)
        else:
            own = self._complete(text)
            part.data, part.characters = own.encode(), len(own)
            self._read.append(part)
        self._sort(self._calls.push(token, text)[0])

    def end(self) -> None:
        """No more tokens come."""
        text = self._decoder.flush()
        self._complete(text)
        self._sort(self._calls.push(NO_TOKEN, text)[0] + self._calls.close()[0])

    def told(self, size: float = math.inf, last: bool = True) -> list[Part]:
        """The tokens whose text is certain with `size` more bytes of it; the `last` of all may be cut."""
        out = []
        self._given += size
        while self._content and len(self._content[0].data) <= self._given:
            out.append(self._content.popleft())
            self._given -= len(out[-1].data)
        if last and self._content and self._given:
            out.append(self._content.popleft())
            out[-1].data = out[-1].data[: int(self._given)]
        for part in out:
            part.offset = self.length
            self.length += part.characters
        return out

    def _complete(self, text: str) -> str:
        """Divide text among the tokens that are bytes; return what is another token's."""
        for place, character in enumerate(text):
            if not self._bytes:
                return text[place:]
            data = character.encode()
            count = len(data)
            if b"".join(part.data for part in self._bytes[:count]) != data:
                count, self._bytes[0].data = 1, data  # a byte that is part of none: U+FFFD stands for it
            self._bytes[count - 1].characters = 1
            self._read += self._bytes[:count]
            del self._bytes[:count]
        return ""

    def _sort(self, content: str) -> None:
        """Content ends where all that was read does. What was read before it is a tool call's."""
        if self._calls.reading and not content:
            return
        call = sum(len(part.data) for part in self._read) - len(content.encode())
        for part in self._read:
            taken = min(call, len(part.data))
            if not call or taken < len(part.data):
                part.data = part.data[taken:]
                self._content.append(part)
            call -= taken
        self._read.clear()


def joined(parts: Sequence[Part]) -> str:
    """The text of tokens that were told together."""
    return b"".join(part.data for part in parts).decode()


class ChatLogprobs:
    """Those of one completion of a chat. Control tokens, such as EOS, are no part of its text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], top: int, calls: bool) -> None:
        self.tokenizer, self.top = tokenizer, top
        self._parts = Parts(tokenizer, prompt, calls=calls)

    def of(self, piece: TextPiece) -> tuple[str, ChoiceLogprobs]:
        """What of the text is told with a piece, and its tokens."""
        parts = self._parts.of(piece)
        content: list[TokenLogprob] = []
        for part in parts:
            if part.entry is None or self.tokenizer.is_control(part.token):
                continue
            best = sorted((e for e in part.entry.items() if e[1].rank <= self.top), key=lambda e: e[1].rank)
            tops = [_one(*_alternative(self.tokenizer, other, part), found) for other, found in best]
            own = _one(_shown(self.tokenizer, part), part.data, part.entry[part.token])
            content.append({**own, "top_logprobs": tops})
        return joined(parts), {"content": content, "refusal": None}


def text_logprobs(tokenizer: Tokenizer, parts: Sequence[Part], top: int) -> TextLogprobs:
    """Those of a text's tokens.

    Several tokens may spell the same (a letter, and its byte): `top_logprobs` has the likeliest.
    """
    out: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        token, entry = part.token, part.entry
        out["tokens"].append(_shown(tokenizer, part))
        out["text_offset"].append(part.offset)
        out["token_logprobs"].append(None if entry is None else max(entry[token].logprob, LOWEST))
        best: dict[str, float] | None = None
        if entry is not None and top:
            best = {}
            for other, found in sorted(entry.items(), key=lambda e: e[1].rank):
                if found.rank <= top or other == token:
                    best.setdefault(_alternative(tokenizer, other, part)[0], max(found.logprob, LOWEST))
        out["top_logprobs"].append(best)
    return out


def _one(text: str, data: bytes, found: Logprob) -> TopLogprob:
    return {"token": text, "logprob": max(found.logprob, LOWEST), "bytes": list(data)}


def _shown(tokenizer: Tokenizer, part: Part) -> str:
    """A token as a person should see it, as far as it is text."""
    is_text = isinstance(tokenizer.surface(part.token), str)
    return part.data.decode() if is_text else tokenizer.piece(part.token)


def _alternative(tokenizer: Tokenizer, token: int, part: Part) -> tuple[str, bytes]:
    """What another token would be in the place of this one, uncut: for a person, and its bytes."""
    text, data, surface = tokenizer.piece(token), tokenizer.piece_bytes(token), tokenizer.surface(token)
    if part.first and isinstance(surface, str) and surface.startswith(SPACE):
        text, data = text[1:], data[1:]
    return text, data
