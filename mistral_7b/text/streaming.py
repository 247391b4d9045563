"""Decode token ids to text as they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from .vocabularies.contract import SPACE, Surface

UTF8 = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """Incremental decoder: the joined results of push and flush equal `decode` of all ids.

    Text is returned as soon as no later token can change it; incomplete UTF-8 characters are buffered. `surface`
    is that of a vocabulary; with `drop_space`, the space before the first word is dropped.
    """

    def __init__(self, surface: Callable[[int], Surface], drop_space: bool) -> None:
        self._surface = surface
        self._at_start = drop_space  # the next piece is the first of a text: drop its space
        self._pending = bytearray()

    def push(self, token: int) -> str:
        """Add a token; return the text that is now final."""
        surface = self._surface(token)
        if isinstance(surface, bytes):
            self._at_start = False
            self._pending += surface
            return self._decode_pending()
        text = self.flush()  # bytes followed by a piece can never be completed
        if surface is None:
            return text
        if self._at_start and surface.startswith(SPACE):
            surface = surface[1:]
        self._at_start = False
        return text + surface.replace(SPACE, " ")

    @property
    def waiting(self) -> bool:
        """Whether the bytes of an incomplete character are buffered."""
        return bool(self._pending)

    def flush(self) -> str:
        """Return the buffered text at the end of the stream."""
        return self._decode_pending(final=True)

    def _decode_pending(self, final: bool = False) -> str:
        text = ""
        while self._pending:
            size = _utf8_size(self._pending[0])
            head = bytes(self._pending[:size])
            try:
                char = UTF8().decode(head, final)
            except UnicodeDecodeError:
                char, size = "\ufffd", 1
            if not char:
                break  # an incomplete character: wait for more bytes
            text += char
            del self._pending[:size]
        return text


def _utf8_size(first: int) -> int:
    """Return the length of a UTF-8 character from its first byte (1 if invalid)."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
