"""What a cache promises beyond right logits: values, places, flat memory, rollback, refusals."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from tiny import TINY, close, tiny_args, tiny_model, tokens_of, truth
from torch import Tensor

from mistral_7b.cache import Cache, GrowingCache, RollingCache, Stateless
from mistral_7b.cache.rolling import EMPTY
from mistral_7b.errors import CacheError
from mistral_7b.kernels.attend import quantize_kv
from mistral_7b.model import Mistral7B

W = 8


@pytest.fixture(scope="module")
def model() -> Mistral7B:
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def unwindowed() -> Mistral7B:
    return tiny_model(tiny_args(sliding_window=None), torch.float64)


def tensors_of(cache: object) -> list[Tensor]:
    """All tensors that a cache and its layers hold on to."""
    found = [t for t in vars(cache).values() if isinstance(t, Tensor)]
    for memory in getattr(cache, "layers"):  # noqa: B009
        found += [t for t in vars(memory).values() if isinstance(t, Tensor)]
    return found


def bytes_of(cache: object) -> int:
    """Bytes of the storages behind a cache: a view counts with all that it keeps alive."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(cache)}.values())


def greedy(model: Mistral7B, prompt: Tensor, cache: object, steps: int) -> list[int]:
    logits, cache = model(prompt, cache)  # type: ignore[arg-type]
    out = []
    for _ in range(steps):
        out.append(int(logits[0, -1].argmax()))
        logits, cache = model(torch.tensor([[out[-1]]]), cache)
    return out


# --- GrowingCache: a value ---


@pytest.mark.parametrize("prefix", [3, W, 2 * W + 3])
@pytest.mark.parametrize("packed", [False, True])
def test_one_prefix_is_continued_twice(model: Mistral7B, prefix: int, packed: bool) -> None:
    one, two = tokens_of((prefix + 5,)), tokens_of((prefix + 5,), seed=2)
    two[:prefix] = one[:prefix]
    ids = torch.arange(prefix + 5) % 2 if packed else None

    def part(tokens: Tensor, piece: slice, cache: object = None) -> tuple[Tensor, object]:
        return model(tokens[piece], cache, None if ids is None else ids[piece])  # type: ignore[arg-type]

    _, cache = part(one, slice(0, prefix))
    before = [t.clone() for t in tensors_of(cache)]
    for tokens in (one, two, one):
        wanted = truth(model, tokens, ids)[prefix:]
        first, later = part(tokens, slice(prefix, prefix + 2), cache)
        second, _ = part(tokens, slice(prefix + 2, None), later)
        close(torch.cat([first, second]), wanted)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(cache), strict=True))


def test_a_growing_cache_is_flat_past_the_window(model: Mistral7B) -> None:
    _, cache = model(tokens_of((1, 20 * W)))
    assert cache.layers[0].k.shape == (1, W, TINY.n_kv_heads, TINY.head_dim)
    a_window = W * (2 * 2 * TINY.n_kv_heads * TINY.head_dim * 8 + 8)  # k and v of two layers, and positions
    assert bytes_of(cache) <= 21 * W * 8 + a_window  # the long prompt is not kept alive by a view
    sizes = set()
    for token in tokens_of((3 * W,)):
        _, cache = model(token[None, None], cache)
        sizes.add(bytes_of(cache))
    assert len(sizes) == 1
    assert cache.length == 23 * W


def test_a_packed_growing_cache_keeps_no_more_than_a_window_of_each_sequence(model: Mistral7B) -> None:
    cache = None
    for step in range(10):
        ids = torch.tensor([1, 2, 1, 2, 1, 3, 3]) if step else torch.tensor([1, 2, 1, 2, 1, 3, 9])
        _, cache = model(tokens_of((7,), seed=step), cache, ids)
    assert cache is not None
    kept = {int(i): int((cache.sequence_ids == i).sum()) for i in cache.sequence_ids.unique()}
    assert kept == {1: W, 2: W, 3: W, 9: 1}
    assert cache.layers[0].k.shape[0] == 3 * W + 1


def test_without_a_window_a_growing_cache_keeps_everything(unwindowed: Mistral7B) -> None:
    _, cache = unwindowed(tokens_of((1, 5 * W)))
    assert cache.layers[1].v.shape[1] == 5 * W


@pytest.mark.parametrize("n", [0, 1, 4])
def test_a_growing_cache_is_rolled_back(unwindowed: Mistral7B, model: Mistral7B, n: int) -> None:
    for m, length in ((unwindowed, 3 * W), (model, W)):
        tokens = tokens_of((1, length + 6))
        wanted = truth(m, tokens)
        junk = torch.cat([tokens[:, : length - n], tokens_of((1, n), seed=9)], dim=1) if n else tokens[:, :length]
        _, cache = m(junk)
        cache.rollback(n)
        close(m(tokens[:, length - n :], cache)[0], wanted[:, length - n :])


def test_a_growing_cache_is_not_rolled_back_past_what_it_holds(model: Mistral7B) -> None:
    _, cache = model(tokens_of((1, W)))
    for n in (-1, W + 1):
        with refused(CacheError, field="n"):
            cache.rollback(n)
    _, wrapped = model(tokens_of((1, 2 * W + 3)))
    with refused(CacheError, field="n"):
        wrapped.rollback(1)
    wrapped.rollback(0)
    with refused(CacheError, field="n"):
        GrowingCache(2, W).rollback(1)
    _, packed = model(tokens_of((3,)), None, torch.tensor([1, 1, 2]))
    with refused(CacheError, field="n"):
        packed.rollback(1)


# --- RollingCache: a place ---


@pytest.mark.parametrize("chunks", [[1] * 23, [3, 1, 1], [5, 6], [8, 1], [9, 1, 2], [30, 1, 1], [2, 17, 1, 3]])
@pytest.mark.parametrize("static", [False, True])
def test_trap_04_each_position_lies_in_its_slot(chunks: list[int], static: bool) -> None:
    """Positions are stored as keys, and every slot is looked at after every chunk."""
    ring = RollingCache(1, 1, 2, W, dtype=torch.float64, static=static)
    n = 0
    for T in chunks:
        p = ring.extend(torch.zeros(1, T, dtype=torch.long))
        assert p.tolist() == [list(range(n, n + T))]
        assert len(ring.step.new.slot[0].unique()) == len(
            ring.step.new.slot[0]
        )  # two writes to a slot: either may win on a GPU
        k = p.double()[..., None, None].expand(1, T, 1, 2)
        ring.layers[0].attend(torch.zeros(1, T, 2, 2, dtype=torch.float64), k, 100 + k)
        n += T
        wanted = [max((p for p in range(n) if p % W == slot), default=EMPTY) for slot in range(W)]
        assert ring.positions[0].tolist() == wanted
        assert ring.length.tolist() == [n]
        full = [slot for slot in range(W) if wanted[slot] != EMPTY]
        assert ring.layers[0].k[0, full, 0, 0].tolist() == [wanted[slot] for slot in full]
        assert ring.layers[0].v[0, full, 0, 1].tolist() == [100 + wanted[slot] for slot in full]


def test_trap_04_a_slot_that_is_empty_is_never_seen(model: Mistral7B) -> None:
    """Poison in slots that were never written must not reach the logits."""
    for static in (False, True):
        ring = model.rolling_cache(static=static)
        for memory in ring.layers:
            memory.k.fill_(1e3)
            memory.v.fill_(1e3)
        tokens = tokens_of((1, 6))
        got = torch.cat([model(tokens[:, :4], ring)[0], model(tokens[:, 4:5], ring)[0]], dim=1)
        close(got, truth(model, tokens)[:, :5])
        close(model(tokens[:, 5:], ring)[0], truth(model, tokens)[:, 5:])


@pytest.mark.parametrize("prompt", [3, W, W + 1, 2 * W + 3])
def test_trap_05_warm_is_cold_greedy_after_the_wrap(model: Mistral7B, prompt: int) -> None:
    tokens = tokens_of((1, prompt))
    cold: list[int] = []
    for _ in range(3 * W):  # no cache: the whole text every time
        text = torch.cat([tokens, torch.tensor([cold], dtype=torch.long)], dim=1)
        cold.append(int(model(text, Stateless(W))[0][0, -1].argmax()))
    assert greedy(model, tokens, model.rolling_cache(), 3 * W) == cold
    assert greedy(model, tokens, model.rolling_cache(static=True), 3 * W) == cold
    assert greedy(model, tokens, None, 3 * W) == cold


@pytest.mark.parametrize(("length", "n"), [(W, 1), (W, 5), (6, 6), (5, 0)])
def test_trap_05_a_ring_is_rolled_back_before_the_wrap(model: Mistral7B, length: int, n: int) -> None:
    tokens = tokens_of((2, length + 2 * W))
    ring = model.rolling_cache(2)
    kept = length - n
    model(torch.cat([tokens[:, :kept], tokens_of((2, n), seed=9)], dim=1), ring)
    ring.rollback(n)
    assert ring.length.tolist() == [kept, kept]
    assert int((ring.positions != EMPTY).sum()) == 2 * kept
    got = [model(tokens[:, i : i + 1], ring)[0] for i in range(kept, length + 2 * W)]
    close(torch.cat(got, dim=1), truth(model, tokens)[:, kept:])


def test_trap_05_an_impossible_rollback_of_a_ring_is_refused(model: Mistral7B, unwindowed: Mistral7B) -> None:
    ring = model.rolling_cache()
    model(tokens_of((1, W)), ring)
    for n in (-1, W + 1):
        with refused(CacheError, field="n"):
            ring.rollback(n)
    model(tokens_of((1, W)), ring)
    with refused(CacheError, field="n"):
        ring.rollback(1)
    ring.rollback(0)
    ragged = unwindowed.rolling_cache(2)
    unwindowed(tokens_of((1, 5)), ragged.rows(0, 1))
    unwindowed(tokens_of((1, 2)), ragged.rows(1, 2))
    with refused(CacheError, field="n"):
        ragged.rollback(3)
    assert ragged.length.tolist() == [5, 2]  # refused, and nothing changed


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("window", [1, 3, W])
@pytest.mark.parametrize("slack", [1, 4, 11])
def test_trap_05_a_ring_with_slack_is_rolled_back_after_the_wrap(window: int, slack: int, static: bool) -> None:
    """Junk of every length up to the slack is written and taken back, in chunks of it, all the way round."""
    model = tiny_model(tiny_args(sliding_window=window), torch.float64)
    length = 3 * (window + slack) + 2
    tokens = tokens_of((2, length))
    wanted = truth(model, tokens)
    for n in sorted({1, slack // 2, slack} - {0}):
        for begin in (1, window, window + slack, 2 * (window + slack) + 1):
            ring = model.rolling_cache(2, static=static, slack=slack)
            assert ring.slots == window + slack
            got, at = [model(tokens[:, :begin], ring)[0]], begin
            while at < length:
                right = min(1 + at % 2, length - at)  # tokens that stay, before n that do not
                fed = torch.cat([tokens[:, at : at + right], tokens_of((2, n), seed=at)], dim=1)
                parts = fed.split(1 + at % 3, dim=1) if at % 5 == 0 else [fed]
                got.append(torch.cat([model(part, ring)[0] for part in parts], dim=1)[:, :right])
                ring.rollback(n // 2)
                ring.rollback(n - n // 2)
                at += right
                assert ring.length.tolist() == [at, at]
            close(torch.cat(got, dim=1), wanted)


def test_trap_05_rows_are_rolled_back_by_themselves(model: Mistral7B) -> None:
    slack, step = 4, 0
    rows = [tokens_of((90,), seed=i) for i in range(3)]
    wanted = [truth(model, row) for row in rows]
    ring = model.rolling_cache(3, slack=slack)
    at = [3, W, 2 * W + 5]
    for i, n in enumerate(at):
        model(rows[i][None, :n], ring.rows(i, i + 1))
    while max(at) < 80:
        step += 1
        fed = tokens_of((3, slack + 1), seed=100 + step)
        right = [1 + (step + i) % (slack + 1) for i in range(3)]  # how many of each row's tokens are its own
        for i in range(3):
            fed[i, : right[i]] = rows[i][at[i] : at[i] + right[i]]
        logits, _ = model(fed, ring)
        for i in range(3):
            close(logits[i, : right[i]], wanted[i][at[i] : at[i] + right[i]])
            at[i] += right[i]
        ring.rollback(torch.tensor([slack + 1 - n for n in right]))
        assert ring.length.tolist() == at
    with refused(CacheError, field="n"):
        ring.rollback(torch.tensor([0, 5, 0]))
    assert ring.length.tolist() == at  # refused, and nothing changed
    spent = slack - (slack + 1 - right[2])  # what row 2 may still take back
    with refused(CacheError, field="n"):
        ring.rollback(torch.tensor([0, 0, spent + 1]))
    ring.rollback(torch.tensor([0, 0, spent]))


def test_trap_05_slack_counts_from_the_furthest_that_a_row_has_been(model: Mistral7B) -> None:
    ring = model.rolling_cache(slack=3)
    model(tokens_of((1, 3 * W)), ring)
    ring.rollback(2)
    with refused(CacheError, field="n"):
        ring.rollback(2)  # four back from the furthest
    ring.rollback(1)
    for _ in range(3):  # back to where it was: nothing more has been overwritten, nothing less
        model(tokens_of((1, 1)), ring)
    ring.rollback(3)
    model(tokens_of((1, 4)), ring)
    with refused(CacheError, field="n"):
        ring.rollback(4)
    with refused(CacheError, field="slack"):
        model.rolling_cache(slack=-1)


def test_a_ring_with_slack_is_filled(model: Mistral7B, unwindowed: Mistral7B) -> None:
    tokens = tokens_of((1, 3 * W))
    wanted = truth(model, tokens)
    ring = model.rolling_cache(max_seq_len=3, slack=2)
    model(tokens[:, :3], ring)
    model(tokens_of((1, 2)), ring)
    with refused(CacheError, field="tokens"):
        model(tokens[:, :1], ring)
    ring = model.rolling_cache(slack=2)
    model(tokens[:, :3], ring)
    for i in range(3, 3 * W):
        close(model(tokens[:, i : i + 1], ring)[0], wanted[:, i : i + 1])
    full = unwindowed.rolling_cache(max_seq_len=6, slack=2)
    unwindowed(tokens[:, :6], full)
    unwindowed(tokens_of((1, 2)), full)
    full.rollback(5)  # more than its slack: without a window nothing is overwritten
    close(unwindowed(tokens[:, 3:6], full)[0], truth(unwindowed, tokens[:, :6])[:, 3:])


@pytest.mark.parametrize("gradients", [False, True])
def test_a_ring_is_flat_for_three_windows_of_decode(gradients: bool) -> None:
    """The same places in memory throughout, and no autograd graph of the steps behind them."""
    model = tiny_model().requires_grad_(gradients)
    ring = model.rolling_cache()
    lasting = [ring.positions, ring.length, *(t for m in ring.layers for t in (m.k, m.v))]
    places = [(t.data_ptr(), t.untyped_storage().nbytes()) for t in lasting]
    for tokens in (tokens_of((1, 2 * W + 3)), *tokens_of((3 * W, 1, 1))):
        model(tokens, ring)
        assert not any(t.requires_grad for t in tensors_of(ring))
        assert bytes_of(ring) - sum(size for _, size in places) <= 8 * 8 * W  # this forward's slot numbers
    lasting = [ring.positions, ring.length, *(t for m in ring.layers for t in (m.k, m.v))]
    assert [(t.data_ptr(), t.untyped_storage().nbytes()) for t in lasting] == places


def test_rows_are_the_same_memory(model: Mistral7B) -> None:
    ring = model.rolling_cache(3)
    model(tokens_of((1, 4)), ring.rows(1, 2))
    assert ring.length.tolist() == [0, 4, 0]
    assert ring.positions[1, :4].tolist() == [0, 1, 2, 3]
    assert ring.layers[0].k[1, :4].abs().min() > 0
    assert ring.layers[0].k[[0, 2]].abs().max() == 0


# --- keys and values in int8 ---

# Of 400 seeds that whose keys and values keep furthest from ties, 5e-4 of a step: rounded alike on any machine.
INT8_TOKENS = tokens_of((2, 23), seed=188)


def int8_cache(model: Mistral7B, kind: str, batch: int = 2) -> Cache:
    if kind == "growing":
        return GrowingCache(model.args.n_layers, model.args.sliding_window, torch.int8)
    return model.rolling_cache(batch, 64, static=kind == "static", kv_dtype=torch.int8)


def fed(model: Mistral7B, tokens: Tensor, cache: Cache, chunks: list[int]) -> Tensor:
    """Logits (B, T, V) of tokens that come in chunks; what is left over comes one by one."""
    chunks = chunks + [1] * (tokens.shape[1] - sum(chunks))
    out = []
    for part in tokens.split(chunks, dim=1):
        logits, cache = model(part, cache)
        out.append(logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("kind", ["growing", "rolling", "static"])
@pytest.mark.parametrize("window", [W, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_keys_are_the_same_in_chunks_of_any_size(kind: str, window: int | None, dtype: torch.dtype) -> None:
    model = tiny_model(tiny_args(sliding_window=window), dtype)
    uncut = fed(model, INT8_TOKENS, int8_cache(model, kind), [23])
    for chunks in ([], [5, 6], [W, 1, 7], [W + 1, 2], [2, 17, 1, 3], [3, 20]):
        close(fed(model, INT8_TOKENS, int8_cache(model, kind), chunks), uncut.double())


@pytest.mark.parametrize("kind", ["growing", "rolling", "static"])
@pytest.mark.parametrize("window", [W, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_keys_cost_little_and_not_nothing(kind: str, window: int | None, dtype: torch.dtype) -> None:
    model = tiny_model(tiny_args(sliding_window=window), dtype)
    distance = (fed(model, INT8_TOKENS, int8_cache(model, kind), [7]) - truth(model, INT8_TOKENS)).abs()
    assert distance[:, 0].mean() > 1e-4  # even a lone first token attends to itself as it will be remembered
    assert distance.mean() < 0.02  # of logits whose size is 1
    assert distance.max() < 0.2


def test_int8_rows_out_of_step_are_those_alone(model: Mistral7B) -> None:
    ring = model.rolling_cache(2, kv_dtype=torch.int8)
    starts = [3, W + 3]
    for i, n in enumerate(starts):
        model(INT8_TOKENS[i : i + 1, :n], ring.rows(i, i + 1))
    part = torch.stack([INT8_TOKENS[i, n : n + 5] for i, n in enumerate(starts)])
    together = model(part, ring)[0]
    for i, n in enumerate(starts):
        close(together[i], fed(model, INT8_TOKENS[i : i + 1], int8_cache(model, "rolling", 1), [23])[0, n : n + 5])


def keys_of(rows: int) -> Tensor:
    """Keys (rows, 60, 3, 10), no two positions or heads of which have one scale."""
    draw = torch.Generator().manual_seed(4)
    size = 1 + torch.arange(rows * 60 * 3, dtype=torch.float64).reshape(rows, 60, 3, 1)
    return size * torch.randn(rows, 60, 3, 10, dtype=torch.float64, generator=draw)


def remember(cache: GrowingCache | RollingCache, keys: Tensor) -> None:
    """Give the first layer of a cache keys (B, T, G, K), and their negatives as values."""
    cache.extend(torch.zeros(keys.shape[:2], dtype=torch.long))
    cache.layers[0].attend(torch.zeros(*keys.shape[:2], 6, 10, dtype=keys.dtype), keys, -keys)


def check_held(ring: RollingCache, wanted: list[Tensor]) -> None:
    """Whether each row holds the last of these keys (T, G, K), each code and each scale in its slot."""
    k, v, k_scale, v_scale = ring.layers[0].entries
    for row, keys in enumerate(wanted):
        first = max(0, len(keys) - ring.slots)
        assert sorted(p for p in ring.positions[row].tolist() if p != EMPTY) == list(range(first, len(keys)))
        for p in range(first, len(keys)):
            slot = p % ring.slots
            codes, scale = quantize_kv(keys[p])
            assert torch.equal(k[row, slot], codes)
            assert torch.equal(v[row, slot], -codes)
            assert torch.equal(k_scale[row, slot], scale)
            assert torch.equal(v_scale[row, slot], scale)
            assert ((k[row, slot] * k_scale[row, slot] - keys[p]).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("static", [False, True])
def test_an_int8_ring_keeps_scales_with_their_codes(static: bool) -> None:
    """Through rows, the wrap and rollback."""
    keys = keys_of(4)
    ring = RollingCache(
        1, 3, 10, W, batch=3, dtype=torch.float64, static=static, slack=2, kv_dtype=torch.int8
    )  # fmt: skip
    for row, n in enumerate((4, 2, 6)):
        remember(ring.rows(row, row + 1), keys[row : row + 1, :n])
    check_held(ring, [keys[0, :4], keys[1, :2], keys[2, :6]])
    for row, n in enumerate((4, 2, 6)):  # the third goes round
        remember(ring.rows(row, row + 1), keys[row : row + 1, n : n + 5])
    check_held(ring, [keys[0, :9], keys[1, :7], keys[2, :11]])
    remember(ring, keys[[3, 3, 3], :2])
    ring.rollback(torch.tensor([2, 1, 2]))
    one_kept = torch.cat([keys[1, :7], keys[3, :1]])
    assert ring.length.tolist() == [9, 8, 11]
    check_held(ring.rows(1, 2), [one_kept])
    two_back = keys[2, :11]
    remember(ring.rows(2, 3), keys[3:, 20:40])  # longer than the ring, and no other row's
    check_held(ring.rows(1, 3), [one_kept, torch.cat([two_back, keys[3, 20:40]])])


@pytest.mark.parametrize("window", [W, None])
def test_an_int8_growing_cache_keeps_scales_with_their_codes(window: int | None) -> None:
    """Through continuation of a value, rollback and the window."""
    keys, cache = keys_of(2), GrowingCache(1, window, torch.int8)
    remember(cache, keys[:, :7])
    cache.rollback(3)
    other = cache.writable()
    remember(other, keys[:, 20:22])
    for got, wanted in ((cache, keys[:, :4]), (other, torch.cat([keys[:, :4], keys[:, 20:22]], 1))):
        codes, scale = quantize_kv(wanted)
        assert all(map(torch.equal, got.layers[0].entries, (codes, -codes, scale, scale)))
    remember(cache, keys[:, 4:30])
    codes, scale = quantize_kv(keys[:, (30 - W if window else 0) : 30])
    assert all(map(torch.equal, cache.layers[0].entries, (codes, -codes, scale, scale)))


def test_int8_takes_back_what_was_wrong(model: Mistral7B, unwindowed: Mistral7B) -> None:
    """Junk, rolled back, leaves logits as they were: a ring past its window, a growing cache before it."""
    for m, slack in ((model, 3), (unwindowed, 0)):
        wanted = fed(m, INT8_TOKENS, int8_cache(m, "growing"), [23])
        caches: list[RollingCache | GrowingCache] = [m.rolling_cache(2, 64, slack=slack, kv_dtype=torch.int8)]
        caches += [] if m is model else [GrowingCache(2, None, torch.int8)]
        for cache in caches:
            _, after = m(torch.cat([INT8_TOKENS[:, :20], tokens_of((2, 3), seed=9)], dim=1), cache)
            after.rollback(3)
            close(m(INT8_TOKENS[:, 20:], after)[0], wanted[:, 20:])


def test_an_int8_cache_is_smaller(model: Mistral7B) -> None:
    """A byte a value and four a head, for eight a value."""
    sizes = []
    for kv_dtype in (None, torch.int8):
        caches = (model.rolling_cache(2, kv_dtype=kv_dtype), GrowingCache(2, W, kv_dtype))
        grown = [model(INT8_TOKENS, cache)[1] for cache in caches]
        sizes.append([sum(t.nbytes for m in cache.layers for t in m.entries) for cache in grown])
    assert sizes[0] == [2 * 2 * 2 * W * 3 * 10 * 8] * 2
    assert sizes[1] == [2 * 2 * 2 * W * 3 * (10 + 4)] * 2


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.uint8, torch.float64])
def test_other_types_of_keys_are_refused(model: Mistral7B, kv_dtype: torch.dtype) -> None:
    with refused(CacheError, field="kv_dtype"):
        model.rolling_cache(kv_dtype=kv_dtype)
    with refused(CacheError, field="kv_dtype"):
        GrowingCache(2, W, kv_dtype)


# --- every refusal ---


def test_no_tokens_are_refused(model: Mistral7B) -> None:
    for tokens in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.tensor(3)):
        for cache in (None, Stateless(W), model.rolling_cache()):
            with refused(CacheError, field="tokens"):
                model(tokens, cache)


@pytest.mark.parametrize("shape", [(1,), (4,), (1, 5), (2, 5)])
def test_sequence_ids_of_another_shape_are_refused(model: Mistral7B, shape: tuple[int, ...]) -> None:
    for cache in (None, Stateless(W)):
        with refused(CacheError, field="sequence_ids"):
            model(tokens_of((5,)), cache, torch.zeros(shape, dtype=torch.long))


def test_a_cache_of_another_model_is_refused(model: Mistral7B) -> None:
    for cache in (GrowingCache(1, W), RollingCache(1, 3, 10, W, dtype=torch.float64)):
        with refused(CacheError, field="cache"):
            model(tokens_of((1, 5)), cache)
    with refused(CacheError, field="cache"):
        model(tokens_of((1, 5)), RollingCache(2, 3, 10, W))


def test_a_growing_cache_goes_on_as_it_was_begun(model: Mistral7B) -> None:
    ids = torch.tensor([1, 1, 2])
    _, packed = model(tokens_of((3,)), None, ids)
    with refused(CacheError, field="sequence_ids"):
        model(tokens_of((3,)), packed)
    _, plain = model(tokens_of((3,)))
    with refused(CacheError, field="sequence_ids"):
        model(tokens_of((3,)), plain, ids)
    with refused(CacheError, field="sequence_ids"):
        model(tokens_of((1, 3)), None, ids[None])
    _, rectangle = model(tokens_of((2, 3)))
    for other in ((1, 3), (3, 3), (3,)):
        with refused(CacheError, field="tokens"):
            model(tokens_of(other), rectangle)
    close(model(tokens_of((2, 3)), rectangle)[0], model(tokens_of((2, 3)).repeat(1, 2))[0][:, 3:])  # still valid


def test_a_ring_takes_its_own_rows_only(model: Mistral7B) -> None:
    ring = model.rolling_cache(2)
    for tokens, ids in (
        (tokens_of((1, 3)), None),
        (tokens_of((3,)), None),
        (tokens_of((2, 3)), torch.zeros(2, 3)),
    ):
        with refused(CacheError, field="tokens"):
            model(tokens, ring, ids)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chunk", [2, 3])
def test_a_full_context_is_refused_before_anything_is_written(
    unwindowed: Mistral7B, static: bool, chunk: int
) -> None:
    ring = unwindowed.rolling_cache(max_seq_len=6, static=static)
    tokens = tokens_of((1, 6))
    first, _ = unwindowed(tokens[:, :5], ring)
    before = [t.clone() for t in tensors_of(ring)]
    with refused(CacheError, field="tokens"):
        unwindowed(tokens_of((1, chunk)), ring)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], tensors_of(ring)[:2], strict=True))
    last, _ = unwindowed(tokens[:, 5:], ring)
    close(torch.cat([first, last], dim=1), truth(unwindowed, tokens))
    if not static:  # a static step asks the device for nothing: there the caller counts
        with refused(CacheError, field="tokens"):
            unwindowed(tokens[:, :1], ring)


def test_a_ring_shorter_than_its_window_does_not_go_round(model: Mistral7B) -> None:
    ring = model.rolling_cache(max_seq_len=5)
    tokens = tokens_of((1, 5))
    got = [model(tokens[:, i : i + 1], ring)[0] for i in range(5)]
    close(torch.cat(got, dim=1), truth(model, tokens))
    with refused(CacheError, field="tokens"):
        model(tokens[:, :1], ring)


def test_interleaved_sequences_are_refused_where_they_would_be_cut_apart(model: Mistral7B) -> None:
    tokens = tokens_of((6,))
    with refused(CacheError, field="sequence_ids"):
        model(tokens, Stateless(W), torch.tensor([0, 0, 1, 1, 0, 2]))
    with refused(CacheError, field="sequence_ids"):
        model(tokens.expand(2, 6), Stateless(W), torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 2, 2]]))
    ids = torch.tensor([5, 5, 1, 1, 3, 3])
    close(model(tokens, Stateless(W), ids)[0], truth(model, tokens, ids))


def test_documents_of_a_packed_batch_are_attended_one_by_one() -> None:
    """Without a mask, whose size would be the square of the batch's."""
    ids = torch.tensor([3] * 5 + [1] + [7] * 20)
    for window in (None, 30):
        cache = Stateless(window)
        assert cache.extend(torch.zeros(26, dtype=torch.long), ids).tolist() == [*range(5), 0, *range(20)]
        assert [(b.queries.start, b.queries.stop) for b in cache.step] == [(0, 5), (5, 6), (6, 26)]
        assert all(b.keys == b.queries and b.mask is None for b in cache.step)
