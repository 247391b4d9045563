"""Log-probabilities in OpenAI's chat and completions formats, for exactly the tokens that make up the text.

    tokens   " So"   " it"   "<0xE9>" "<0xBE>" "<0x98>"   "! En"   "d."        the stop string is " End"
    text     "So"    " it"     龘 (e9      be       98)    "!"

A token is emitted once all of its text is final. The leading space of the first word, stop strings and tool calls
are removed from the tokens as from the text: at any time, the emitted tokens joined are the emitted text.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.completion import NO_TOKEN, TextPiece
from ...sampling.logprobs import Logprob
from ...text.tokenizer import Tokenizer
from ...text.tool_calls import ToolCallStream, ToolSyntax
from ...text.vocabularies.contract import SPACE
from .answers import ChoiceLogprobs, TextLogprobs, TokenLogprob, TopLogprob

LOWEST = -9999.0  # OpenAI's value for very unlikely tokens: JSON has no infinity
Entry = dict[int, Logprob]


@dataclass
class Part:
    """The bytes `data` that a token adds to a text, at character `offset`.

    Tokens that share a character have its offset; the last one counts it. `first`: the token starts the text,
    where the decoder strips a leading space. `raw` are bytes that are not decoded yet. A token is `whole` if it
    ends where a character does.
    """

    token: int
    entry: Entry | None
    first: bool
    data: bytes
    characters: int = 0  # number of characters that this token completes
    offset: int = 0
    raw: bytes = b""
    whole: bool = True


class TokenSpans:
    """Splits the text of a completion into the parts of its tokens.

    The text follows the token ids `after`, and starts at character `length`. With `calls`, tool calls are parsed
    and left out.
    """

    def __init__(
        self, tokenizer: Tokenizer, after: Sequence[int] = (), length: int = 0, calls: bool = False
    ) -> None:
        self.length = length  # characters of the text emitted so far
        self._tokenizer, self._decoder = tokenizer, tokenizer.stream(after)
        self._first = tokenizer.vocabulary.drops_first_space and tokenizer.is_start(after)
        self._calls = ToolCallStream(tokenizer.tool_syntax if calls else ToolSyntax(), str)
        self._held = 0  # bytes at the end of the decoded text that may belong to a tool call
        self._bytes: list[Part] = []  # tokens of bytes that do not end with a character yet
        self._decoded = ""  # the characters of these tokens so far
        self._read: deque[Part] = deque()  # decoded tokens that may belong to a tool call
        self._kept = b""  # for each byte of theirs that is decided, 1 if it is content and 0 if not
        self._content: deque[Part] = deque()  # content that a stop string may still remove
        self._given: float = 0  # bytes of final text whose tokens are not emitted yet

    def of(self, piece: TextPiece) -> list[Part]:
        """Add a piece; return the tokens to emit with it, whose text may lag behind the piece's."""
        for token, entry in zip(piece.token_ids, piece.logprobs, strict=True):
            if piece.stop_reason != token:  # a stop token has no text
                self.push(token, entry)
        if piece.finish_reason is not None:
            self.end()
        return self.told(len(piece.text.encode()), last=piece.finish_reason is not None)

    def push(self, token: int, entry: Entry | None) -> None:
        """Add the next token."""
        text, surface = self._decoder.push(token), self._tokenizer.surface(token)
        part = Part(token, entry, self._first, b"")
        self._first = self._first and surface is None
        if isinstance(surface, bytes):
            part.raw, part.whole = surface, False
            self._bytes.append(part)
            text, _ = self._complete(text)
        else:
            before, own = self._complete(text)
            part.data, part.characters = own.encode(), len(own)
            self._read.append(part)
            text = before + own
        self._sort(text, token)

    def end(self) -> None:
        """Flush the decoders after the last token."""
        text, _ = self._complete(self._decoder.flush())
        self._sort(text)
        self._decide(0, self._calls.close()[0])
        self._move()

    def told(self, size: float = math.inf, last: bool = True) -> list[Part]:
        """Return the tokens that are final with `size` more bytes of text. `last`: cut the final token there."""
        out = []
        self._given += size
        while count := self._whole(self._given):
            for _ in range(count):
                out.append(self._content.popleft())
                self._given -= len(out[-1].data)
        while last and self._content and self._given > 0:
            part = self._content.popleft()
            part.data = part.data[: int(min(self._given, len(part.data)))]
            self._given -= len(part.data)
            out.append(part)
        for part in out:
            part.offset = self.length
            self.length += part.characters
        return out

    def _whole(self, size: float) -> int:
        """Return how many tokens at the head of the content, at most `size` bytes, end with a character first."""
        for count, part in enumerate(self._content, 1):
            size -= len(part.data)
            if size < 0:
                return 0
            if part.whole:
                return count
        return 0

    def _complete(self, text: str) -> tuple[str, str]:
        """Assign decoded text to the pending tokens of bytes.

        Returns the text of those tokens that end with a character, and the rest of `text`, which is not theirs.
        """
        count = 0
        while count < len(text) and any(part.raw for part in self._bytes):
            self._assign(text[count].encode())
            count += 1
        self._decoded += text[:count]
        begun = [part for part in self._bytes if part.data]
        if not begun or not begun[-1].whole:
            return "", text[count:]
        self._read += begun
        del self._bytes[: len(begun)]
        done, self._decoded = self._decoded, ""
        return done, text[count:]

    def _assign(self, data: bytes) -> None:
        """Assign a character to the pending tokens whose bytes it is."""
        raw = b"".join(part.raw for part in self._bytes)
        valid = raw.startswith(data)  # else it is U+FFFD for one invalid byte
        left = len(data) if valid else 1
        for part in self._bytes:
            taken = part.raw[:left]
            part.raw, left = part.raw[len(taken) :], left - len(taken)
            if taken:
                part.data += taken if valid else data
            if not left:
                part.characters += 1
                part.whole = not part.raw
                break

    def _sort(self, text: str, token: int = NO_TOKEN) -> None:
        """Tell content from tool calls in the decoded text before and of a token."""
        for some in text if self._calls.syntax.known else (text,):
            self._decide(len(some.encode()), self._calls.push(NO_TOKEN, some)[0])
        self._decide(0, self._calls.push(token, "")[0])
        self._move()

    def _decide(self, added: int, content: str) -> None:
        """Note which bytes a character of `added` bytes decides: the last are content, the others no text."""
        held, kept = len(self._calls.held.encode()), len(content.encode())
        self._kept += bytes(self._held + added - held - kept) + b"\1" * kept
        self._held = held

    def _move(self) -> None:
        """Move the tokens whose bytes are all decided from `_read` to `_content`, reduced to the content."""
        while self._read and len(self._kept) >= (size := len(self._read[0].data)):
            part, kept, self._kept = self._read.popleft(), self._kept[:size], self._kept[size:]
            part.data = bytes(byte for byte, keep in zip(part.data, kept, strict=True) if keep)
            if part.data or not size:
                self._content.append(part)


def joined(parts: Sequence[Part]) -> str:
    """The text of tokens that were emitted together."""
    return b"".join(part.data for part in parts).decode()


class ChatLogprobs:
    """Log-probabilities of one chat completion. Control tokens such as EOS are left out."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], top: int, calls: bool) -> None:
        self.tokenizer, self.top = tokenizer, top
        self._parts = TokenSpans(tokenizer, prompt, calls=calls)

    def of(self, piece: TextPiece) -> tuple[str, ChoiceLogprobs]:
        """Add a piece; return the text to emit with it, and the log-probabilities of that text's tokens."""
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
    """Log-probabilities in the format of /v1/completions.

    If several tokens have the same spelling (a letter and its byte token), `top_logprobs` has the likeliest.
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
    """The token's readable form, reduced to the part that is in the text."""
    surface = tokenizer.surface(part.token)
    if isinstance(surface, str):
        return part.data.decode()
    if surface is not None and 0 < len(part.data) < len(surface) and part.data in surface:
        with contextlib.suppress(UnicodeDecodeError):
            return part.data.decode()
    return tokenizer.piece(part.token)


def _alternative(tokenizer: Tokenizer, token: int, part: Part) -> tuple[str, bytes]:
    """Another token in the position of `part`: its whole readable form, and its bytes."""
    text, data, surface = tokenizer.piece(token), tokenizer.piece_bytes(token), tokenizer.surface(token)
    if part.first and isinstance(surface, str) and surface.startswith(SPACE):
        text, data = text[1:], data[1:]
    return text, data
