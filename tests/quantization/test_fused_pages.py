"""All blocks in one call over pages, packed, are bit-identical to single sequences over rings."""

from __future__ import annotations

import random

import pytest
import torch
from test_exactness import compiled, model_of
from tiny import tokens_of
from torch import Tensor

from mistral_7b.cache import KernelCache, KeysAndValues
from mistral_7b.kernels.attend import Place, Remembered, attend, quantize_kv
from mistral_7b.model import Mistral7B

PAGE, COLUMNS = 16, 8


class Pages(KernelCache):
    """Sequences in shuffled pages; `step` sets the number of new tokens of each."""

    def __init__(self, model: Mistral7B, sequences: int, int8: bool, fast: bool) -> None:
        args = model.args
        self.window, self.fast, self.sequences = args.sliding_window, fast, sequences
        order = random.Random(0).sample(range(sequences * COLUMNS), sequences * COLUMNS)
        self.table, self.length = torch.tensor(order).view(-1, COLUMNS), torch.zeros(sequences, dtype=torch.long)
        shape = (sequences * COLUMNS, PAGE, args.n_kv_heads, args.head_dim)
        blank = torch.full(shape, torch.nan).bfloat16()
        scale = torch.full((*shape[:-1], 1), torch.nan)
        self.layers = []
        for _ in range(args.n_layers):
            pair = [blank.clone(), blank.clone()]
            if int8:
                pair = [torch.full(shape, 77, dtype=torch.int8) for _ in range(2)] + [scale.clone(), scale.clone()]
            self.layers.append(Layer(self, tuple(pair)))

    def step(self, lengths: list[int]) -> None:
        self.start, self.offsets = self.length.clone(), torch.tensor([0, *lengths]).cumsum(0)
        self.length = self.length + torch.tensor(lengths)

    @property
    def place(self) -> Place:
        held = self.start if self.window is None else self.start.clamp(max=self.window - 1)
        return Place(self.start, held, 1, 0, self.table, PAGE, self.offsets)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.fast else torch.float32  # not the model's type: one call per block

    def writable(self) -> Pages:
        return self

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        ends = zip(self.start.tolist(), self.length.tolist(), strict=True)
        return torch.cat([torch.arange(start, end) for start, end in ends])


class Layer(KeysAndValues):
    def __init__(self, cache: Pages, entries: tuple[Tensor, ...]) -> None:
        self.cache, self.entries = cache, entries

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(self.entries) == 4:
            (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
            old = Remembered(*self.entries, self.cache.place)
            return attend(q, k, v, k_scale, v_scale, old, self.cache.window, keep=True)
        old = Remembered(*self.entries, None, None, self.cache.place)
        return attend(q, k, v, None, None, old, self.cache.window, keep=True)


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_packed_steps_over_pages_match_rings(window: int | None, int8: bool, fast: bool) -> None:
    model, prompts = model_of("int4", window), tokens_of((4, 100))
    alone = []
    for row in prompts:
        ring = model.rolling_cache(1, kv_dtype=torch.int8 if int8 else None)
        alone.append(model.hidden(row[None], ring)[0])
    cache = Pages(model, len(prompts), int8, fast)
    steps = [[70, 1, 0, 20], [1, 65, 7, 1], [1, 1, 64, 2], [28, 1, 2, 0], [0, 32, 27, 77]]
    for lengths in steps:
        cache.step(lengths)
        begins, ends = cache.start.tolist(), cache.length.tolist()
        packed = torch.cat([prompts[b, s:e] for b, (s, e) in enumerate(zip(begins, ends, strict=True))])
        out = model.hidden(packed, cache)
        wanted = torch.cat([alone[b][s:e] for b, (s, e) in enumerate(zip(begins, ends, strict=True))])
        assert torch.equal(out, wanted), lengths
    assert cache.length.tolist() == [100] * 4
