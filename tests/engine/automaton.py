"""A "model" that knows by itself whether the engine goes wrong: what it keeps in the pages is what it has read.

    tokens    a    b    c              numbers are given to beginnings, the same one to the same beginning
    k, v      1    2    3              1 = "a", 2 = "a b", 3 = "a b c"
    logits    a function of the number

Each forward reads back every position that it could see and checks that the numbers there are those of its own
beginning. So no page can be lost, mixed up, written by two, or found under a wrong key without a failure here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mistral_7b.engine.batch import PagedBatch
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.inputs import InputProcessor, RequestOptions
from mistral_7b.engine.pages import Key, PagePool, first_key, next_key
from mistral_7b.engine.request import Request
from mistral_7b.engine.speculation import Choose, DraftLength, Speculation, Speculator
from mistral_7b.model import ModelArgs
from mistral_7b.sampling.params import SamplingParams

V = 11


class Automaton(nn.Module):
    """hidden() and logits() as the engine calls them; D = 1, one layer, G = 1, K = 2. A window is 2 at least."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.args = ModelArgs(
            dim=2, n_layers=1, head_dim=2, hidden_dim=2, n_heads=1, n_kv_heads=1, vocab_size=V,
            sliding_window=window, max_seq_len=4096,
        )  # fmt: skip
        self.source = None
        self.next: dict[tuple[int, int], int] = {}
        # By number; 0 is the empty beginning.
        self.before, self.token, self.length, self.mixed = [0], [-1], [0], [1]
        self.keys: dict[int, Key] = {}  # by number
        self.table = torch.randn(101, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.rows = 0

    def number(self, before: int, token: int) -> int:
        """The number of a beginning with one token more."""
        if (before, token) not in self.next:
            self.next[before, token] = len(self.before)
            self.before.append(before)
            self.token.append(token)
            self.length.append(self.length[before] + 1)
            self.mixed.append((self.mixed[before] * 1103515245 + token + 12345) % (2**31 - 1))
        return self.next[before, token]

    def number_of(self, tokens: Sequence[int]) -> int:
        number = 0
        for token in tokens:
            number = self.number(number, token)
        return number

    def path(self, number: int, n: int) -> list[int]:
        """The numbers of the last n positions of a beginning, its own last."""
        out: list[int] = []
        while len(out) < n:
            out.append(number)
            number = self.before[number]
        return out[::-1]

    def hidden(self, tokens: Tensor, batch: PagedBatch) -> Tensor:  # (N,) -> (N, 1)
        pool, W = batch.pool, self.args.sliding_window
        positions = batch.extend(tokens)
        held = pool.layers[0][0].flatten(0, 1)[:, 0, 0]
        numbers: list[int] = []
        place = batch.place
        offsets = place.offsets.tolist()
        assert offsets[-1] == len(tokens)
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < V
        for b, (start, seen) in enumerate(zip(place.start.tolist(), place.held.tolist(), strict=True)):
            assert min(start, (W or start + 1) - 1) <= seen <= start, "something visible is gone"
            at = torch.arange(start - seen, start)
            past = held[batch.table[b, at // pool.page] * pool.page + at % pool.page].tolist()
            number = int(past[-1]) if start else 0
            assert self.length[number] == start
            assert past == self.path(number, seen), "pages hold what was not written for them"
            n = offsets[b + 1] - offsets[b]
            assert positions[offsets[b] : offsets[b + 1]].tolist() == list(range(start, start + n))
            for page in {int(batch.table[b, p // pool.page]) for p in range(start, start + n)}:
                assert pool.holders[page] == 1, "a page is written that others hold"
                assert page not in pool._key_of, "a page is written that can be found"
            for token in tokens[offsets[b] : offsets[b + 1]].tolist():
                number = self.number(number, token)
                numbers.append(number)
        k = torch.tensor(numbers, dtype=torch.float64)[:, None, None].expand(-1, 1, 2)
        for layer in batch.layers:
            layer.attend(torch.zeros_like(k), k, k)
        self.rows += len(tokens)
        return k[:, 0, :1].clone()

    def logits(self, hidden: Tensor) -> Tensor:  # (R, 1) -> (R, V)
        return torch.stack([self.logits_of(int(number)) for number in hidden[:, 0]])

    def logits_of(self, number: int) -> Tensor:
        """Mostly the token after the last one, so that text repeats itself; now and then another."""
        logits = self.table[self.mixed[number] % 101].clone()
        if self.mixed[number] % 5:
            logits[(self.token[number] + 1) % V] += 4
        return logits

    def greedy(self, prompt: Sequence[int], n: int) -> list[int]:
        """The n most probable tokens, one after another."""
        number, out = self.number_of(prompt), []
        for _ in range(n):
            out.append(int(self.logits_of(number).argmax()))
            number = self.number(number, out[-1])
        return out

    def check_keys(self, pool: PagePool) -> None:
        """AssertionError unless every page that can be found holds what its key says."""
        for page, key in pool._key_of.items():
            numbers = [int(x) for x in pool.layers[0][0][page, :, 0, 0].tolist()]
            last = numbers[-1]
            assert self.length[last] % pool.page == 0
            assert numbers == self.path(last, pool.page)
            assert key == self._key(last, pool.page), "a page is known by another's key"

    def _key(self, number: int, page: int) -> bytes:
        if number not in self.keys:
            numbers = self.path(number, page)
            before = self._key(self.before[numbers[0]], page)
            self.keys[number] = next_key(before, [self.token[n] for n in numbers])
        return self.keys[number]


class Oracle(Speculation):
    """Drafts of the automaton's own tokens, with every `wrong`th replaced."""

    def __init__(self, model: Automaton, wrong: int = 4, max_draft: int = 4) -> None:
        super().__init__(max_draft=max_draft, row_cost=0.01)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "wrong", wrong)

    def speculator(self, prompt: Sequence[int], max_length: int) -> Speculator:
        return Speculator(_OracleDrafter(self.model, self.wrong, prompt), DraftLength(self.max_draft), self.tally)


class _OracleDrafter:
    def __init__(self, model: Automaton, wrong: int, prompt: Sequence[int]) -> None:
        self.model, self.wrong, self.number, self.made = model, wrong, model.number_of(prompt), 0
        self.asked = False

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.number = self.model.number(self.number, token)
        self.asked = False

    def propose(self, n: int, choose: Choose) -> list[int]:
        assert not self.asked, "a drafter proposes again before it was told the result of its last draft"
        self.asked = True
        number, draft = self.number, []
        while len(draft) < n:
            self.made += 1
            token = choose(self.model.logits_of(number)[None], draft)
            draft.append((token + 1) % V if self.made % self.wrong == 0 else token)
            number = self.model.number(number, draft[-1])
        return draft


def engine_of(model: Automaton, n_pages: int, **config: object) -> Engine:
    """An engine over so many pages."""
    settings = EngineConfig(**config)  # type: ignore[arg-type]
    pool = PagePool(1, 1, 2, n_pages, settings.page_size, dtype=torch.float64)
    engine = Engine(model, pool, settings)  # type: ignore[arg-type]
    engine._fail_step = _raise  # type: ignore[method-assign]
    model.keys[0] = first_key(None, str(engine.adapters.loading(None)))  # of a request without salt or adapter
    return engine


def _raise(plan: object, cause: Exception) -> None:
    raise cause


def request_of(engine: Engine, prompt: Sequence[int], params: SamplingParams, **asked: object) -> Request:
    """A request that has been checked and not yet added."""
    return InputProcessor(engine, None, "there is none here").text(list(prompt), params, RequestOptions(**asked))  # type: ignore


def check(engine: Engine) -> None:
    """AssertionError unless pages are where they should be: after any step, whatever has happened."""
    engine.check()
    engine.model.check_keys(engine.pool)
    page, W, scheduler = engine.pool.page, engine.model.args.sliding_window, engine.scheduler
    for s in scheduler.running:
        assert (s.running, s.ended, s.waiting) == (True, False, False)
        assert len(s.held) <= scheduler.most_pages(len(s.request.ids) + s.completion.max_tokens)
        assert s.stop == -(-s.computed // page), "pages of rejected drafts are held"
        if W is not None:
            assert s.first == max(0, s.computed - W + 1) // page, "a page out of the window is held"
            assert len(s.held) * page <= W + engine.config.max_batch_tokens + 2 * page
    assert scheduler.running == sorted(scheduler.running, key=lambda s: s.rank)
    waiting = [s for s in scheduler.queues.all() if not s.ended]
    assert scheduler.waiting == len(waiting)
    assert not set(waiting) & set(scheduler.running)
    assert len(scheduler.running) <= engine.config.max_sequences


def run(engine: Engine, most: int = 3000) -> int:
    """Steps until nothing is left to do."""
    for n in range(most):
        if engine.idle:
            return n
        engine.step()
        check(engine)
    raise AssertionError(f"still not done after {most} steps")
