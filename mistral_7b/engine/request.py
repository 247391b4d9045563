"""A request, and the sequences that its completions are.

    tokens     <s>  a  b  c  d  e        the prompt, then what has come
    computed   |-----------|             the keys and values of so many of them lie in pages, or will
    a step feeds the next ones: one, when all but the newest are computed (decode is prefill of length one)

A sequence that loses its pages keeps its tokens and is computed again, to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..errors import Mistral7BError
from ..sampling.logprobs import Logprob
from ..sampling.params import SamplingParams
from .completion import Completion, CompletionOutput, RequestMetrics, RequestOutput, TextPiece
from .grammar.client import GrammarState
from .pages import Key, PagePool, next_key
from .speculation import Guesser, Speculation

if TYPE_CHECKING:
    from .disk_cache import StoredPrefix

Sink = Callable[["Request", list[TextPiece]], None]


@dataclass(eq=False)
class Request:
    """One prompt with all that was asked about it.

    Attributes:
        priority: lower comes first; equals in the order of their arrival
        adapter: the LoRA adapter to use, by name
        key: what its prefix must share with another's to be taken for the same (pages.first_key)
        salt: cache_salt, as in RequestOptions
        stored: the files of its prompt's pages, where there is a prefix cache on disk
        pooling: "mean" or "last" hidden state, where it is an embedding that is wanted and not text
        sink: is called after each step with what has come, and once more when the request has ended
        error: why it ended, where that was not as it should
    """

    id: str
    prompt: str | None
    ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    key: Key
    priority: int = 0
    adapter: str | None = None
    speculation: Speculation | None = None
    pooling: str | None = None
    sink: Sink | None = None
    salt: str | None = None
    stored: StoredPrefix | None = None
    order: int = 0  # of arrival
    sequences: list[SequenceState] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    pooled: Tensor | None = None  # (D,) float64: the sum of hidden states so far, or the last one
    summed: int = 0  # how many
    cached: int | None = None  # tokens of the prompt whose keys and values were there already
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.perf_counter()))
    error: Mistral7BError | None = None
    forked: bool = False  # whether its other completions have begun
    finished: bool = False

    def __post_init__(self) -> None:
        self.sequences = [SequenceState(self, c) for c in self.completions]
        self.forked = len(self.sequences) == 1

    @property
    def pending(self) -> list[SequenceState]:
        """Its sequences that have not ended."""
        return [s for s in self.sequences if not s.ended]

    @property
    def to_come(self) -> int:
        """For how many completions each of its running sequences stands."""
        return 1 if self.forked else len(self.sequences)

    @property
    def shares_prefixes(self) -> bool:
        """Whether its prompt may be found computed: not where something is wanted of every token."""
        return self.params.prompt_logprobs is None and self.pooling != "mean"

    def pool(self, at: int, hidden: Tensor) -> None:
        """Take the final hidden states (T, D) of its tokens from place `at` on.

        Sums are made in float64, in which bfloat16's are exact: the same in whatever parts the prompt came.
        """
        if self.pooling == "last":
            self.pooled = hidden[-1].double()
            return
        new = hidden[max(0, self.summed - at) :].double()  # what is computed again is not summed again
        self.summed += len(new)
        self.pooled = new.sum(0) if self.pooled is None else self.pooled + new.sum(0)

    def embedding(self, normalize: bool) -> list[float]:
        """What it was pooled for, (D,)."""
        assert self.pooled is not None, "only a request with `pooling` that has ended well has an embedding"
        out = self.pooled / self.summed if self.pooling == "mean" else self.pooled
        return (out / out.norm().clamp(min=1e-12) if normalize else out).float().tolist()

    def output(self, outputs: list[CompletionOutput] | None = None) -> RequestOutput:
        """What has come so far. Another thread than the engine's must bring the completions itself."""
        wanted = self.params.prompt_logprobs is not None
        outputs = [c.output() for c in self.completions] if outputs is None else outputs
        return RequestOutput(
            self.prompt, self.ids, outputs, self.prompt_logprobs if wanted else None,
            request_id=self.id, finished=self.finished, num_cached_tokens=self.cached or 0, metrics=self.metrics,
            error=self.error,
        )  # fmt: skip


class SequenceState:
    """One completion in the engine: its tokens, and the pages that hold their keys and values."""

    def __init__(self, request: Request, completion: Completion) -> None:
        self.request, self.completion = request, completion
        self.tokens = list(request.ids)
        self.computed = 0
        self.in_flight = 0  # tokens that have been sampled and not yet read: they come after `tokens`
        self.pages = np.zeros(0, dtype=np.int64)  # page p // size of position p; below `first` they are gone
        self.first = self.stop = 0  # pages first..stop are held
        self.keys: list[Key] = []  # of the full pages, from the first token on
        self.known = 0  # pages that have been made known by their keys
        self.draft: list[int] = []
        self.guesser: Guesser | None = None
        self.grammar: GrammarState | None = None
        self.ended = False
        self.running = self.waits = False

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who comes first."""
        return self.request.priority, self.request.order, self.completion.index

    @property
    def need(self) -> int:
        """Tokens that are to be computed before the next can be sampled."""
        return len(self.tokens) + self.in_flight - self.computed

    @property
    def decoding(self) -> bool:
        """Whether it needs its newest token computed and no more."""
        return self.need == 1 and len(self.tokens) + self.in_flight > len(self.request.ids)

    @property
    def drawn(self) -> list[SequenceState]:
        """The sequences whose next tokens are drawn from its row: all of its request's, until these are forked."""
        return [self] if self.request.forked else self.request.sequences

    @property
    def late(self) -> bool:
        """Whether a grammar has not yet said which tokens its next row may give."""
        return any(s.grammar is not None and s.grammar.late for s in self.drawn)

    @property
    def complete(self) -> bool:
        """Whether the last token that it may have is flying: it needs nothing computed any more."""
        return len(self.completion.token_ids) + self.in_flight >= self.completion.max_tokens

    @property
    def held(self) -> list[int]:
        """The pages that it holds."""
        return self.pages[self.first : self.stop].tolist()

    def key_of(self, page: int, size: int) -> Key:
        """The key of a page that its tokens fill."""
        while len(self.keys) <= page:
            at = len(self.keys) * size
            self.keys.append(
                next_key(self.keys[-1] if self.keys else self.request.key, self.tokens[at : at + size])
            )
        return self.keys[page]

    def take(self, tokens: Sequence[int]) -> None:
        """These tokens have come."""
        if (guesser := self.drafter()) is not None:
            guesser.take(tokens)
        self.tokens += tokens
        self.draft = []

    def drafter(self) -> Guesser | None:
        """What proposes draft tokens, if wanted. Made when its first token comes, or after a preemption."""
        speculation = self.request.speculation
        if self.guesser is None and speculation is not None:
            self.guesser = speculation.guesser(self.tokens, len(self.request.ids) + self.completion.max_tokens)
        return self.guesser

    def append(self, page: int) -> None:
        """Hold one page more."""
        if self.stop == len(self.pages):
            self.pages = np.concatenate([self.pages, np.zeros(max(8, self.stop), dtype=np.int64)])
        self.pages[self.stop] = page
        self.stop += 1

    def drop(self, pool: PagePool, first: int) -> None:
        """Give back pages below `first`."""
        if first > self.first:
            first = min(first, self.stop)
            pool.release(self.pages[self.first : first].tolist())
            self.first = first

    def drop_all(self, pool: PagePool) -> None:
        """Give back all pages: what was computed is lost. The last is taken first for something else."""
        pool.release(reversed(self.held))
        self.first = self.stop = self.computed = self.known = 0

    def fork(self, of: SequenceState, pool: PagePool) -> None:
        """Begin where another sequence of the request stands, on the same pages."""
        self.computed, self.first, self.stop, self.known = of.computed, of.first, of.stop, of.known
        self.pages, self.keys = of.pages.copy(), list(of.keys)
        for page in self.held:
            pool.share(page)
