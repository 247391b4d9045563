"""The state of one completion: it takes tokens, returns text, and decides when the completion is finished.

It knows nothing of models or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ..activations.tape import Tape
from ..errors import Mistral7BError
from ..sampling.choice import uniforms
from ..sampling.logprobs import Logprob
from ..sampling.params import SamplingParams
from ..sampling.sampler import History, Row
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import ToolCall, ToolCallDelta, ToolCallStream

EOS = 2  # in every vocabulary of Mistral; used where neither a tokenizer nor the model names an end
NO_TOKEN = -1
RANDOM_BLOCK = 64  # random numbers computed at once, which takes little longer than one


@dataclass(repr=False)
class CompletionOutput:
    """A finished completion, with vLLM's names.

    text               without special tokens, up to the stop string
    token_ids          all generated tokens, with the one that ended it
    cumulative_logprob sum of the tokens' log-probabilities, if `logprobs` were requested
    logprobs           for each token a dictionary of Logprobs, its own first
    finish_reason      "stop" (an end, stop token or stop string) or "length"; "abort" or "error" if it ended early
    stop_reason        the stop string or stop token that ended it, None for an end of the model's own
    tool_calls         the model's tool calls, if tools were offered; they are not part of the text
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)

    def __repr__(self) -> str:
        calls = f", tool_calls={self.tool_calls}" if self.tool_calls else ""
        return (
            f"CompletionOutput(index={self.index}, text={self.text!r}, {len(self.token_ids)} tokens, "
            f"finish_reason={self.finish_reason!r}{calls})"
        )


def cumulative(token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob]]) -> float:
    """The sum of the tokens' own log-probabilities."""
    return sum(entry[token].logprob for token, entry in zip(token_ids, logprobs, strict=True))


@dataclass
class RequestMetrics:
    """Times of a request's events, in seconds of `time.perf_counter`; None if not reached."""

    arrived: float
    started: float | None = None  # it left the queue
    first_token: float | None = None
    finished: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first generated token."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival until it left the queue."""
        return None if self.started is None else self.started - self.arrived


@dataclass(repr=False)
class RequestOutput:
    """A prompt with its completions, with vLLM's names.

    prompt_logprobs    for each prompt token a dictionary of Logprobs; None for the first, which nothing precedes
    finished           whether all completions are finished
    num_cached_tokens  prompt tokens whose keys and values came from the prefix cache
    metrics            times of arrival, start, first token and end
    error              the error that ended the request, None if it did not fail
    recorded           the activations that the request recorded, None if it did not ask for any
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    request_id: str = ""
    finished: bool = True
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: Mistral7BError | None = None
    recorded: Tape | None = None

    def __repr__(self) -> str:
        n, error = len(self.prompt_token_ids), "" if self.error is None else f", error={self.error!r}"
        return f"RequestOutput(prompt={self.prompt!r}, {n} prompt tokens, outputs={self.outputs}{error})"


@dataclass(frozen=True)
class TextPiece:
    """New text of completion `index`, with the tokens since its last piece.

    Text that may be the start of a stop string, or of an incomplete character, is held back for a later piece.
    `finish_reason` is set on a completion's last piece. `str(piece)` is the text. `logprobs` (if requested) and
    `tool_calls` belong to these tokens.
    """

    text: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[dict[int, Logprob], ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __str__(self) -> str:
        return self.text

    @staticmethod
    def joined(pieces: Sequence[TextPiece]) -> TextPiece:
        """Concatenate consecutive pieces of one completion, at least one."""
        if len(pieces) == 1:
            return pieces[0]
        last = pieces[-1]
        tokens = tuple(chain.from_iterable([p.token_ids for p in pieces]))
        logprobs = tuple(chain.from_iterable([p.logprobs for p in pieces]))
        calls = tuple(chain.from_iterable([p.tool_calls for p in pieces]))
        text = "".join([p.text for p in pieces])
        return TextPiece(text, last.index, tokens, last.finish_reason, last.stop_reason, logprobs, calls)


class StopStrings:
    """Finds the stop string that begins first, and holds back text that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._matchers = [_StopMatcher(stop) for stop in stops]
        self._held = ""

    def push(self, text: str) -> str:
        """Append text; return what precedes any stop string, found or possible. Not to be called after `found`."""
        before = len(self._held)
        hits = [(before + end - len(m.stop), m.stop) for m in self._matchers if (end := m.push(text))]
        text = self._held + text
        if hits:
            safe, self.found = min(hits)
            self._held = ""
        else:
            safe = len(text) - max((m.matched for m in self._matchers), default=0)
            self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """Return the text held back, when no text follows that could complete a stop string."""
        text, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.matched = 0
        return text


class _StopMatcher:
    """Matches one stop string incrementally (Knuth-Morris-Pratt: constant amortized time per character).

        text     a  a  b  a  a  b  a  a  a
        matched  1  2  3  4  5  6  4  5  2       characters of aabaabc that the text ends with

    `fallback[n]`: the longest proper prefix of the stop string that its first n + 1 characters end with.
    """

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        self.fallback: list[int] = [0]
        for char in stop[1:]:
            self.fallback.append(self._next(self.fallback[-1], char))

    def push(self, text: str) -> int:
        """Append text; return the length of its part up to the end of the stop string, 0 if not found."""
        for i, char in enumerate(text):
            self.matched = self._next(self.matched, char)
            if self.matched == len(self.stop):
                return i + 1
        return 0

    def _next(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self.fallback[matched - 1]
        return matched + 1 if self.stop[matched] == char else 0


@dataclass
class Completion:
    """The state of one completion of one prompt.

    `max_tokens` is its token limit: the parameters' own, or what the context leaves. Without a tokenizer it has no
    text. `calls` separates tool calls from the text. `ends` are the ids with which the model ends a text; None:
    those of the tokenizer, or else EOS.
    """

    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    index: int = 0
    tokenizer: Tokenizer | None = None
    calls: ToolCallStream | None = None
    ends: frozenset[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        if self.ends is None:
            self.ends = self.tokenizer.stop_ids if self.tokenizer else frozenset((EOS,))
        self._own_ends = frozenset() if self.params.ignore_eos else self.ends
        self._decoder = self.tokenizer.stream(after=self.prompt[-1:]) if self.tokenizer else None
        self._stop_strings = StopStrings(self.params.stops)
        self._stop_ids = frozenset(self.params.stop_token_ids or ())
        self._texts: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._uniforms: tuple[int, list[float]] = (-1, [])  # number of a block of random numbers, and the block
        self.history = History(self.prompt) if self.params.penalizes else None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """All text so far, without what is held back."""
        return "".join(self._texts)

    def banned(self, ahead: int = 0) -> tuple[int, ...]:
        """Tokens banned at the position `ahead` after the next: before `min_tokens`, ends and stop tokens."""
        if len(self.token_ids) + ahead >= self.params.min_tokens:
            return ()
        return tuple(sorted(self._stop_ids | self._own_ends))

    def uniform(self, ahead: int = 0) -> float:
        """The random number in [0, 1) that samples the token at the position `ahead` after the next."""
        if self.params.greedy:
            return 0.0
        block, i = divmod(len(self.token_ids) + ahead, RANDOM_BLOCK)
        if block != self._uniforms[0]:
            self._uniforms = block, uniforms(self.seed, self.index, block * RANDOM_BLOCK, RANDOM_BLOCK).tolist()
        return self._uniforms[1][i]

    def row(self, ahead: Sequence[int] = ()) -> Row:
        """The sampler's input for the next token, or for the one after the unread or draft tokens `ahead`."""
        history = self.history
        if history is not None and ahead:
            history = history.after(ahead)
        return Row(self.params, self.uniform(len(ahead)), self.banned(len(ahead)), history)

    @property
    def piece(self) -> Callable[[int], str] | None:
        """The function from a token id to its text; None without a tokenizer."""
        return self.tokenizer.piece if self.tokenizer else None

    def push(self, token: int, logprobs: dict[int, Logprob] | None = None) -> str:
        """Append a token; return the new text."""
        assert not self.finished, "a finished completion takes no more tokens"
        self.token_ids.append(token)
        if self.history is not None:
            self.history.add(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        text = ""
        if token in self._own_ends:
            self.finish_reason = "stop"
        elif token in self._stop_ids:
            self.finish_reason, self.stop_reason = "stop", token
        elif self._decoder is not None:
            text = self._check_stops(self._decoder.push(token))
            if self.calls is not None and token == self.calls.syntax.begin:
                text += self._stop_strings.flush()  # text held back precedes the calls, so it is no stop string
        if not self.finished and len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        content = self._without_calls(token, text)
        return content + self._flush() if self.finished else content

    def end(self) -> str:
        """Finish with reason "stop", because a grammar allows nothing more; return the text held back."""
        assert not self.finished, "a completion finishes once"
        self.finish_reason = "stop"
        return self._flush()

    def _flush(self) -> str:
        """Return all text held back by the decoder, the stop strings and the tool-call parser."""
        text = ""
        if self._stop_strings.found is None and self._decoder is not None:
            text = self._check_stops(self._decoder.flush())
            text += self._stop_strings.flush() if self._stop_strings.found is None else ""
        content = self._without_calls(NO_TOKEN, text)
        if self.calls is not None:
            ended_by_model = self.finish_reason == "stop" and self.stop_reason is None
            incomplete, deltas = self.calls.close(cut=not ended_by_model)
            self._deltas += deltas
            if incomplete:
                self._texts.append(incomplete)
                content += incomplete
        return content

    def _without_calls(self, token: int, text: str) -> str:
        """Pass a token's new text through the tool-call parser; return the part that is not a tool call."""
        if self.calls is not None:
            text, deltas = self.calls.push(token, text)
            self._deltas += deltas
        if text:
            self._texts.append(text)
        return text

    def take_deltas(self) -> tuple[ToolCallDelta, ...]:
        """The tool-call deltas since the last call."""
        deltas, self._deltas = tuple(self._deltas), []
        return deltas

    def _check_stops(self, text: str) -> str:
        """Search new text for stop strings, but not within `min_tokens`; return the part before one."""
        if not self.params.stops or len(self.token_ids) <= self.params.min_tokens:
            return text
        text = self._stop_strings.push(text)
        if self._stop_strings.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stop_strings.found
        return text

    def output(self) -> CompletionOutput:
        """The completion so far."""
        with_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.token_ids),
            cumulative_logprob=cumulative(self.token_ids, self.logprobs) if with_logprobs else None,
            logprobs=list(self.logprobs) if with_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            tool_calls=list(self.calls.calls) if self.calls is not None else [],
        )
