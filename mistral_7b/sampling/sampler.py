"""From logits to a token: what may be asked, what is done to the logits, and the choice.

Names, defaults, ranges and order are vLLM's. For one token, from the model's logits:

    log-probabilities    of the raw logits, before anything below
    adjust               logit_bias, banned tokens (min_tokens), penalties, then a grammar's mask
    weigh                temperature, then min_p, top_k, top_p: probabilities as whole numbers
    choose               one number u in [0, 1) picks the token at u of the cumulative distribution

u is a function of (seed, which of the n completions, which token), so a completion does not depend on
what is sampled beside it or before it. One call samples R rows whatever is asked of each, and a row's
token is the same to the bit whatever other rows there are, on every device: probabilities are summed as
whole numbers, whose sum does not depend on the order.

R rows · D of them drawn at random, the others greedy · N of those narrowed by min_p, top_k or top_p · V vocabulary
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sampling_params import SamplingParams as SamplingParams  # where it can be read without torch

ALL = (0, 0, 1)  # min_p, top_k and top_p that keep every token
ROWS = 8  # rows a CPU samples at once: so much stays in its caches
LOGPROB_ROWS = 64  # rows whose logits exist at once where a prompt's are asked for: 8 MB for 32768 tokens
NOT_FINITE = "the model gives logits that are not finite (float16 overflows; try bfloat16)"
CANDIDATES = 1024  # tokens a row that are sorted first on a CPU: few rows need more, and all of them take longer


class History:
    """The different tokens of one sequence, and how often each came out of the model. It lies on the host.

    tokens (n,) int64 and counts (n,) int64, which is 0 for a token that only the prompt has.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = np.unique(np.asarray(prompt, dtype=np.int64))
        self.counts = np.zeros(len(self.tokens), dtype=np.int64)
        self._places = {token: place for place, token in enumerate(self.tokens.tolist())}

    def add(self, token: int) -> None:
        """Count one new token."""
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens, self.counts = np.append(self.tokens, token), np.append(self.counts, 0)
        self.counts[place] += 1

    def after(self, tokens: Sequence[int]) -> History:
        """The history as it will be if these tokens come next."""
        later = object.__new__(History)
        later.tokens, later.counts, later._places = self.tokens, self.counts.copy(), dict(self._places)
        for token in tokens:
            later.add(token)
        return later


@dataclass(frozen=True)
class Row:
    """What is asked of one row of logits.

    u        number in [0, 1) that chooses; a greedy row needs none
    banned   tokens that must not come, unless a grammar lets nothing else
    history  of the sequence, where params penalizes; without it nothing is penalized
    allowed  bits of the tokens that a grammar lets come, (ceil(V / 32),) int32, bit t % 32 of number t // 32
             for token t; None: all
    """

    params: SamplingParams
    u: float = 0.0
    banned: Sequence[int] = ()
    history: History | None = None
    allowed: np.ndarray | None = None


def sample_rows(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """A token for each row of logits (R, V): ids (R,), -1 where the highest logit is NaN or infinite.

    Every row's token is what that row alone would give. Nothing is asked of a GPU, so nobody waits for it.
    """
    if logits.device.type == "mps":  # which has no float64
        return sample_rows(logits.cpu(), rows).to(logits.device)
    if logits.device.type == "cpu" and len(rows) > ROWS:
        parts = (rows[i : i + ROWS] for i in range(0, len(rows), ROWS))
        return torch.cat([sample_rows(part, of) for part, of in zip(logits.split(ROWS), parts, strict=True)])
    ways = ways_of([row.params for row in rows], logits.shape[-1], logits.device)
    return pick(adjust(logits, rows), ways, put([row.u for row in rows], logits.device, np.float64))


def adjust(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits (R, V) with bias, bans, penalties and masks. These can change which token is the most probable."""
    biased = [(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias]
    banned = [(i, tokens) for i, row in enumerate(rows) if (tokens := lift(row.banned, row.allowed))]
    penalized = [(i, row) for i, row in enumerate(rows) if row.history is not None and row.params.penalizes]
    ruled = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    if not (biased or banned or penalized or ruled):
        return logits
    V, device = logits.shape[-1], logits.device
    if biased or banned or penalized:
        logits = logits.clone(memory_format=torch.contiguous_format)
        flat = logits.view(-1)  # token t of row i lies at i * V + t, and none is named twice
    if biased:
        at = put([i * V + token for i, bias in biased for token in bias], device)
        flat[at] += put([x for _, bias in biased for x in bias.values()], device, np.float64).to(flat.dtype)
    if banned:
        flat[put([i * V + token for i, tokens in banned for token in tokens], device)] = -math.inf
    if penalized:
        _penalize(flat, V, penalized)
    if ruled:
        allowed = np.ones((len(rows), V), dtype=bool)
        for i, mask in ruled:
            allowed[i] = np.unpackbits(mask.view(np.uint8), count=V, bitorder="little")
        logits = torch.where(put(allowed, device, np.bool_), logits, -math.inf)
    return logits


def _penalize(flat: Tensor, V: int, rows: Sequence[tuple[int, Row]]) -> None:
    """Lower the logits (R * V,) of tokens that these rows have had, in place."""
    at, counts, asked = [], [], []
    for i, row in rows:
        assert row.history is not None
        at.append(i * V + row.history.tokens)
        counts.append(row.history.counts)
        asked.append((row.params.repetition_penalty, row.params.frequency_penalty, row.params.presence_penalty))
    places = put(np.concatenate(at), flat.device)
    table = np.repeat(np.array(asked), [len(tokens) for tokens in at], axis=0)  # a line for each token
    table = np.column_stack([table, np.concatenate(counts)])
    factor, frequency, presence, count = put(table, flat.device, np.float64).to(flat.dtype).unbind(1)
    x = flat[places]
    x = torch.where(x > 0, x / factor, x * factor)
    flat[places] = x - frequency * count - presence * count.clamp(max=1)


def lift(banned: Sequence[int], mask: np.ndarray | None) -> Sequence[int]:
    """The bans, or none where they would leave no token of a mask: a grammar comes before min_tokens."""
    if mask is None or not banned:
        return banned
    left = mask.copy()
    for token in banned:
        left.view(np.uint8)[token // 8] &= 255 ^ (1 << token % 8)
    return banned if left.any() else ()


def ways_of(params: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> Ways:
    """The ways of these rows; of rows that were sampled so just before, the same tensors."""
    return _ways(tuple(_asked(p, vocabulary) for p in params), device)


def _asked(p: SamplingParams, vocabulary: int) -> tuple[float, ...]:
    """Temperature, min_p, top_k and top_p; nothing of a greedy row."""
    return () if p.greedy else (p.temperature, p.min_p, p.top_k if 0 < p.top_k < vocabulary else 0, p.top_p)


class Ways:
    """How R rows are sampled, in tensors that stay in place: nothing in them is asked for on the host again.

    drawn     indices (D,) of the rows that are not greedy; temperature (D, 1)
    narrowed  indices (N,) into drawn; min_p, top_k (0: all), top_p (N, 1)

    Indices of everything are a slice, so that rows which are all alike in this are not copied.
    """

    def __init__(self, asked: Sequence[tuple[float, ...]], device: torch.device) -> None:
        drawn = [i for i, row in enumerate(asked) if row]
        narrowed = [n for n, i in enumerate(drawn) if asked[i][1:] != ALL]
        self.draws, self.narrows, self.greedy = bool(drawn), bool(narrowed), len(drawn) < len(asked)
        self.drawn = _indices(drawn, len(asked), device)
        self.narrowed = _indices(narrowed, len(drawn), device)
        if drawn:
            table = put([asked[i] for i in drawn], device, np.float64)
            self.temperature = table[:, :1]
            self.min_p, top_k, self.top_p = table[self.narrowed, 1:].split(1, dim=1)
            self.top_k = top_k.long()


_ways = functools.lru_cache(maxsize=64)(Ways)  # a step's rows are mostly those of the step before


def _indices(some: Sequence[int], n: int, device: torch.device) -> Tensor | slice:
    return slice(None) if len(some) == n else put(some, device)


def put(values: Sequence[Any] | np.ndarray, device: torch.device, dtype: type = np.int64) -> Tensor:
    """Numbers as a tensor on the device; nobody waits for the copy."""
    tensor = torch.from_numpy(np.asarray(values, dtype=dtype))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pick(logits: Tensor, ways: Ways, u: Tensor) -> Tensor:
    """A token for each row of adjusted logits (R, V), by u (R,) float64: ids (R,), -1 as in sample_rows."""
    if ways.greedy:
        best, tokens = logits.max(-1)  # the first of equals; NaN is handed on
    else:
        best = logits.amax(-1)
        tokens = torch.empty_like(best, dtype=torch.long)
    if ways.draws:
        tokens[ways.drawn] = choose(weigh(logits[ways.drawn], best[ways.drawn], ways), u[ways.drawn])
    return torch.where(best.isfinite(), tokens, -1)


def weigh(logits: Tensor, best: Tensor, ways: Ways) -> Tensor:
    """Probabilities up to a factor, as whole numbers: (D, V) int64 from logits (D, V) with highest best (D,).

    The most probable token has 2^47 for V = 32768, so that V of them can be summed: what is 10^14 times less
    probable has 0, as has what min_p, top_k or top_p leave out.
    """
    t = ways.temperature.to(logits.dtype)
    exponents = (logits / t).double().sub_((best[:, None] / t).double())
    weights = exponents.exp_().mul_(_one(logits.shape[-1])).long()
    if ways.narrows:
        least = torch.zeros_like(weights[:, :1])
        least[ways.narrowed] = _least(weights[ways.narrowed], ways.min_p, ways.top_k, ways.top_p)
        weights *= torch.ge(weights, least, out=exponents.view(torch.long))  # quicker than where() on a CPU
    return weights


def _one(V: int) -> float:
    """The weight of the most probable of V tokens: a power of two, and V times it is at most 2^62."""
    return 2.0 ** (62 - (V - 1).bit_length())


def _least(weights: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, candidates: int = CANDIDATES) -> Tensor:
    """The smallest weight (N, 1) that is kept of weights (N, V); those equal to it are kept as well.

    min_p   keeps weights of min_p times the highest and more
    top_k   keeps the k highest
    top_p   keeps, of those, the fewest highest that sum to p

    On a CPU so many `candidates` are sorted at first, and all V for the rows that turn out to need more.
    """
    V = weights.shape[-1]
    best = _highest(weights, min(candidates, V))  # (N, M)
    least = best.gather(-1, (top_k - 1).clamp(0, best.shape[-1] - 1)) * (top_k > 0)
    least = least.maximum((min_p * _one(V)).long())
    kept = best * (best >= least)
    sums = kept.cumsum(-1)
    total = torch.where(least > 0, sums[:, -1:], weights.sum(-1, keepdim=True))
    inside = sums - kept < top_p * total  # where the sum of all more probable ones falls short
    last = kept.gather(-1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0))
    cut = least.maximum(last)
    if best.shape[-1] < V:
        more = ((best[:, -1:] >= least) & (inside[:, -1:] | (least > 0)))[:, 0]  # of the rest some may be kept
        if bool(more.any()):
            cut[more] = _least(weights[more], min_p[more], top_k[more], top_p[more], V)
    return cut


def _highest(weights: Tensor, most: int) -> Tensor:
    """Weights (N, V) of each row from the highest down: (N, most) on a CPU, where numpy is quick; else (N, V)."""
    if weights.device.type != "cpu":
        return weights.sort(-1, descending=True).values
    best = np.empty((len(weights), most), dtype=np.int64)
    for row, out in zip(weights.numpy(), best, strict=True):
        if (
            2 * np.count_nonzero(row[::16]) > len(row) // 16
        ):  # among many equals sorting is quick, but not partitioning
            row = np.partition(row, len(row) - most)[len(row) - most :]
        out[:] = np.sort(row)[: -most - 1 : -1]
    return torch.from_numpy(best)


def choose(weights: Tensor, u: Tensor) -> Tensor:
    """The token at u (D,) in [0, 1) of the cumulative distribution of weights (D, V) int64: ids (D,).

    Tokens lie in the order of their ids; one of weight zero is never chosen.
    """
    sums = weights.cumsum(-1)
    total = sums[:, -1]
    target = (u * total).long().minimum(total - 1)
    chosen = torch.searchsorted(sums, target[:, None], right=True)[:, 0]
    return chosen.clamp(max=weights.shape[-1] - 1)  # past the end only where there is no distribution


def uniforms(seed: int, index: int, position: int, n: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on nothing but seed, index and place: (n,) float64.

    They choose the tokens from `position` on of completion `index`. Philox4x64 (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"), a hash of a counter under a key: the first word of each block of four.
    The upper 53 bits are used, so that every value is a float64.
    """
    words = np.random.Philox(key=seed % 2**128, counter=[position, index, 0, 0]).random_raw(4 * n)
    return (words[::4] >> np.uint64(11)) * 2.0**-53


def draw_seed() -> int:
    """A fresh seed from torch's generator, so that torch.manual_seed makes unseeded requests repeat too."""
    return int(torch.randint(2**62, ()))


class Logprob(NamedTuple):
    """A token's log-probability, its rank (1: the most probable), and the token as text if that is known."""

    logprob: float
    rank: int
    decoded_token: str | None = None


def logprobs(
    logits: Tensor, tokens: Tensor, k: int | Sequence[int], piece: Callable[[int], str] | None = None
) -> list[dict[int, Logprob]]:
    """For each row of raw logits (R, V): its token (R,) first, then the k most probable ones; -1: all.

    k is one for all rows, or one for each. Of equally probable tokens those with the lower ids come first, so
    that what a row gets does not depend on what the others ask for.
    """
    R, V = logits.shape
    each = [k] * R if isinstance(k, int) else list(k)
    each = [V if number < 0 else min(number, V) for number in each]
    table = logits.float().log_softmax(-1)  # (R, V)
    chosen = table.gather(-1, tokens[:, None])
    ranks = ((table > chosen).sum(-1) + 1).tolist()
    best = _first(table, max(each, default=0))
    values = table.gather(-1, best).tolist()
    rows = zip(each, tokens.tolist(), chosen[:, 0].tolist(), ranks, best.tolist(), values, strict=True)
    out = []
    for most, token, value, rank, ids, found in rows:
        places = {token: (value, rank)}
        listed = enumerate(zip(ids[:most], found[:most], strict=True), 1)
        places.update({t: (v, r) for r, (t, v) in listed if t != token})
        out.append({t: Logprob(v, r, piece(t) if piece else None) for t, (v, r) in places.items()})
    return out


def following_logprobs(
    project: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, k: int, piece: Callable[[int], str] | None
) -> list[dict[int, Logprob]]:
    """Log-probabilities of ids (T,) after hidden (T, D), from what `project` makes of few: (T, V) never exists."""
    out: list[dict[int, Logprob]] = []
    for h, t in zip(hidden.split(LOGPROB_ROWS), ids.split(LOGPROB_ROWS), strict=True):
        out += logprobs(project(h), t, k, piece)
    return out


def _first(table: Tensor, k: int) -> Tensor:
    """Ids (R, k) of the k highest log-probabilities (R, V), of equals the lower ids.

    The bits of floats that are not negative lie in the order of their values; with the id below them every
    number is another.
    """
    bits = (0 - table).view(torch.int32).long() << 32
    ids = torch.arange(table.shape[-1], device=table.device)
    return (bits | ids).topk(k, largest=False).values & (2**32 - 1)
