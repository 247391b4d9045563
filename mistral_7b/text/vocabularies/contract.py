"""What every vocabulary offers, whatever file it came from."""

from __future__ import annotations

import pathlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from ...errors import TokenizerError

SPACE = "\u2581"  # stands for a space in SentencePiece's pieces; in text it also decodes to a space
NOTHING = "(?!)"  # a pattern that matches nowhere
Surface = str | bytes | None
Spans = Sequence[tuple[int, int]]  # character ranges [start, end)


class Vocabulary(ABC):
    """The tokens of a model: `names` and `surfaces` by id.

    path               the file that it was read from
    kind               what it is, in words
    added_size         number of tokens that were added to the base vocabulary
    names              the tokens as the file spells them; "" for an id without a token
    surfaces           what a token adds to a text: a piece (with SPACE for spaces), bytes of UTF-8, or None
    markup             ids of control tokens: plain text never becomes one, a rendered chat template does
    bos_id...unk_id    None if the vocabulary has no such token
    adds_bos           whether the model's texts begin with BOS
    drops_first_space  whether decoding drops the space before a text's first word, which encoding added
    """

    path: pathlib.Path
    kind: str
    added_size: int
    names: list[str]
    surfaces: list[Surface]
    markup: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    adds_bos: bool
    drops_first_space: bool

    @property
    def size(self) -> int:
        return len(self.names)

    def surface(self, token: int) -> Surface:
        """Return what an id adds to a text; None for control tokens and ids beyond the vocabulary.

        Raises TokenizerError for a negative id.
        """
        if token < 0:
            raise TokenizerError(f"{token} is not a token id: ids are integers of at least 0", field="ids")
        return self.surfaces[token] if token < len(self.surfaces) else None

    def find(self, name: str) -> int | None:
        """Return the id of the token that the file spells `name`; None if there is none."""
        return self.names.index(name) if name and name in self.names else None

    def markup_names(self) -> frozenset[str]:
        """Return the spellings of control tokens."""
        return frozenset(self.names[i] for i in self.markup if self.names[i])

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encode plain text, without BOS or EOS. Spelled control tokens stay text. TokenizerError: no UTF-8."""

    @abstractmethod
    def encode_rendered(self, text: str, plain: Spans = ()) -> list[int]:
        """Encode a rendered chat template: spelled control tokens become ids, except where they touch `plain`."""


def not_utf8(text: str) -> TokenizerError:
    """Return the error for a text with lone surrogates."""
    return TokenizerError(f"the text cannot be encoded as UTF-8: {text!r:.80}", field="text")


def matches(
    pattern: re.Pattern[str], text: str, counts: Callable[[re.Match[str]], bool]
) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the matches that count, from left to right; others hide none that begins within them."""
    match = pattern.search(text)
    while match:
        if counts(match):
            yield match.span()
        match = pattern.search(text, match.end() if counts(match) else match.start() + 1)


def touches(start: int, end: int, spans: Spans) -> bool:
    """Return whether [start, end) and any of the spans share a character."""
    return any(start < b and a < end for a, b in spans)
