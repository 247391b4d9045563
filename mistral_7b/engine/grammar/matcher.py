"""Text that keeps to a grammar: which tokens may come next, over a SentencePiece vocabulary.

llguidance follows a grammar byte by byte; vocabulary.py tells it which bytes a token adds to the text that the
user gets, so that it is this text that obeys.

Masks are numpy arrays (ceil(V / 32),) int32 with a bit for each token, the lowest first; V is the model's, and
ids that are none of the tokenizer's are never allowed. Nor are control tokens, unless the grammar names them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ...errors import GrammarError
from ...sampling_params import StructuredOutputs
from ...tokenizer import Tokenizer
from .lark import lark
from .vocabulary import Vocabulary, library

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

KEPT = 32  # compiled grammars; each holds from some kilobytes up to tens of megabytes
STATES = 50_000  # of a grammar's lexer, half a kilobyte each
PROGRESS = 16  # tokens that a completion must have taken with new states before it may have new ones again
DEAD_END = "no text obeys the grammar, or none that begins like this one"


class Grammars:
    """The grammars of one tokenizer, compiled once each and kept; the one longest unused leaves first.

    May be used from several threads. `vocab_size` is the model's, which may exceed the tokenizer's.
    Raises GrammarError if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, kept: int = KEPT) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_size)
        self._kept = kept
        self._compiled: OrderedDict[str, _Reader] = OrderedDict()  # each at its start
        self._lock = threading.Lock()

    def start(self, spec: StructuredOutputs, after: Sequence[int]) -> GrammarState:
        """The grammar of a completion that follows upon the ids `after`.

        Raises GrammarError, with llguidance's reason, for one that is malformed, too large, or obeyed by no text.
        """
        at_start = not after or after[-1] in self._vocabulary.controls  # as Tokenizer.stream has it
        text = lark(spec, spaced=not at_start)
        with self._lock:
            reader = self._compiled.pop(text, None)
            if reader is not None:
                self._compiled[text] = reader  # the last one: used just now
        if reader is None:
            reader = self._compile(text)
        return GrammarState(reader.copy(at_start), functools.partial(self._compile, text), at_start)

    def _compile(self, text: str) -> _Reader:
        limits = library().LLParserLimits(max_lexer_states=STATES, verbose_errors=False)
        matcher = library().LLMatcher(self._vocabulary.entries, text, log_level=0, limits=limits)
        reader = _Reader(self._vocabulary, matcher, self._vocabulary.permitted(text), at_start=False)
        reader.copy().mask()  # raises what can be known at once
        with self._lock:
            self._compiled[text] = reader
            self._compiled.move_to_end(text)
            while len(self._compiled) > self._kept:
                self._compiled.popitem(last=False)
        return reader


class GrammarState:
    """Where one completion stands in its grammar.

    EOS is allowed exactly where the text may end. When `finished`, nothing else may come: the completion is over,
    and what is to end it is this and no stop of the request's. `ignore_eos` has no say: a text that its grammar
    does not go on with cannot be gone on with, so under a grammar EOS always ends the completion, and so does
    being `finished` without it. In the same way a ban for min_tokens is lifted where it would leave no token
    (sampling.lift).

    Copies of a matcher share the states of its lexer, which are limited; so that no completion can use up those of
    another, one that finds none left goes on with a matcher of its own, compiled anew.
    """

    def __init__(self, reader: _Reader, renew: Callable[[], _Reader], at_start: bool) -> None:
        self._reader, self._renew, self._began_at_start = reader, renew, at_start
        self._tokens: list[int] = []
        self._renewed = -PROGRESS
        self._ended = False  # EOS has come
        self._known: np.ndarray | None = None  # the mask of the present place

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but EOS; exactly known only once masks() have been asked for."""
        return self._ended or self._reader.over or self._known is self._reader.vocabulary.only_eos

    def masks(self, draft: Sequence[int] = ()) -> tuple[list[np.ndarray], int]:
        """The mask of the next token, and that after each token of a draft, and how many of these are allowed.

        There is one mask more than allowed tokens of the draft. They are not to be written to. The state is the
        same after the call. Raises GrammarError where the grammar exceeds its limits or comes to a dead end.
        """
        if self._known is None:
            self._known = self._persist(lambda: self._reader.mask())
        masks = [self._known]
        if not draft or not _holds(self._known, draft[0]):
            return masks, 0
        ahead = self._reader.copy()
        with contextlib.suppress(GrammarError):  # what a draft comes to is no error: it ends there
            for token in draft:
                if not _holds(masks[-1], token):
                    break
                if token == ahead.vocabulary.eos:
                    masks.append(ahead.vocabulary.only_eos)
                    break
                ahead.push(token)
                masks.append(ahead.mask())
        return masks, len(masks) - 1

    def allows(self, token: int) -> bool:
        """Whether it may be the next. Raises GrammarError as masks() does."""
        return _holds(self.masks()[0][0], token)

    def accept(self, token: int) -> None:
        """Take the next token. Raises GrammarError for one that is not allowed, and as masks() does."""
        if not self.allows(token):
            raise GrammarError(f"token {token} is not what the grammar allows here")
        only_eos = self._reader.vocabulary.only_eos
        if token == self._reader.vocabulary.eos:
            self._ended = True
        else:
            self._persist(lambda: self._reader.push(token))
            self._tokens.append(token)
        self._known = only_eos if self._ended else None

    def _persist(self, work: Callable[[], T]) -> T:
        """Do what may fail for want of states, and if it does, once more with new ones."""
        try:
            return work()
        except GrammarError:
            if len(self._tokens) < self._renewed + PROGRESS:
                raise
            self._renewed = len(self._tokens)
            self._reader = self._renew().copy(self._began_at_start)
            for token in self._tokens:
                self._reader.push(token)
            return work()


class _Reader:
    """A matcher, and what it does not know: our own numbers of the tokens, and whether the text has begun."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher, permitted: np.ndarray, at_start: bool
    ) -> None:
        self.vocabulary = vocabulary
        self._matcher = matcher
        self._permitted = permitted  # mask of the tokens that the grammar may use at all
        self._at_start = at_start  # the next text is the first, and loses its space

    def copy(self, at_start: bool | None = None) -> _Reader:
        """Another at the same place; `at_start` tells where that is for one at the beginning of its grammar."""
        at_start = self._at_start if at_start is None else at_start
        return _Reader(self.vocabulary, self._matcher.deep_copy(), self._permitted, at_start)

    @property
    def over(self) -> bool:
        """Whether the matcher knows that nothing may follow."""
        return bool(self._matcher.is_stopped())

    def push(self, token: int) -> None:
        """Take a token that is allowed."""
        entry = int(self.vocabulary.first[token]) if self._at_start else token
        if entry >= 0:
            self._matcher.consume_token(entry)
            self._check()
        self._at_start = self._at_start and token in self.vocabulary.controls

    def mask(self) -> np.ndarray:
        """The tokens that may come: (ceil(V / 32),) int32, and `only_eos` itself if it is that."""
        v = self.vocabulary
        self._check()
        if self.over:
            return v.only_eos
        found = np.empty(v.entry_words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(found.ctypes.data, found.nbytes)
        self._check()
        mask = (v.of_first_words(found) if self._at_start else v.of_entries(found)) & self._permitted
        if self._at_start and (mask & v.text).any():
            mask |= v.silent
        if self._matcher.is_accepting():
            mask |= v.only_eos
        if not mask.any():
            raise GrammarError(f"structured_outputs: {DEAD_END}")
        return v.only_eos if np.array_equal(mask, v.only_eos) else mask

    def _check(self) -> None:
        """Raise what the matcher has come to."""
        if self._matcher.is_error():
            raise GrammarError(f"structured_outputs: {_reason(self._matcher.get_error())}")


def _holds(mask: np.ndarray, token: int) -> bool:
    """Whether a mask has the bit of a token."""
    return 0 <= token < 32 * len(mask) and bool(mask[token // 32] >> token % 32 & 1)


def _reason(report: str) -> str:
    """What llguidance reports, without the picture of the place in the grammar, which is not the user's own."""
    lines = []
    for line in report.splitlines():
        if re.match(r" *\d+ \| |<non-verbose/>", line):
            break
        lines.append(line.strip())
    text = " ".join(line for line in lines if line.strip("^ "))
    text = re.sub(r"^at \d+\(\d+\): ", "", text).replace("(in regex): regex parse error: ", "")
    return DEAD_END if not text or text.startswith("NoExtension") else text[:400]
