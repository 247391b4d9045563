"""A request, and the state of its sequences, one for each of its completions.

    tokens     <s>  a  b  c  d  e        the prompt, then the generated tokens
    computed   |-----------|             tokens whose keys and values are in pages, or will be by a step in flight
    a step feeds the next tokens: only the newest, when all others are computed (decode is prefill of length one)

A preempted sequence keeps its tokens and is recomputed; on a deterministic engine (`deterministic` in config.py;
int8 or int4 weights on a CPU) its keys and values are bit-identical.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..activations.tape import Tape
from ..errors import Mistral7BError
from ..sampling.logprobs import Logprob, Score
from ..sampling.params import SamplingParams
from .completion import Completion, CompletionOutput, RequestMetrics, RequestOutput, TextPiece
from .grammar.client import GrammarState
from .grammar.spec import GrammarSpec
from .pages import Key, PagePool, next_key
from .speculation import Speculation, Speculator
from .watching import Watching

if TYPE_CHECKING:
    from .disk_cache import StoredPrefix

Salt = str | tuple[str | None, str] | None
Sink = Callable[["Request", list[TextPiece]], None]


@dataclass(eq=False)
class Request:
    """One prompt with its parameters, its completions and its results.

    Attributes:
        priority: lower is served first; equal priorities in order of arrival
        adapter: name of the LoRA adapter to use
        client: name of the client; clients share the engine equally (queues.py)
        key: root of its prefix-cache keys; only requests with equal roots share pages (pages.first_key)
        salt: cache_salt, as in RequestOptions, with the key of its steering if it has one
        stored: files of the pages of its prompt, if there is a prefix cache on disk
        grammar: what constrains its text; None: nothing
        prefix: tokens at the end of the prompt that the grammar applies to as well
        watching: what records or steers it (watching.py)
        pooling: "mean" or "last" for an embedding of the prompt, "score" for the scores of `targets`; None for
            text
        targets: tokens to score; they follow the last len(targets) tokens of the prompt, one each
        alternatives: tokens that are scored in the place of the last target, after it
        sink: called after each step with the request and its new pieces, and once more when it has ended
        error: the error that ended it; None if it did not fail
    """

    id: str
    prompt: str | None
    ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    key: Key
    priority: int = 0
    adapter: str | None = None
    client: str = ""
    speculation: Speculation | None = None
    watching: Watching | None = None
    pooling: str | None = None
    targets: list[int] = field(default_factory=list)
    alternatives: Sequence[int] = ()
    sink: Sink | None = None
    salt: Salt = None
    stored: StoredPrefix | None = None
    grammar: GrammarSpec | None = None
    prefix: int = 0
    order: int = 0  # its number in order of arrival
    sequences: list[SequenceState] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    pooled: Tensor | None = None  # (D,) float64: sum of the hidden states so far, or the last one
    pooled_tokens: int = 0  # number of hidden states in the sum
    scores: list[Score] = field(default_factory=list)  # of the targets so far, then of the alternatives
    cached: int | None = None  # prompt tokens found in the prefix cache; None before it starts
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.perf_counter()))
    error: Mistral7BError | None = None
    forked: bool = False  # whether each completion runs as its own sequence; before, the first computes the prompt
    finished: bool = False

    def __post_init__(self) -> None:
        self.sequences = [SequenceState(self, c) for c in self.completions]
        self.forked = len(self.sequences) == 1

    @property
    def pending(self) -> list[SequenceState]:
        """The sequences that have not ended."""
        return [s for s in self.sequences if not s.ended]

    @property
    def completions_per_sequence(self) -> int:
        """The number of completions that each running sequence counts for: all of them until it is forked."""
        return 1 if self.forked else len(self.sequences)

    @property
    def shares_prefixes(self) -> bool:
        """Whether it may reuse a cached prefix; not if a result needs every prompt token to be computed."""
        records = self.watching is not None and self.watching.recording is not None
        return self.params.prompt_logprobs is None and self.pooling != "mean" and not records

    @property
    def needed_rows(self) -> int:
        """The number of last tokens of the prompt whose hidden states are needed: no cached prefix covers them."""
        return max(1, len(self.targets))

    def pool(self, start: int, hidden: Tensor) -> None:
        """Accumulate the final hidden states (T, D) of its tokens from position `start` on.

        Sums are float64, in which sums of bfloat16 are exact: the result does not depend on the prefill chunks.
        """
        if self.pooling == "last":
            self.pooled = hidden[-1].double()
            return
        new = hidden[max(0, self.pooled_tokens - start) :].double()  # recomputed tokens are not summed twice
        self.pooled_tokens += len(new)
        self.pooled = new.sum(0) if self.pooled is None else self.pooled + new.sum(0)

    def embedding(self, normalize: bool) -> list[float]:
        """The pooled hidden state, (D,); of length 1 if `normalize`."""
        assert self.pooled is not None, "only a finished request with `pooling` has an embedding"
        out = self.pooled / self.pooled_tokens if self.pooling == "mean" else self.pooled
        return (out / out.norm().clamp(min=1e-12) if normalize else out).float().tolist()

    def output(self, outputs: list[CompletionOutput] | None = None) -> RequestOutput:
        """The results so far. A thread other than the engine's must pass the completions' `outputs`."""
        with_logprobs = self.params.prompt_logprobs is not None
        outputs = [c.output() for c in self.completions] if outputs is None else outputs
        return RequestOutput(
            self.prompt, self.ids, outputs, self.prompt_logprobs if with_logprobs else None,
            request_id=self.id, finished=self.finished, num_cached_tokens=self.cached or 0, metrics=self.metrics,
            error=self.error, recorded=self.recorded(),
        )  # fmt: skip

    def recorded(self) -> Tape | None:
        """What it recorded, once it has ended: of every token but the last, which is not computed."""
        if self.watching is None or self.watching.recording is None or not self.finished:
            return None
        return self.watching.recording.tape(len(self.ids) + len(self.completions[0].token_ids) - 1)


class SequenceState:
    """The engine's state of one completion: its tokens, and the pages that hold their keys and values."""

    def __init__(self, request: Request, completion: Completion) -> None:
        self.request, self.completion = request, completion
        self.tokens = list(request.ids)
        self.computed = 0
        self.in_flight = 0  # sampled tokens that are not read yet; they follow `tokens`
        self.pages = np.zeros(0, dtype=np.int64)  # its block table: pages[p // size] is the page of position p
        self.first = self.stop = 0  # it holds pages[first:stop]; those below `first` are freed
        self.keys: list[Key] = []  # prefix-cache keys of its full pages, from the first token on
        self.cached_pages = 0  # full pages that are entered into the prefix cache
        self.draft: list[int] = []
        self.speculator: Speculator | None = None
        self.grammar: GrammarState | None = None
        self.ended = False
        self.running = self.waiting = False

    @property
    def rank(self) -> tuple[int, int, int]:
        """Its place in scheduling order: priority, arrival, completion."""
        return self.request.priority, self.request.order, self.completion.index

    @property
    def uncomputed(self) -> int:
        """The number of tokens to compute before the next one can be sampled."""
        return len(self.tokens) + self.in_flight - self.computed

    @property
    def decoding(self) -> bool:
        """Whether only its newest token, a generated one, is left to compute."""
        return self.uncomputed == 1 and len(self.tokens) + self.in_flight > len(self.request.ids)

    @property
    def sampled_sequences(self) -> list[SequenceState]:
        """The sequences whose next tokens are sampled from its row: all of its request's until it is forked."""
        return [self] if self.request.forked else self.request.sequences

    @property
    def late(self) -> bool:
        """Whether a grammar mask for its next row is not ready yet."""
        return any(s.grammar is not None and s.grammar.late for s in self.sampled_sequences)

    @property
    def at_token_limit(self) -> bool:
        """Whether its last token is sampled or in flight, so that nothing is left to compute."""
        return len(self.completion.token_ids) + self.in_flight >= self.completion.max_tokens

    @property
    def held(self) -> list[int]:
        """The pages that it holds, in order of position."""
        return self.pages[self.first : self.stop].tolist()

    def key_of(self, page: int, size: int) -> Key:
        """The prefix-cache key of its full page number `page`, for pages of `size` tokens."""
        while len(self.keys) <= page:
            start = len(self.keys) * size
            before = self.keys[-1] if self.keys else self.request.key
            self.keys.append(next_key(before, self.tokens[start : start + size]))
        return self.keys[page]

    def append_tokens(self, tokens: Sequence[int]) -> None:
        """Append generated tokens and discard the draft that they were checked against."""
        if (speculator := self.make_speculator()) is not None:
            speculator.update(tokens)
        self.tokens += tokens
        self.draft = []

    def make_speculator(self) -> Speculator | None:
        """Its speculator, created on first use and after a preemption; None without speculation."""
        speculation = self.request.speculation
        if self.speculator is None and speculation is not None:
            longest = len(self.request.ids) + self.completion.max_tokens
            self.speculator = speculation.speculator(self.tokens, longest)
        return self.speculator

    def append_page(self, page: int) -> None:
        """Add a page to the block table; the caller has counted this sequence as its holder."""
        if self.stop == len(self.pages):
            self.pages = np.concatenate([self.pages, np.zeros(max(8, self.stop), dtype=np.int64)])
        self.pages[self.stop] = page
        self.stop += 1

    def keep_pages(self, pool: PagePool, first: int, stop: int) -> None:
        """Free the pages with numbers below `first`, and from `stop` on; the last of these is freed first."""
        if stop < self.stop:
            pool.release(self.pages[stop : self.stop][::-1].tolist())
            self.stop = stop
        if first > self.first:
            first = min(first, self.stop)
            pool.release(self.pages[self.first : first].tolist())
            self.first = first

    def free_pages(self, pool: PagePool) -> None:
        """Free all pages, so that every token must be recomputed. The last page is reused first."""
        pool.release(reversed(self.held))
        self.first = self.stop = self.computed = self.cached_pages = 0

    def fork_from(self, other: SequenceState, pool: PagePool) -> None:
        """Take over the state of another sequence of the request, and share its pages."""
        self.computed, self.cached_pages = other.computed, other.cached_pages
        self.first, self.stop = other.first, other.stop
        self.pages, self.keys = other.pages.copy(), list(other.keys)
        for page in self.held:
            pool.share(page)
