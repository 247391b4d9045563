"""Decode on a GPU as one captured graph: a step's kernels are launched together, its token is chosen inside.

    token (B, 1) --model over a static ring--> logits (B, V) --pick--> token (B, 1), out[step]

One step is captured once (kernels/gpu/graph.py) and replayed CHUNK times, on buffers that stay in place; then
CHUNK tokens of every row are read back, and whatever ended a completion is found on the host, which drops the
tokens after it. Random numbers are a function of seed, completion and place (sampling.uniforms), so the host sets
them out beforehand.

Without CUDA the same step runs uncaptured, which is how it is tested: it was never yet replayed on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .cache import RollingCache
from .completion import Completion
from .kernels.backend import STEP, Backend, uses
from .kernels.gpu.graph import WARM_UP, Recorder
from .model import Mistral7B
from .sampling import SamplingParams, pick, ways_of

CHUNK = 16  # steps between two looks at the tokens: at most so many are computed for nothing, per completion


def supports(model: Mistral7B, rows: Sequence[Completion]) -> bool:
    """Whether these completions can be decoded so: on CUDA, long enough to pay for a capture.

    What looks at a row's own tokens (penalties), bans some, or wants log-probabilities decodes step by step.
    """
    plain = all(_plain(c.params) for c in rows)
    return (
        uses(Backend.CUDA_GRAPH, STEP, model.norm.weight) and plain and max(c.max_tokens for c in rows) > 2 * CHUNK
    )


def _plain(p: SamplingParams) -> bool:
    return not p.penalizes and not p.logit_bias and p.logprobs is None and p.min_tokens <= 1


class CapturedDecode:
    """Further tokens of completions that each have one already, in the rows of a ring, one graph at a time.

    `cache` is static and holds every prompt, and every token but the newest. `need` is the most tokens that a
    row will hold. Rows that are no longer wanted go on in vain until half are; then the ring is closed up and
    the step captured anew, as when the ring has to grow.
    """

    def __init__(self, model: Mistral7B, cache: RollingCache, rows: Sequence[Completion], need: int) -> None:
        assert cache.static, "a graph asks nothing of the host"
        self.model, self.cache, self.need = model, cache, need
        self.rows = list(rows)  # of the cache
        self.wanted = list(range(len(self.rows)))  # rows whose tokens are still asked for
        self.ready: list[list[int]] = []  # steps that were computed and not yet asked for: (B,) each
        self.graph: torch.cuda.CUDAGraph | None = None
        self._allocate()

    def next(self) -> list[int]:
        """The next token of every wanted row; -1 where the logits were not finite."""
        if not self.ready:
            self._run()
        step = self.ready.pop(0)
        return [step[row] for row in self.wanted]

    def keep(self, places: Sequence[int]) -> None:
        """From now on only these of the rows that `next` last gave tokens for, in this order."""
        self.wanted = [self.wanted[place] for place in places]

    def _run(self) -> None:
        """Up to CHUNK steps, and their tokens back."""
        self._make_room()
        rows = [self.rows[row] for row in self.wanted]
        steps = min(CHUNK, max(c.max_tokens - len(c.token_ids) for c in rows))
        u = torch.zeros(CHUNK, len(self.rows), dtype=torch.float64)
        for row, c in zip(self.wanted, rows, strict=True):
            u[:steps, row] = torch.tensor([c.u(ahead) for ahead in range(steps)], dtype=torch.float64)
        self.u.copy_(u)
        self.at.zero_()
        if self.graph is None and uses(Backend.CUDA_GRAPH, STEP, self.model.norm.weight):
            self._capture()
        for _ in range(steps):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
        self.ready = self.out[:steps].tolist()

    def _make_room(self) -> None:
        """Close the ring up where that pays, and give it more slots before they are needed."""
        held = max(len(self.rows[row].prompt) + len(self.rows[row].token_ids) for row in self.wanted) - 1
        widest = min(self.need, self.model.args.sliding_window or self.need)
        grow = min(held + CHUNK, widest) > self.cache.slots
        if not grow and 2 * len(self.wanted) > len(self.rows):
            return
        for target, source in enumerate(sorted(self.wanted)):  # rows in vain may have gone too far for it to grow
            if source != target:
                self.cache.copy_row(source, target)
        order = sorted(self.wanted)
        self.wanted = [order.index(row) for row in self.wanted]
        self.rows = [self.rows[row] for row in order]
        self.cache = self.cache.rows(0, len(self.rows))
        if grow:
            self.cache.enlarge(min(max(2 * self.cache.slots, held + CHUNK), widest))
        self._allocate()

    def _allocate(self) -> None:
        """Buffers at which the graph will look, with every row's newest token; what was captured is void."""
        self.graph = None
        B, device = len(self.rows), self.cache.positions.device
        self.token = torch.tensor([[c.token_ids[-1]] for c in self.rows], device=device)  # (B, 1)
        self.out = torch.zeros(CHUNK, B, dtype=torch.long, device=device)
        self.u = torch.zeros(CHUNK, B, dtype=torch.float64, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # which step of the chunk
        self.ways = ways_of([c.params for c in self.rows], self.model.args.vocab_size, device)

    def _step(self) -> None:
        """One token for every row, from buffers to buffers: nothing here may ask the device for a value."""
        logits = self.model.logits(self.model.hidden(self.token, self.cache)[:, -1])  # (B, V)
        token = pick(logits, self.ways, self.u.index_select(0, self.at)[0])
        self.out.index_copy_(0, self.at, token[None])
        self.token.copy_(token[:, None].clamp(min=0))
        self.at.add_(1)

    def _rehearse(self) -> None:
        """Run a step several times, and put everything back each time.

        A step writes the slot of the newest token, which the real one will write again. A second step without
        going back would overwrite a key that is still in sight.
        """
        state = (self.token, self.at, self.out, self.cache.length, self.cache.end, self.cache.positions)
        before = [t.clone() for t in state]
        for _ in range(WARM_UP):
            self._step()
            for t, was in zip(state, before, strict=True):
                t.copy_(was)

    def _capture(self) -> None:
        self.graph = Recorder(self.token.device)(self._step, self._rehearse)
