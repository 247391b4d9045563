"""The single-user loop: prefill each prompt, decode all rows together, and let text out as it comes.

    prompts  --prefill, each alone, in chunks-->  rows of one rolling cache
    rows     --decode, one token each a step-->   logits (B, V)  --sampling.py-->  tokens  --completion.py-->  text

With speculation a step is fed the tokens that each row is guessed to go on with as well (speculation.py);
its logits are all sampled, the tokens are taken while the guesses hold, and the cache takes back the rest.

Prompts are ragged and there is no padding: every row of the cache has its own length, and what it sees
is decided by position. A row that finishes is replaced by the last one, so that no step is spent on it
and nothing of it can come back. Memory stays flat beyond the window: a ring of W slots per row.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import captured
from .cache import RollingCache, check_kv_dtype
from .completion import Completion, CompletionOutput, RequestOutput, TextPiece
from .errors import GenerationError, SamplingError
from .model import Mistral7B
from .prompts import Prompt, read_prompts
from .sampling import NOT_FINITE, Logprob, SamplingParams, following_logprobs, logprobs, sample_rows
from .speculation import Guesser, Speculation, StepTime
from .tokenizer import Tokenizer

__all__ = ["CompletionOutput", "RequestOutput", "Speculation", "TextPiece", "generate", "stream"]

PREFILL_CHUNK = 512  # prompt tokens per forward
FIRST_SLOTS = 256  # slots for new tokens at the start; doubled when used up, unless the window comes first


def generate(
    model: Mistral7B,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    batch_size: int = 16,
    speculate: Speculation | None = None,
    kv_dtype: torch.dtype | None = None,
) -> list[RequestOutput]:
    """Continue one or many prompts, texts or token ids, in any mixture of lengths.

    params      for all prompts, or one for each; none is SamplingParams(), which is 16 tokens
    tokenizer   needed for text prompts and text output; none takes the one beside the model's files
    batch_size  completions decoded together; memory grows with it, what comes out does not change
    speculate   guess tokens ahead, which makes steps fewer; what comes out does not change
    kv_dtype    torch.int8 keeps keys and values in about half of bfloat16's bytes, rounded; none: as they are

    Raises GenerationError, naming the prompt, for one that is empty or does not fit the context, and CacheError
    for a kv_dtype that is neither.
    """
    check_kv_dtype(kv_dtype)
    requests = _read_requests(model, prompts, params, tokenizer)
    if speculate is not None:
        speculate.check(model.args.vocab_size)
    for wave in _waves(requests, batch_size):
        batch = _batch(model, wave, speculate, kv_dtype)
        while batch.rows:
            batch.step()
    return [request.output() for request in requests]


def stream(
    model: Mistral7B,
    prompt: Prompt,
    params: SamplingParams | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    speculate: Speculation | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Iterator[TextPiece]:
    """Continue one prompt, giving out text as soon as it is certain; closing the iterator frees everything.

    The pieces of a completion, joined, are the text that `generate` returns. Errors are raised by the
    call itself, before the first piece is asked for.
    """
    check_kv_dtype(kv_dtype)
    requests = _read_requests(model, prompt, params, tokenizer)
    if len(requests) != 1:
        raise GenerationError(
            f"stream takes one prompt, not {len(requests)}", field="prompt", hint="use generate for many"
        )
    if speculate is not None:
        speculate.check(model.args.vocab_size)
    return _pieces(model, requests[0], speculate, kv_dtype)


def _pieces(
    model: Mistral7B, request: _Request, speculate: Speculation | None, kv_dtype: torch.dtype | None
) -> Iterator[TextPiece]:
    batch = _batch(model, [request], speculate, kv_dtype)
    silent = request.completions[0].tokenizer is None
    waiting: dict[int, tuple[int, ...]] = defaultdict(tuple)  # tokens whose text was not certain, per completion
    while batch.rows:
        for piece in batch.step():
            waiting[piece.index] += piece.token_ids
            if piece.text or piece.finish_reason or silent:
                yield replace(piece, token_ids=waiting.pop(piece.index))


@dataclass
class _Request:
    """One prompt and its n completions."""

    prompt: str | None
    ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])

    def output(self) -> RequestOutput:
        wanted = self.params.prompt_logprobs is not None
        outputs = [c.output() for c in self.completions]
        return RequestOutput(self.prompt, self.ids, outputs, self.prompt_logprobs if wanted else None)


class _Batch:
    """Completions that decode together, each in a row of one rolling cache."""

    def __init__(
        self,
        model: Mistral7B,
        requests: Sequence[_Request],
        speculate: Speculation | None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.requests = model, requests
        self.rows = [c for r in requests for c in r.completions]
        self.slack = speculate.max_draft if speculate else 0
        self.need = max(len(c.prompt) + c.max_tokens for c in self.rows)
        slots = min(self.need, max(len(r.ids) for r in requests) + FIRST_SLOTS)
        self.cache = model.rolling_cache(len(self.rows), slots, slack=self.slack, kv_dtype=kv_dtype)
        self.device = self.cache.positions.device
        self.guessers: list[Guesser] = []  # one for each row, or none at all
        if speculate:
            self.guessers = [speculate.guesser(c.prompt, len(c.prompt) + c.max_tokens) for c in self.rows]
        self.time = StepTime(speculate.row_cost if speculate else None)
        self.started = False

    @torch.inference_mode()
    def step(self) -> list[TextPiece]:
        """One more token for every row, or several where guesses hold; each with the text that is now certain."""
        began = time.perf_counter()
        drafts = self._guess()
        longest = max(map(len, drafts))
        fed = len(self.rows) * (1 + longest)
        logits = self._decode(drafts, longest) if self.started else self._prefill()
        before = [len(c.token_ids) for c in self.rows]
        pieces = self._take(logits, drafts)
        came = [c.token_ids[n:] for c, n in zip(self.rows, before, strict=True)]
        if longest:  # in the cache each row keeps what was fed before its last new token
            self.cache.rollback(torch.tensor([1 + longest - len(tokens) for tokens in came], device=self.device))
        if self.guessers and self.started:
            self.time.add(fed, time.perf_counter() - began)
        for guesser, tokens in zip(self.guessers, came, strict=False):
            guesser.take(tokens)
        self.started = True
        self._drop_finished()
        return pieces

    def _guess(self) -> list[list[int]]:
        """Tokens with which each row may go on after its newest, as long as there is use for them."""
        if not self.guessers or not self.started or not self.time.known:
            return [[] for _ in self.rows]

        def seconds(n: int) -> float:
            return self.time(len(self.rows) * (1 + n))

        drafts = []
        for row, (c, guesser) in enumerate(zip(self.rows, self.guessers, strict=True)):
            left = c.max_tokens - len(c.token_ids) - 1  # besides the one that comes anyhow
            drafts.append(guesser.guess(left, seconds, functools.partial(self._choose, row)))
        return drafts

    def _choose(self, row: int, logits: Tensor, ahead: Sequence[int]) -> int:
        """What a row's sampler would take from logits (1, V) if the tokens `ahead` had come first."""
        token = int(sample_rows(logits.to(self.device), [self.rows[row].row(ahead)]))
        return max(token, 0)  # a draft model's logits that are not finite only make a bad guess

    def _take(self, logits: Tensor, drafts: list[list[int]]) -> list[TextPiece]:
        """Sample from logits (R, V), those of the first row's tokens before those of the second's.

        What follows a wrong guess is sampled in vain: all of them at once take less time than one by one.
        """
        first = [0, *itertools.accumulate(1 + len(draft) for draft in drafts)]
        tokens, entries = self._sample(logits, drafts)
        pieces, place = [], 0
        alive = list(range(len(self.rows)))  # rows whose guesses have held so far
        while alive:
            held = []
            for row in alive:
                c, token, entry = self.rows[row], tokens[first[row] + place], entries[first[row] + place]
                if token < 0:
                    raise GenerationError(NOT_FINITE)
                text = c.push(token, entry)
                pieces.append(TextPiece(text, c.index, (token,), c.finish_reason, c.stop_reason))
                if not c.finished and drafts[row][place : place + 1] == [token]:
                    held.append(row)
            alive, place = held, place + 1
        return pieces

    def _prefill(self) -> Tensor:
        """Read every prompt into its row; the logits after each, once per completion: (B, V)."""
        logits, row = [], 0
        for request in self.requests:
            last = self._read(request, self.cache.rows(row, row + 1))
            n = len(request.completions)
            for target in range(row + 1, row + n):
                self.cache.copy_row(row, target)
            logits.append(last.expand(n, -1))
            row += n
        return torch.cat(logits)

    def _read(self, request: _Request, cache: RollingCache) -> Tensor:
        """One prompt into a cache of one row, a chunk at a time; only the last token is projected: (1, V)."""
        k = request.params.prompt_logprobs
        ids = torch.tensor(request.ids, device=self.device)
        for start in range(0, len(ids), PREFILL_CHUNK):
            hidden = self.model.hidden(ids[None, start : start + PREFILL_CHUNK], cache)  # (1, T, D)
            if k is not None:
                following = ids[start + 1 : start + 1 + hidden.shape[1]]
                request.prompt_logprobs += following_logprobs(
                    self.model.logits, hidden[0, : len(following)], following, k, request.completions[0].piece
                )
        return self.model.logits(hidden[:, -1])

    def _decode(self, drafts: list[list[int]], longest: int) -> Tensor:
        """Feed every row's newest token and its draft: logits (R, V) after each of them, row by row."""
        held = max(len(c.prompt) + len(c.token_ids) for c in self.rows) - 1
        widest = min(self.need, self.model.args.sliding_window or self.need) + self.slack
        if held + 1 + longest > self.cache.slots < widest:
            self.cache.enlarge(min(2 * self.cache.slots, widest))
        fed = [[c.token_ids[-1], *draft] for c, draft in zip(self.rows, drafts, strict=True)]
        padded = [row + row[-1:] * (1 + longest - len(row)) for row in fed]  # what follows a draft is taken back
        hidden = self.model.hidden(torch.tensor(padded, device=self.device), self.cache)  # (B, T, D)
        if all(len(row) == 1 + longest for row in fed):
            return self.model.logits(hidden.flatten(0, 1))
        meant = [(r, i) for r, row in enumerate(fed) for i in range(len(row))]
        rows, places = torch.tensor(meant, device=self.device).unbind(1)
        return self.model.logits(hidden[rows, places])

    def _sample(
        self, logits: Tensor, drafts: list[list[int]]
    ) -> tuple[list[int], list[dict[int, Logprob] | None]]:
        """A token for each row of logits (R, V), laid out as in `_take`, and log-probabilities where asked for."""
        told = [(c, draft[:n]) for c, draft in zip(self.rows, drafts, strict=True) for n in range(len(draft) + 1)]
        tokens = sample_rows(logits, [c.row(ahead) for c, ahead in told])
        entries: list[dict[int, Logprob] | None] = [None] * len(told)
        asked = {i: c.params.logprobs for i, (c, _) in enumerate(told) if c.params.logprobs is not None}
        if asked:
            at = list(asked)
            part, chosen = (logits, tokens) if len(at) == len(told) else (logits[at], tokens[at])
            found = logprobs(part, chosen.clamp(min=0), list(asked.values()), told[0][0].piece)
            for i, entry in zip(at, found, strict=True):
                entries[i] = entry
        return tokens.tolist(), entries

    def _drop_finished(self) -> None:
        """The last row takes the place of each one that has finished."""
        order = list(range(len(self.rows)))
        for row in reversed(range(len(self.rows))):
            if self.rows[row].finished:
                last = len(order) - 1
                if row != last:
                    self.cache.copy_row(last, row)
                    order[row] = order[last]
                order.pop()
        if len(order) < len(self.rows):
            self.rows = [self.rows[i] for i in order]
            self.guessers = [self.guessers[i] for i in order] if self.guessers else []
            self.cache = self.cache.rows(0, len(order))


class _CapturedBatch(_Batch):
    """The same on a GPU, where steps after the first are replayed from one graph (captured.py)."""

    def __init__(
        self, model: Mistral7B, requests: Sequence[_Request], kv_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(model, requests, None, kv_dtype)
        self.cache.static = True
        self.decoder: captured.CapturedDecode | None = None

    @torch.inference_mode()
    def step(self) -> list[TextPiece]:
        if not self.started:
            return super().step()
        if self.decoder is None:
            self.decoder = captured.CapturedDecode(self.model, self.cache, self.rows, self.need)
        pieces = []
        for c, token in zip(self.rows, self.decoder.next(), strict=True):
            if token < 0:
                raise GenerationError(NOT_FINITE)
            text = c.push(token)
            pieces.append(TextPiece(text, c.index, (token,), c.finish_reason, c.stop_reason))
        going_on = [row for row, c in enumerate(self.rows) if not c.finished]
        self.decoder.keep(going_on)
        self.rows = [self.rows[row] for row in going_on]
        return pieces


def _batch(
    model: Mistral7B,
    requests: Sequence[_Request],
    speculate: Speculation | None,
    kv_dtype: torch.dtype | None,
) -> _Batch:
    if speculate is None and captured.supports(model, [c for r in requests for c in r.completions]):
        return _CapturedBatch(model, requests, kv_dtype)
    return _Batch(model, requests, speculate, kv_dtype)


def _read_requests(
    model: Mistral7B,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    tokenizer: Tokenizer | None,
) -> list[_Request]:
    read = read_prompts(model, prompts, params, tokenizer)
    if any(r.params.structured_outputs is not None for r in read):
        raise SamplingError(
            "structured_outputs: generate and stream keep to no grammar; mistral_7b.LLM does",
            field="structured_outputs",
        )
    return [_Request(r.prompt, r.ids, r.params, r.completions) for r in read]


def _waves(requests: Sequence[_Request], size: int) -> Iterator[list[_Request]]:
    """Requests in groups of at most `size` completions (one request is never divided)."""
    if size < 1:
        raise GenerationError(f"batch_size must be at least 1, not {size}", field="batch_size")
    wave: list[_Request] = []
    for request in requests:
        if wave and sum(len(r.completions) for r in [*wave, request]) > size:
            yield wave
            wave = []
        wave.append(request)
    if wave:
        yield wave
