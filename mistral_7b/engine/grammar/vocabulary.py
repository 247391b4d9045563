"""The tokens of a vocabulary as llguidance knows them, and masks over them.

llguidance must know which bytes a token adds to the text that the user receives. That depends on the position:
SentencePiece encodes a text's first word with a space before it that decoding drops (streaming.StreamDecoder).

    after a control token or at the very start     "▁Yes" adds "Yes", and "▁" alone adds nothing
    everywhere else                                "▁Yes" adds " Yes"

So llguidance's vocabulary is larger than the tokenizer's: after the tokens come entries for first words without
their space. The first token of a text is translated to its entry there. A vocabulary whose decoding drops no space
has none. The last entry stands for the end: a model may have several, of which llguidance knows none.
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


def import_llguidance() -> Any:
    """The llguidance module, imported on first use. Raises GrammarError if it is not installed."""
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
    """A tokenizer's tokens as llguidance entries, and masks over them. Can be pickled.

    Entries 0 to size-1 are the tokens. The rest are first words without their space that are not tokens
    themselves, and the end. `first_entry` (size,) maps each token to its entry at the start of a text, or -1 if it
    adds nothing there. `ends` are the ids that may end a text; None: those of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int] | None = None) -> None:
        self.size = min(tokenizer.vocab_size, vocab_size)
        self.mask_words = -(-vocab_size // 32)
        self.ends = tokenizer.stop_ids if ends is None else ends
        ids = range(self.size)
        self.control_ids = {i for i in ids if tokenizer.is_control(i)}
        self._names = {_lark_name(tokenizer.piece(i)): i for i in self.control_ids}
        hidden = self.control_ids | {i for i in (*self.ends, tokenizer.unk_id) if i is not None and i < self.size}
        entries = [tokenizer.piece_bytes(i) for i in ids]
        for name, i in self._names.items():
            entries[i] = name.encode()
        for i in hidden - self.control_ids:  # they add nothing to the text
            entries[i] = b"<hidden>"
        words = [i for i in ids if isinstance(tokenizer.surface(i), str) and entries[i].startswith(b" ")]
        if not tokenizer.vocabulary.drops_first_space:
            words = []
        self.first_entry = self._add_first_words(entries, hidden, words)
        self.text_tokens = self._pack_bits([i not in hidden for i in ids])
        self.textless_at_start = self._pack_bits(self.first_entry < 0)
        self.only_ends = self._pack_bits([i in self.ends for i in range(vocab_size)])
        entries.append(b"<end>")
        self.entry_mask_words = -(-len(entries) // 32)
        self._bytes, self._hidden = entries, [*sorted(hidden), len(entries) - 1]

    @cached_property
    def entries(self) -> llguidance.LLTokenizer:
        """The entries, as llguidance's matchers take them."""
        return import_llguidance().LLTokenizer(_TokenizerWrapper(self._bytes, self._hidden))

    def _add_first_words(self, entries: list[bytes], hidden: set[int], words: Sequence[int]) -> np.ndarray:
        """Append entries for `words`, tokens that begin with a space, without it. Returns `first_entry`."""
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
        """Whether a token adds text: it is known to the tokenizer and not a control token."""
        return token < self.size and token not in self.control_ids

    def permitted(self, grammar: str) -> np.ndarray:
        """The mask of tokens a grammar may use: text tokens, and control tokens that it names, <NAME> or <[5]>."""
        named: set[int] = set()
        for name in re.findall(r"<[^<>\n]+>", grammar):
            if name in self._names:
                named.add(self._names[name])
            elif name.startswith("<[") and "^" not in name:
                for low, high in re.findall(r"(\d+)(?:-(\d+))?", name):
                    named.update(i for i in self.control_ids if int(low) <= i <= int(high or low))
        return self.text_tokens | self._pack_bits([i in named for i in range(self.size)])

    def token_mask(self, found: np.ndarray) -> np.ndarray:
        """A mask of tokens from a mask of entries (entry_mask_words,), except at the start of a text."""
        mask = np.zeros(self.mask_words, dtype=np.int32)
        shared = min(self.mask_words, self.entry_mask_words)
        mask[:shared] = found[:shared]  # `permitted` clears the bits of extra entries
        return mask

    def token_mask_at_start(self, found: np.ndarray) -> np.ndarray:
        """The same at the start of a text."""
        bits = np.unpackbits(found.view(np.uint8), bitorder="little")
        return self._pack_bits((bits[self.first_entry] > 0) & (self.first_entry >= 0))

    def _pack_bits(self, allowed: Sequence[bool] | np.ndarray) -> np.ndarray:
        """A mask (mask_words,) int32 from booleans, one for each of the first ids."""
        mask = np.zeros(self.mask_words, dtype=np.int32)
        packed = np.packbits(np.asarray(allowed, dtype=bool), bitorder="little")
        mask.view(np.uint8)[: len(packed)] = packed
        return mask


class _TokenizerWrapper:
    """The tokenizer interface that llguidance requires."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: list[bytes], special_token_ids: list[int]) -> None:
        self.tokens, self.special_token_ids = tokens, special_token_ids
        self.eos_token_id, self.bos_token_id = len(tokens) - 1, None  # the entry of the end

    def __call__(self, text: bytes) -> list[int]:
        """Never called: llguidance encodes text only to force tokens, which lark.OPTIONS disables."""
        raise NotImplementedError


def _lark_name(name: str) -> str:
    """A control token's name in Lark notation: <INST> for [INST], and <s> for <s>."""
    return f"<{name[1:-1]}>"
