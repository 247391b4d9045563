"""One completion as it grows: a token in, certain text out, and when and why it ends.

Knows nothing of models or batches, so whatever produces tokens can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ..errors import Mistral7BError
from ..sampling.choice import uniforms
from ..sampling.logprobs import Logprob
from ..sampling.params import SamplingParams
from ..sampling.sampler import History, Row
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import ToolCall, ToolCallDelta, ToolCallStream

EOS = 2  # of every Mistral vocabulary, for when there is no tokenizer to ask
NO_TOKEN = -1
NUMBERS = 64  # random numbers made at once: 64 take a CPU little longer than one


@dataclass
class CompletionOutput:
    """A finished completion, with vLLM's names.

    text               without special tokens, and ending before the stop text
    token_ids          all tokens generated, the one that ended it included
    cumulative_logprob sum of the tokens' log-probabilities, where `logprobs` were asked for
    logprobs           for each token a dictionary of Logprobs, itself first
    finish_reason      "stop" (EOS or a stop) or "length"; "abort" or "error" where a request ended early
    stop_reason        the stop text or stop token that ended it, None for EOS
    tool_calls         those that the model made, where tools were offered; they are no part of the text
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


def cumulative(token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob]]) -> float:
    """The sum of the tokens' own log-probabilities."""
    return sum(entry[token].logprob for token, entry in zip(token_ids, logprobs, strict=True))


@dataclass
class RequestMetrics:
    """When what became of a request, in seconds of `time.perf_counter`; None: not yet."""

    arrived: float
    started: float | None = None  # its first token was given to the model
    first_token: float | None = None
    finished: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from its arrival."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def queue_time(self) -> float | None:
        """Seconds that it waited to begin."""
        return None if self.started is None else self.started - self.arrived


@dataclass
class RequestOutput:
    """A prompt with its completions. `prompt_logprobs` has None for the first token, which nothing precedes.

    From the engine also: whether that is all, how many tokens of the prompt were found computed, when what
    happened, and the error that ended it before its time.
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


@dataclass(frozen=True)
class TextPiece:
    """Text that has just become certain, of completion `index`, with the tokens since its last piece.

    `finish_reason` is set on a completion's last piece. `str(piece)` is the text. `logprobs` are the tokens'
    own, where they were asked for, and `tool_calls` what has come of such: from the engine alone.
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
        """Pieces of one completion, at least one and in order, as one."""
        if len(pieces) == 1:
            return pieces[0]
        last = pieces[-1]
        tokens = tuple(chain.from_iterable([p.token_ids for p in pieces]))
        logprobs = tuple(chain.from_iterable([p.logprobs for p in pieces]))
        calls = tuple(chain.from_iterable([p.tool_calls for p in pieces]))
        text = "".join([p.text for p in pieces])
        return TextPiece(text, last.index, tokens, last.finish_reason, last.stop_reason, logprobs, calls)


class StopTexts:
    """Holds back text that may be the beginning of a stop text, and finds the stop that comes first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = [_Stop(stop) for stop in stops]
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain now. After `found` is set nothing more comes."""
        before = len(self._held)
        hits = [(before + end - len(s.text), s.text) for s in self._stops if (end := s.push(text))]
        text = self._held + text
        if hits:
            certain, self.found = min(hits)
            self._held = ""
        else:
            certain = len(text) - max((s.begun for s in self._stops), default=0)
            self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What is still held back, when no more text comes, or none that could go on with it."""
        text, self._held = self._held, ""
        for stop in self._stops:
            stop.begun = 0
        return text


class _Stop:
    """One stop text and how much of it the text so far ends with (Knuth, Morris and Pratt: each character once).

        text   a  a  b  a  a  b  a  a  a
        begun  1  2  3  4  5  6  4  5  2       of aabaabc

    `shorter[n]`: how much it begins again with at the end of its first n + 1 characters, were they not to go on.
    """

    def __init__(self, text: str) -> None:
        self.text, self.begun = text, 0
        self.shorter: list[int] = [0]
        for char in text[1:]:
            self.shorter.append(self._after(self.shorter[-1], char))

    def push(self, text: str) -> int:
        """Take more text; how much of it there is up to the end of the stop, or 0."""
        for place, char in enumerate(text):
            self.begun = self._after(self.begun, char)
            if self.begun == len(self.text):
                return place + 1
        return 0

    def _after(self, begun: int, char: str) -> int:
        while begun and self.text[begun] != char:
            begun = self.shorter[begun - 1]
        return begun + 1 if self.text[begun] == char else 0


@dataclass
class Completion:
    """The state of one completion of one prompt.

    `max_tokens` is the params' own, or what the context leaves. Without a tokenizer there is no text. With
    `calls`, tool calls are told apart from it.
    """

    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    index: int = 0
    tokenizer: Tokenizer | None = None
    calls: ToolCallStream | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.eos = self.tokenizer.eos_id if self.tokenizer else EOS
        self._decoder = self.tokenizer.stream(after=self.prompt[-1:]) if self.tokenizer else None
        self._stops = StopTexts(self.params.stops)
        self._endings = frozenset(self.params.stop_token_ids or ())
        self._parts: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._numbers: tuple[int, list[float]] = (-1, [])  # which NUMBERS of them, and these
        self.history = History(self.prompt) if self.params.penalizes else None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """All text that is certain so far."""
        return "".join(self._parts)

    def banned(self, ahead: int = 0) -> tuple[int, ...]:
        """Tokens that must not come next, or `ahead` later: what would end the completion before `min_tokens`."""
        if len(self.token_ids) + ahead >= self.params.min_tokens:
            return ()
        return tuple(sorted(self._endings if self.params.ignore_eos else self._endings | {self.eos}))

    def u(self, ahead: int = 0) -> float:
        """The random number that chooses the next token, or the one `ahead` later."""
        if self.params.greedy:
            return 0.0
        block, place = divmod(len(self.token_ids) + ahead, NUMBERS)
        if block != self._numbers[0]:
            self._numbers = block, uniforms(self.seed, self.index, block * NUMBERS, NUMBERS).tolist()
        return self._numbers[1][place]

    def row(self, ahead: Sequence[int] = ()) -> Row:
        """What is asked of the logits of the next token, or of the one after the tokens `ahead`."""
        history = self.history
        if history is not None and ahead:
            history = history.after(ahead)
        return Row(self.params, self.u(len(ahead)), self.banned(len(ahead)), history)

    @property
    def piece(self) -> Callable[[int], str] | None:
        """How a token is shown to a person, if that is known."""
        return self.tokenizer.piece if self.tokenizer else None

    def push(self, token: int, logprobs: dict[int, Logprob] | None = None) -> str:
        """Take the next token; return the text that is certain now."""
        assert not self.finished, "a finished completion takes no more tokens"
        self.token_ids.append(token)
        if self.history is not None:
            self.history.add(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        text = ""
        if token == self.eos and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif token in self._endings:
            self.finish_reason, self.stop_reason = "stop", token
        elif self._decoder is not None:
            text = self._filter(self._decoder.push(token))
            if self.calls is not None and token == self.calls.control:
                text += self._stops.flush()  # what was held back stands before the calls, and is no stop text
        if not self.finished and len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        content = self._content(token, text)
        return content + self._settle() if self.finished else content

    def end(self) -> str:
        """Let it end here, where nothing more may come; return the text that was still held back."""
        assert not self.finished, "a completion ends once"
        self.finish_reason = "stop"
        return self._settle()

    def _settle(self) -> str:
        """The text that was held back and is certain because no more comes."""
        text = ""
        if self._stops.found is None and self._decoder is not None:
            text = self._filter(self._decoder.flush())
            text += self._stops.flush() if self._stops.found is None else ""
        content = self._content(NO_TOKEN, text)
        if self.calls is not None:
            by_itself = self.finish_reason == "stop" and self.stop_reason is None
            broken_off, deltas = self.calls.close(cut=not by_itself)
            self._deltas += deltas
            if broken_off:
                self._parts.append(broken_off)
                content += broken_off
        return content

    def _content(self, token: int, text: str) -> str:
        """Of text that has become certain with a token, what is no tool call."""
        if self.calls is not None:
            text, deltas = self.calls.push(token, text)
            self._deltas += deltas
        if text:
            self._parts.append(text)
        return text

    def take_deltas(self) -> tuple[ToolCallDelta, ...]:
        """What came of tool calls since this was last asked."""
        deltas, self._deltas = tuple(self._deltas), []
        return deltas

    def _filter(self, text: str) -> str:
        """Text before a stop text, whose finding ends the completion; min_tokens' own text is not searched."""
        if not self.params.stops or len(self.token_ids) <= self.params.min_tokens:
            return text
        text = self._stops.push(text)
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        return text

    def output(self) -> CompletionOutput:
        """The completion as it stands."""
        wanted = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.token_ids),
            cumulative_logprob=cumulative(self.token_ids, self.logprobs) if wanted else None,
            logprobs=list(self.logprobs) if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            tool_calls=list(self.calls.calls) if self.calls is not None else [],
        )
