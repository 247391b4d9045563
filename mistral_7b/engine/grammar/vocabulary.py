"""The tokens of a SentencePiece vocabulary as llguidance knows them, and masks over them.

llguidance has to be told which bytes a token adds to the text that the user gets, and that depends on the
place: a text's first word is written with a space before it that decoding drops (tokenizer.StreamDecoder).

    after a control token or at the very start     "▁Yes" adds "Yes", and "▁" alone adds nothing
    everywhere else                                "▁Yes" adds " Yes"

So llguidance's vocabulary holds more tokens than ours: behind our own stand what is left of those that lose
their space, and a first token is looked up and passed on under its number there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import GrammarError

if TYPE_CHECKING:
    import llguidance

    from ...text.tokenizer import Tokenizer


def library() -> Any:
    """llguidance, imported where it is first needed. GrammarError if it is not installed."""
    try:
        import llguidance
    except ImportError as e:
        raise GrammarError(
            "structured outputs need llguidance, which is not installed",
            field="structured_outputs",
            hint="pip install 'mistral-7b[serve]'",
        ) from e
    return llguidance


class Vocabulary:
    """A tokenizer's tokens as llguidance knows them, and masks over them. It can be pickled.

    Entries 0..size-1 are the tokens. Those behind are what is left of first words without their space, where that
    is no token itself. `first` (size,) has for each token its entry at the start of a text; -1: it adds nothing.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.size = min(tokenizer.vocab_size, vocab_size)
        self.words = -(-vocab_size // 32)
        self.eos, self.bos = tokenizer.eos_id, tokenizer.bos_id
        ids = range(self.size)
        self.controls = {i for i in ids if tokenizer.is_control(i)}
        self._names = {_angled(tokenizer.piece(i)): i for i in self.controls}
        hidden = self.controls | {tokenizer.unk_id}  # they add nothing to the text
        entries = [tokenizer.piece_bytes(i) for i in ids]
        for name, i in self._names.items():
            entries[i] = name.encode()
        entries[tokenizer.unk_id] = b"<unk>"
        words = [i for i in ids if isinstance(tokenizer.surface(i), str) and entries[i].startswith(b" ")]
        self.first = self._add_first_words(entries, hidden, words)
        self.text = self._pack([i not in hidden for i in ids])
        self.silent = self._pack(self.first < 0)
        self.only_eos = self._pack([i == self.eos for i in ids])
        self.entry_words = -(-len(entries) // 32)
        self._bytes, self._hidden = entries, sorted(hidden)

    @cached_property
    def entries(self) -> llguidance.LLTokenizer:
        """The entries, as llguidance's matchers take them."""
        return library().LLTokenizer(_Entries(self._bytes, self._hidden, self.eos, self.bos))

    def _add_first_words(self, entries: list[bytes], hidden: set[int], words: Sequence[int]) -> np.ndarray:
        """Add what is missing of `words`, tokens that begin with a space; each token's entry at a text's start."""
        known = {entry: i for i, entry in enumerate(entries) if i not in hidden}
        first = np.arange(self.size, dtype=np.int64)
        for i in words:
            left = entries[i][1:]
            if left and left not in known:
                known[left] = len(entries)
                entries.append(left)
            first[i] = known[left] if left else -1
        return first

    def has_text(self, token: int) -> bool:
        """Whether a token adds text: neither a control token nor one that the tokenizer does not know."""
        return token < self.size and token not in self.controls

    def permitted(self, grammar: str) -> np.ndarray:
        """The tokens that a grammar may use: those of text, and the control tokens it names, <NAME> or <[5]>."""
        named: set[int] = set()
        for name in re.findall(r"<[^<>\n]+>", grammar):
            if name in self._names:
                named.add(self._names[name])
            elif name.startswith("<[") and "^" not in name:
                for low, high in re.findall(r"(\d+)(?:-(\d+))?", name):
                    named.update(i for i in self.controls if int(low) <= i <= int(high or low))
        return self.text | self._pack([i in named for i in range(self.size)])

    def of_entries(self, found: np.ndarray) -> np.ndarray:
        """A mask of tokens from one of entries (entry_words,), anywhere but at the start of a text."""
        mask = np.zeros(self.words, dtype=np.int32)
        shared = min(self.words, self.entry_words)
        mask[:shared] = found[:shared]  # the bits of other entries are taken away by `permitted`
        return mask

    def of_first_words(self, found: np.ndarray) -> np.ndarray:
        """The same at the start of a text."""
        bits = np.unpackbits(found.view(np.uint8), bitorder="little")
        return self._pack((bits[self.first] > 0) & (self.first >= 0))

    def _pack(self, allowed: Sequence[bool] | np.ndarray) -> np.ndarray:
        """A mask (words,) of truth values (size,)."""
        mask = np.zeros(self.words, dtype=np.int32)
        packed = np.packbits(np.asarray(allowed, dtype=bool), bitorder="little")
        mask.view(np.uint8)[: len(packed)] = packed
        return mask


class _Entries:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos: int, bos: int) -> None:
        self.tokens, self.special_token_ids = tokens, special_token_ids
        self.eos_token_id, self.bos_token_id = eos, bos

    def __call__(self, text: bytes) -> list[int]:
        """Only grammars that force tokens ask for the usual encoding, and ours do not (lark.OPTIONS)."""
        raise NotImplementedError


def _angled(name: str) -> str:
    """A control token's name as Lark takes it: [INST] is <INST>, and <s> itself."""
    return f"<{name[1:-1]}>"
