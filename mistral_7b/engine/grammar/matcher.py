"""Where one completion stands in its grammar, and which tokens may come next.

llguidance follows a grammar byte by byte; vocabulary.py tells it which bytes a token adds to the text that the
user gets, so that it is this text that obeys. All of this runs in worker processes (worker.py).

Masks are numpy arrays (ceil(V / 32),) int32 with a bit for each token, the lowest first; V is the model's, and
ids that are none of the tokenizer's are never allowed. Nor are control tokens, unless the grammar names them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ...errors import GrammarError
from .vocabulary import Vocabulary, library

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

STATES = 50_000  # of a grammar's lexer, half a kilobyte each
PROGRESS = 16  # tokens that a completion must have taken with new states before it may have new ones again
DEAD_END = "no text obeys the grammar, or none that begins like this one"


class CompiledGrammar:
    """A grammar in Lark's notation, compiled for a vocabulary.

    Raises GrammarError, with llguidance's reason, for one that is malformed, too large, or obeyed by no text.
    """

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        self.vocabulary, self.text = vocabulary, text
        self._first = self._compile()

    def start(self, at_start: bool) -> MatcherState:
        """The state of a completion that has no tokens yet; `at_start`: its first word loses its space."""
        return MatcherState(self._first.copy(at_start), self._renew, at_start)

    def _renew(self) -> Matcher:
        """A matcher at the grammar's start, with new states, which later completions share."""
        self._first = self._compile()
        return self._first

    def _compile(self) -> Matcher:
        limits = library().LLParserLimits(max_lexer_states=STATES, verbose_errors=False)
        matcher = library().LLMatcher(self.vocabulary.entries, self.text, log_level=0, limits=limits)
        first = Matcher(self.vocabulary, matcher, self.vocabulary.permitted(self.text), at_start=False)
        first.copy().mask()  # raises what can be known at once
        return first


class MatcherState:
    """Where one completion stands in its grammar.

    EOS is allowed exactly where the text may end. When `finished`, only EOS may follow, and the completion is over
    without it. `ignore_eos` has no effect under a grammar: a text that its grammar cannot continue ends. In the
    same way a ban for min_tokens is lifted where it would leave no token (sampling.lift).

    Copies of a matcher share the states of its lexer, which are limited. A completion that finds none left
    continues with a matcher compiled anew, so that it cannot use up those of another.
    """

    def __init__(self, matcher: Matcher, renew: Callable[[], Matcher], at_start: bool) -> None:
        self._matcher, self._renew, self._began_at_start = matcher, renew, at_start
        self._tokens: list[int] = []
        self._renewed = -PROGRESS
        self._ended = False  # EOS has come
        self._known: np.ndarray | None = None  # the mask of the present place

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but EOS; exactly known only once masks() have been asked for."""
        return self._ended or self._matcher.over or self._known is self._matcher.vocabulary.only_eos

    def masks(self, draft: Sequence[int] = ()) -> tuple[list[np.ndarray], list[bool]]:
        """The mask of the next token and those after each draft token, and of each of these if the text is over.

        There is one mask more than allowed tokens of the draft. They are not to be written to. The state is the
        same after the call. Raises GrammarError where the grammar exceeds its limits or comes to a dead end.
        """
        if self._known is None:
            self._known = self._persist(lambda: self._matcher.mask())
        masks, over = [self._known], list[bool]()
        if not draft or not _holds(self._known, draft[0]):
            return masks, over
        ahead = self._matcher.copy()
        with contextlib.suppress(GrammarError):  # an error on the way of a draft ends the draft alone
            for token in draft:
                if not _holds(masks[-1], token):
                    break
                ended = token == ahead.vocabulary.eos
                if not ended:
                    ahead.push(token)
                masks.append(ahead.vocabulary.only_eos if ended else ahead.mask())
                over.append(ended or ahead.over)
                if ended:
                    break
        return masks, over

    def allows(self, token: int) -> bool:
        """Whether it may be the next. Raises GrammarError as masks() does."""
        return _holds(self.masks()[0][0], token)

    def accept(self, token: int) -> None:
        """Take the next token. Raises GrammarError for one that is not allowed, and as masks() does."""
        if not self.allows(token):
            raise GrammarError(f"token {token} is not what the grammar allows here", field="structured_outputs")
        only_eos = self._matcher.vocabulary.only_eos
        if token == self._matcher.vocabulary.eos:
            self._ended = True
        else:
            self._persist(lambda: self._matcher.push(token))
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
            self._matcher = self._renew().copy(self._began_at_start)
            for token in self._tokens:
                self._matcher.push(token)
            return work()


class Matcher:
    """A matcher, and what it does not know: our own numbers of the tokens, and whether the text has begun."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher, permitted: np.ndarray, at_start: bool
    ) -> None:
        self.vocabulary = vocabulary
        self._matcher = matcher
        self._permitted = permitted  # mask of the tokens that the grammar may use at all
        self._at_start = at_start  # the next text is the first, and loses its space

    def copy(self, at_start: bool | None = None) -> Matcher:
        """Another at the same place; `at_start` tells where that is for one at the beginning of its grammar."""
        at_start = self._at_start if at_start is None else at_start
        return Matcher(self.vocabulary, self._matcher.deep_copy(), self._permitted, at_start)

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
            raise GrammarError(f"structured_outputs: {DEAD_END}", field="structured_outputs")
        return v.only_eos if np.array_equal(mask, v.only_eos) else mask

    def _check(self) -> None:
        """Raise what the matcher has come to."""
        if self._matcher.is_error():
            report = _reason(self._matcher.get_error())
            raise GrammarError(f"structured_outputs: {report}", field="structured_outputs")


def _holds(mask: np.ndarray, token: int) -> bool:
    """Whether a mask has the bit of a token."""
    return 0 <= token < 32 * len(mask) and bool(mask[token // 32] >> token % 32 & 1)


def _reason(report: str) -> str:
    """What llguidance reports, without the picture of the place in the grammar, which is not the user's own.

    The report is all that it tells, and only the wording of our message hangs on it.
    """
    lines = []
    for line in report.splitlines():
        if re.match(r" *\d+ \| |<non-verbose/>", line):
            break
        lines.append(line.strip())
    text = " ".join(line for line in lines if line.strip("^ "))
    text = re.sub(r"^at \d+\(\d+\): ", "", text).replace("(in regex): regex parse error: ", "")
    text = text.replace("nested %lark {", "%json and %lark {")  # the one may have been the other (embedded.py)
    return DEAD_END if not text or text.startswith("NoExtension") else text[:400]
