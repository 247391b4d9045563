"""A trace of both caches at work: the engine's KV pages, and the slots of a rolling cache, step by step.

Nothing is simulated. Two requests with the same prompt run through an engine, the second when the first has half
of its tokens; after each step the block tables, reference counts and prefix cache are read. Then the first
request's tokens are fed to a RollingCache, whose slots are read after each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...engine.config import EngineConfig
from ...engine.engine import Engine
from ...engine.inputs import InputProcessor, RequestOptions
from ...engine.pages import PagePool
from ...engine.request import Request, SequenceState
from ...engine.window import most_pages
from ...errors import InterpretError
from ...model import Mistral7B
from ...sampling.params import SamplingParams
from ...text.tokenizer import Tokenizer
from .page import Picture
from .prompts import Prompt, encode, pieces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = 16  # tokens of a page, the engine's default
BATCH_TOKENS = 64  # of one step: a longer prompt takes several
LONGEST = 4096  # tokens of prompt and completion
NAMES = "AB"  # the two requests


@dataclass(frozen=True)
class PageState:
    """A page after a step: who holds it, which of their pages it is, how many tokens of it are computed.

    Held by nobody, it is idle if the prefix cache knows its contents, with their number there, else free.
    """

    holders: str  # of NAMES
    number: int | None  # its positions begin at number * PAGE; None: free
    used: int


@dataclass(frozen=True)
class Step:
    """What a step fed and did: tokens by request, events in words, the pages after it."""

    fed: dict[str, int]
    events: Sequence[str]
    pages: Sequence[PageState]


@dataclass(frozen=True)
class CacheTrace(Picture):
    """A real run of the engine and of a ring, made by `cache_trace`.

    `ring` has a row for each call: its number of tokens, and the slots that it wrote with their positions.
    """

    view = "cache"
    title = "KV cache"
    figsize = (10.0, 8.0)

    tokens: Sequence[str]  # of the first request, the completion included
    prompt: int  # how many of them are the prompt
    window: int | None
    slots: int
    steps: Sequence[Step] = field(repr=False)
    ring: Sequence[tuple[int, Sequence[tuple[int, int]]]] = field(repr=False)

    def data(self) -> dict[str, Any]:
        seen = "every earlier token" if self.window is None else f"the last {self.window} tokens"
        return {
            "about": f"Recorded from a run. Requests A and B have the same prompt of {self.prompt} tokens; B "
            f"arrives when A has half of its tokens. A page holds {PAGE} tokens of all layers, and a token "
            f"sees {seen}.",
            "tokens": list(self.tokens),
            "prompt": self.prompt,
            "window": self.window,
            "page": PAGE,
            "slots": self.slots,
            "steps": [
                {
                    "fed": step.fed,
                    "events": list(step.events),
                    "pages": [[p.holders, p.number, p.used] for p in step.pages],
                }
                for step in self.steps
            ],
            "ring": [[n, [list(pair) for pair in wrote]] for n, wrote in self.ring],
        }

    def draw(self, figure: Figure) -> None:
        """Above, pages by step: held by A, by B, shared, idle, free. Below, the position in each slot by call."""
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        top, bottom = figure.subplots(2)
        kinds = ["free", "idle", "A", "B", "AB"]
        colors = ["#f4f1ec", "#bdb6ab", "#0072b2", "#e69f00", "#009e73"]
        table = [
            [
                kinds.index(s.pages[p].holders or ("free" if s.pages[p].number is None else "idle"))
                for s in self.steps
            ]
            for p in range(len(self.steps[0].pages))
        ]
        grid = {"aspect": "auto", "interpolation": "nearest"}
        top.imshow(table, cmap=ListedColormap(colors), vmin=-0.5, vmax=4.5, **grid)
        names = ["free", "idle, in the prefix cache", "A", "B", "shared by A and B"]
        patches = [Patch(color=c, label=n) for c, n in zip(colors, names, strict=True)]
        top.legend(
            handles=patches, fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False
        )
        top.set(title=f"Pages of {PAGE} tokens in the engine, after each step", xlabel="step", ylabel="page")
        held = torch.full((len(self.ring), self.slots), float("nan"))
        for n, (_, wrote) in enumerate(self.ring):
            if n:
                held[n] = held[n - 1]
            for slot, position in wrote:
                held[n, slot] = position
        image = bottom.imshow(held.T, cmap="cividis", **grid)
        figure.colorbar(image, ax=bottom, label="position held", shrink=0.8)
        bottom.set(title=f"A ring of {self.slots} slots, after each call", xlabel="call", ylabel="slot")


def cache_trace(model: Mistral7B, tokenizer: Tokenizer, prompt: Prompt, *, max_tokens: int = 32) -> CacheTrace:
    """Run a prompt twice through an engine and once through a ring, and record both caches at every step.

    Each completion has `max_tokens`, the most probable ones. InterpretError for an empty or too long prompt.
    """
    ids = encode(model, tokenizer, prompt)
    longest = len(ids) + max_tokens
    if longest > LONGEST or max_tokens < 2:
        raise InterpretError(
            f"{len(ids)} tokens and {max_tokens} more: a trace has at most {LONGEST}, at least 2 of them new",
            field="prompt" if max_tokens > 1 else "max_tokens",
        )
    config = EngineConfig(max_sequences=2, max_batch_tokens=BATCH_TOKENS, page_size=PAGE)
    args, weight = model.args, model.norm.weight
    pages = 2 * most_pages(longest, args.sliding_window, config) + 4
    pool = PagePool(
        args.n_layers, args.n_kv_heads, args.head_dim, pages, PAGE, dtype=weight.dtype, device=weight.device
    )
    inputs = InputProcessor(Engine(model, pool, config), tokenizer)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    requests = [inputs.text(ids, params, RequestOptions(request_id=name)) for name in NAMES]
    run = _Run(inputs.engine, requests)
    steps = list(run.steps(max_tokens // 2))
    if failed := next((r.error for r in requests if r.error is not None), None):
        raise failed
    tokens = [*ids, *requests[0].completions[0].token_ids]
    slots, ring = ring_trace(model, tokens[:-1], len(ids))
    return CacheTrace(pieces(tokenizer, tokens), len(ids), args.sliding_window, slots, steps, ring)


class _Before(NamedTuple):
    """A sequence before a step."""

    computed: int
    first: int
    running: bool
    cached: int | None


class _Run:
    """Steps an engine and reads its caches after each step."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine, self.requests = engine, requests
        self.sequences: list[SequenceState] = [r.sequences[0] for r in requests]  # a finished request has none

    def steps(self, head_start: int) -> list[Step]:
        """All steps until both requests have ended; the second is added when the first has `head_start` tokens."""
        first, second = self.requests
        self.engine.add(first)
        added, out = False, []
        while not (first.finished and second.finished):
            if not added and (first.finished or len(first.completions[0].token_ids) >= head_start):
                self.engine.add(second)
                added = True
            before = [_Before(s.computed, s.first, s.running, s.request.cached) for s in self.sequences]
            total = self.engine.counts.computed_tokens
            self.engine.step()
            out.append(self._step(before, self.engine.counts.computed_tokens - total))
        return out

    def _step(self, before: list[_Before], total: int) -> Step:
        """The step that has fed `total` tokens."""
        fed, events, ended = {}, [], ""
        for name, s, old in zip(NAMES, self.sequences, before, strict=True):
            computed = old.computed
            if old.cached is None and s.request.cached is not None:
                computed = s.request.cached
                hit = f"prefix hit, {computed} tokens are not computed" if computed else "no cached prefix"
                events.append(f"{name} starts: {hit}")
            if s.ended and old.running:
                ended = name  # its state is cleared: it fed what the other one did not
                events.append(f"{name} ends, and its pages are freed")
            elif s.computed > computed:
                fed[name] = s.computed - computed
            if s.first > old.first and old.running:
                gone = f"page {old.first}" if s.first == old.first + 1 else f"pages {old.first} to {s.first - 1}"
                events.append(f"{name}: its {gone} left the window, and the memory is freed")
        if ended:
            fed[ended] = total - sum(fed.values())
        return Step(fed, events, self._pages())

    def _pages(self) -> list[PageState]:
        pool = self.engine.pool
        numbers: dict[int, int] = {}  # of pages that the prefix cache knows
        holders: dict[int, str] = {}
        used: dict[int, int] = {}
        for s in self.sequences:
            for i, key in enumerate(s.keys):
                if (page := pool.find(key)) is not None:
                    numbers[page], used[page] = i, PAGE
        for name, s in zip(NAMES, self.sequences, strict=True):
            for i in range(s.first, s.stop):
                page = int(s.pages[i])
                holders[page], numbers[page] = holders.get(page, "") + name, i
                used[page] = min(PAGE, max(0, s.computed - i * PAGE))
        return [PageState(holders.get(p, ""), numbers.get(p), used.get(p, 0)) for p in range(pool.n_pages)]


@torch.inference_mode()
def ring_trace(
    model: Mistral7B, ids: Sequence[int], prompt: int
) -> tuple[int, list[tuple[int, list[tuple[int, int]]]]]:
    """The number of slots of a RollingCache, and of each call its tokens and the (slot, position) it wrote."""
    tokens = torch.tensor([list(ids)], device=model.norm.weight.device)
    cache = model.rolling_cache(max_seq_len=len(ids))
    before = cache.positions[0].tolist()
    out = []
    for call in tokens.split([prompt, *[1] * (len(ids) - prompt)], 1):
        model.hidden(call, cache)
        after = cache.positions[0].tolist()
        out.append(
            (
                call.shape[1],
                [(slot, p) for slot, (p, old) in enumerate(zip(after, before, strict=True)) if p != old],
            )
        )
        before = after
    return cache.slots, out
