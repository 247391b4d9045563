"""The state of one completion in its grammar, and the mask of the tokens allowed next.

llguidance follows a grammar byte by byte. vocabulary.py tells it which bytes each token adds to the text that the
user receives, so that this text matches the grammar. All of this runs in worker processes (worker.py).

Masks are numpy arrays (ceil(V / 32),) int32 with one bit per token, the least significant first. V is the model's
vocabulary size; ids that the tokenizer does not have are never allowed. Neither are control tokens, unless the
grammar names them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ...errors import GrammarError
from .vocabulary import Vocabulary, import_llguidance

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

MAX_LEXER_STATES = 50_000  # states of a grammar's lexer, 0.5 kB each
RENEWAL_INTERVAL = 16  # tokens after a recompilation for want of lexer states before the next one is allowed
DEAD_END = "no text matches the grammar, or none with this beginning"


class CompiledGrammar:
    """A grammar in Lark notation, compiled for a vocabulary.

    Raises GrammarError, with llguidance's reason, if it is malformed, too large, or matched by no text.
    """

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        self.vocabulary, self.text = vocabulary, text
        self._first = self._compile()

    def start(self, at_start: bool) -> MatcherState:
        """The state of an empty completion; `at_start`: decoding drops the space before its first word."""
        return MatcherState(self._first.copy(at_start), self._recompile, at_start)

    def _recompile(self) -> Matcher:
        """A new matcher at the grammar's start, with fresh lexer states, which later completions share."""
        self._first = self._compile()
        return self._first

    def _compile(self) -> Matcher:
        limits = import_llguidance().LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = import_llguidance().LLMatcher(self.vocabulary.entries, self.text, log_level=0, limits=limits)
        first = Matcher(self.vocabulary, matcher, self.vocabulary.permitted(self.text), at_start=False)
        first.copy().mask()  # raises GrammarError for a grammar that no text matches
        return first


class MatcherState:
    """The state of one completion in its grammar.

    The model's ends (EOS and others) are allowed exactly where the text may end. When `finished`, only they may
    follow, and the completion ends without one. `ignore_eos` has no effect under a grammar: a text that cannot
    continue ends. Likewise, the ban on ends for min_tokens is lifted where it would leave no token (lift_bans).

    Copies of a matcher share its lexer states, whose number is limited. A completion that finds the limit reached
    recompiles the grammar, so that one completion cannot exhaust the states of another.
    """

    def __init__(self, matcher: Matcher, renew: Callable[[], Matcher], at_start: bool) -> None:
        self._matcher, self._recompile, self._initially_at_start = matcher, renew, at_start
        self._tokens: list[int] = []
        self._recompiled_at = -RENEWAL_INTERVAL
        self._ended = False  # whether an end was accepted
        self._mask: np.ndarray | None = None  # the mask of the next token, once computed

    @property
    def finished(self) -> bool:
        """Whether only an end may follow; reliable only after a call of masks()."""
        return self._ended or self._matcher.stopped or self._mask is self._matcher.vocabulary.only_ends

    def masks(self, draft: Sequence[int] = ()) -> tuple[list[np.ndarray], list[bool]]:
        """The masks of the next token and after each allowed draft token, and whether the text is over after each.

        There is one mask more than allowed draft tokens. Do not write to them. The state does not change.
        Raises GrammarError if the grammar exceeds its limits or reaches a dead end.
        """
        if self._mask is None:
            self._mask = self._retry_recompiled(lambda: self._matcher.mask())
        masks, over = [self._mask], list[bool]()
        if not draft or not _has_bit(self._mask, draft[0]):
            return masks, over
        lookahead = self._matcher.copy()
        with contextlib.suppress(GrammarError):  # an error within the draft truncates the draft only
            for token in draft:
                if not _has_bit(masks[-1], token):
                    break
                ended = token in lookahead.vocabulary.ends
                if not ended:
                    lookahead.consume(token)
                masks.append(lookahead.vocabulary.only_ends if ended else lookahead.mask())
                over.append(ended or lookahead.stopped)
                if ended:
                    break
        return masks, over

    def allows(self, token: int) -> bool:
        """Whether a token may be next. Raises GrammarError as masks() does."""
        return _has_bit(self.masks()[0][0], token)

    def accept(self, token: int) -> None:
        """Append the next token. Raises GrammarError as masks() does, and for a token that is not allowed."""
        if not self.allows(token):
            raise GrammarError(f"token {token} is not allowed by the grammar here", field="structured_outputs")
        only_ends = self._matcher.vocabulary.only_ends
        if token in self._matcher.vocabulary.ends:
            self._ended = True
        else:
            self._retry_recompiled(lambda: self._matcher.consume(token))
            self._tokens.append(token)
        self._mask = only_ends if self._ended else None

    def _retry_recompiled(self, work: Callable[[], T]) -> T:
        """Call `work`; if it fails, perhaps for want of lexer states, recompile and call it once more."""
        try:
            return work()
        except GrammarError:
            if len(self._tokens) < self._recompiled_at + RENEWAL_INTERVAL:
                raise
            self._recompiled_at = len(self._tokens)
            self._matcher = self._recompile().copy(self._initially_at_start)
            for token in self._tokens:
                self._matcher.consume(token)
            return work()


class Matcher:
    """llguidance's matcher over token ids of the tokenizer; it tracks whether the text has begun."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher, permitted: np.ndarray, at_start: bool
    ) -> None:
        self.vocabulary = vocabulary
        self._matcher = matcher
        self._permitted = permitted  # mask of the tokens that the grammar may ever use
        self._at_start = at_start  # whether decoding drops the space before the next word

    def copy(self, at_start: bool | None = None) -> Matcher:
        """A copy of the state; `at_start` replaces that of a matcher at the beginning of its grammar."""
        at_start = self._at_start if at_start is None else at_start
        return Matcher(self.vocabulary, self._matcher.deep_copy(), self._permitted, at_start)

    @property
    def stopped(self) -> bool:
        """Whether the matcher knows that no text may follow."""
        return bool(self._matcher.is_stopped())

    def consume(self, token: int) -> None:
        """Append an allowed token."""
        entry = int(self.vocabulary.first_entry[token]) if self._at_start else token
        if entry >= 0:
            self._matcher.consume_token(entry)
            self._check()
        self._at_start = self._at_start and token in self.vocabulary.control_ids

    def mask(self) -> np.ndarray:
        """The mask of the next token, (ceil(V / 32),) int32; the object `only_ends` if it equals that."""
        v = self.vocabulary
        self._check()
        if self.stopped:
            return v.only_ends
        found = np.empty(v.entry_mask_words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(found.ctypes.data, found.nbytes)
        self._check()
        mask = (v.token_mask_at_start(found) if self._at_start else v.token_mask(found)) & self._permitted
        if self._at_start and (mask & v.text_tokens).any():
            mask |= v.textless_at_start
        if self._matcher.is_accepting():
            mask |= v.only_ends
        elif not mask.any():
            raise GrammarError(f"structured_outputs: {DEAD_END}", field="structured_outputs")
        return v.only_ends if np.array_equal(mask, v.only_ends) else mask

    def _check(self) -> None:
        """Raise the matcher's error, if it has one."""
        if self._matcher.is_error():
            report = _short_report(self._matcher.get_error())
            raise GrammarError(f"structured_outputs: {report}", field="structured_outputs")


def _has_bit(mask: np.ndarray, token: int) -> bool:
    """Whether a token's bit is set in a mask."""
    return 0 <= token < 32 * len(mask) and bool(mask[token // 32] >> token % 32 & 1)


def _short_report(report: str) -> str:
    """llguidance's error report without its excerpt of the grammar, which the user did not write.

    The report is free text; only the wording of our message depends on it.
    """
    lines = []
    for line in report.splitlines():
        if re.match(r" *\d+ \| |<non-verbose/>", line):
            break
        lines.append(line.strip())
    text = " ".join(line for line in lines if line.strip("^ "))
    text = re.sub(r"^at \d+\(\d+\): ", "", text).replace("(in regex): regex parse error: ", "")
    text = text.replace("nested %lark {", "%json and %lark {")  # embedded.py turns %json into %lark
    return DEAD_END if not text or text.startswith("NoExtension") else text[:400]
