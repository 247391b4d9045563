"""Text that keeps to a grammar: which tokens may come next, over a SentencePiece vocabulary.

llguidance follows a grammar byte by byte; vocabulary.py tells it which bytes a token adds to the text that the
user gets, so that it is this text that obeys.

Masks are numpy arrays (ceil(V / 32),) int32 with a bit for each token, the lowest first; V is the model's, and
ids that are none of the tokenizer's are never allowed. Nor are control tokens, unless the grammar names them.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import GrammarError
from ..sampling_params import StructuredOutputs
from ..tokenizer import Tokenizer
from .lark import lark
from .lark import tool_spec as tool_spec
from .vocabulary import Vocabulary, library

if TYPE_CHECKING:
    import llguidance

KEPT = 64  # compiled grammars; each holds from some kilobytes up to tens of megabytes
STATES = 50_000  # of a grammar's lexer, about 2 kB each: beyond them the completion ends with an error
DEAD_END = "no text obeys the grammar, or none that begins like this one"


class _Compiled(NamedTuple):
    matcher: llguidance.LLMatcher  # at the grammar's start; copied, never advanced
    permitted: np.ndarray  # mask of the tokens that it may use: text, and the control tokens it names


class Grammars:
    """The grammars of one tokenizer, compiled once each and kept; the one longest unused leaves first.

    May be used from several threads. `vocab_size` is the model's, which may exceed the tokenizer's.
    Raises GrammarError if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, kept: int = KEPT) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_size)
        self._kept = kept
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, spec: StructuredOutputs, after: Sequence[int]) -> GrammarState:
        """The grammar of a completion that follows upon the ids `after`.

        Raises GrammarError, with llguidance's reason, for one that is malformed, too large, or obeyed by no text.
        """
        at_start = not after or after[-1] in self._vocabulary.controls  # as Tokenizer.stream has it
        text = lark(spec, spaced=not at_start)
        with self._lock:
            compiled = self._compiled.pop(text, None)
            if compiled is not None:
                self._compiled[text] = compiled  # the last one: used just now
        if compiled is None:
            compiled = self._compile(text)
            with self._lock:
                self._compiled[text] = compiled
                while len(self._compiled) > self._kept:
                    self._compiled.popitem(last=False)
        return GrammarState(self._vocabulary, *compiled, at_start=at_start)

    def _compile(self, text: str) -> _Compiled:
        limits = library().LLParserLimits(max_lexer_states=STATES, verbose_errors=False)
        matcher = library().LLMatcher(self._vocabulary.entries, text, log_level=0, limits=limits)
        _check(matcher)
        compiled = _Compiled(matcher, self._vocabulary.permitted(text))
        GrammarState(self._vocabulary, *compiled, at_start=False).masks()  # raises what can be known at once
        return compiled


class GrammarState:
    """Where one completion stands in its grammar.

    EOS is allowed exactly where the text may end. When `finished`, nothing else may come: the completion is over,
    and what is to end it is this and no stop of the request's. `ignore_eos` has no say: a text that its grammar
    does not go on with cannot be gone on with, so under a grammar EOS always ends the completion, and so does
    being `finished` without it. In the same way a ban for min_tokens is lifted where it would leave no token
    (sampling.lift).
    """

    def __init__(
        self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher, permitted: np.ndarray, at_start: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher.deep_copy()
        self._permitted = permitted
        self._at_start = at_start  # the next text is the first, and loses its space
        self._ended = False  # EOS has come
        self._known: np.ndarray | None = None  # the mask of the present place

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but EOS; exactly known only once masks() have been asked for."""
        over = self._ended or self._known is self._vocabulary.only_eos
        return over or bool(self._matcher.is_stopped())

    def masks(self, draft: Sequence[int] = ()) -> tuple[list[np.ndarray], int]:
        """The mask of the next token, and that after each token of a draft, and how many of these are allowed.

        There is one mask more than allowed tokens of the draft. They are not to be written to. The state is the
        same after the call. Raises GrammarError where the grammar exceeds its limits or comes to a dead end.
        """
        if self._known is None:
            self._known = self._mask(self._matcher, self._at_start)
        masks = [self._known]
        if not draft or not _holds(self._known, draft[0]):
            return masks, 0
        matcher, at_start = self._matcher.deep_copy(), self._at_start
        for token in draft:
            if not _holds(masks[-1], token):
                break
            if token == self._vocabulary.eos:
                masks.append(self._vocabulary.only_eos)
                break
            at_start = self._push(matcher, token, at_start)
            masks.append(self._mask(matcher, at_start))
        return masks, len(masks) - 1

    def accept(self, token: int) -> None:
        """Take the next token. Raises GrammarError for one that is not allowed."""
        if not _holds(self.masks()[0][0], token):
            raise GrammarError(f"token {token} is not what the grammar allows here")
        if token == self._vocabulary.eos:
            self._ended = True
        else:
            self._at_start = self._push(self._matcher, token, self._at_start)
        self._known = self._vocabulary.only_eos if self.finished else None

    def _push(self, matcher: llguidance.LLMatcher, token: int, at_start: bool) -> bool:
        """Give a token to the matcher; whether the text still has to begin after it."""
        entry = int(self._vocabulary.first[token]) if at_start else token
        if entry >= 0:
            matcher.consume_token(entry)
            _check(matcher)
        return at_start and token in self._vocabulary.controls

    def _mask(self, matcher: llguidance.LLMatcher, at_start: bool) -> np.ndarray:
        """The tokens that may come: (ceil(V / 32),) int32."""
        v = self._vocabulary
        _check(matcher)
        if self._ended or matcher.is_stopped():
            return v.only_eos
        found = np.empty(v.entry_words, dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(found.ctypes.data, found.nbytes)
        _check(matcher)
        mask = (v.of_first_words(found) if at_start else v.of_entries(found)) & self._permitted
        if at_start and (mask & v.text).any():
            mask |= v.silent
        if matcher.is_accepting():
            mask |= v.only_eos
        if not mask.any():
            raise GrammarError(f"structured_outputs: {DEAD_END}")
        return v.only_eos if np.array_equal(mask, v.only_eos) else mask


def _holds(mask: np.ndarray, token: int) -> bool:
    """Whether a mask has the bit of a token."""
    return 0 <= token < 32 * len(mask) and bool(mask[token // 32] >> token % 32 & 1)


def _check(matcher: llguidance.LLMatcher) -> None:
    """Raise what a matcher has come to, on one line."""
    if matcher.is_error():
        raise GrammarError(f"structured_outputs: {_reason(matcher.get_error())}")


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
