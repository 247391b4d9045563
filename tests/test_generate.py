"""Generation against a plain loop over the uncached forward, alone and in ragged batches."""

import gc
import weakref

import pytest
import torch
from refusals import refused
from torch._subclasses.fake_tensor import FakeTensor

from mistral_7b.cache import Stateless
from mistral_7b.engine.completion import Completion
from mistral_7b.engine.pages import PagePool
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import CacheError, GenerationError, SamplingError
from mistral_7b.generate import PREFILL_CHUNK, generate, stream
from mistral_7b.model import Mistral7B, ModelArgs
from mistral_7b.sampling.choice import uniforms
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.sampling.sampler import Row, sample_rows
from mistral_7b.text.tokenizer import Tokenizer

WINDOW, V = 8, 97
V3 = Tokenizer.v3()


def tiny(window=WINDOW, vocab=V, seed=0, max_seq_len=4096, dtype=torch.float64):
    torch.manual_seed(seed)
    args = ModelArgs(
        dim=24, n_layers=2, head_dim=10, hidden_dim=44, n_heads=6, n_kv_heads=3, vocab_size=vocab,
        sliding_window=window, max_seq_len=max_seq_len,
    )  # fmt: skip
    model = Mistral7B(args, dtype=dtype)
    for p in model.parameters():  # far from zero, so that tokens differ and eps does not rule
        torch.nn.init.normal_(p, std=0.4)
    return model


def prompts_of(*lengths, vocab=V):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (n,), generator=g).tolist() for n in lengths]


@torch.no_grad()
def slowly(model, prompt, n, params=None, seed=0, index=0):
    """Tokens by the uncached forward of the whole text at every step."""
    params, ids = params or GREEDY, list(prompt)
    for step in range(n):
        hidden = model.hidden(torch.tensor([ids]), Stateless(model.args.sliding_window))
        row = Row(params, uniforms(seed, index, step, 1)[0])
        ids += sample_rows(model.logits(hidden[:, -1]), [row]).tolist()
    return ids[len(prompt) :]


GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


def ids_of(outputs):
    return [c.token_ids for r in outputs for c in r.outputs]


@pytest.mark.parametrize("window", [WINDOW, None])
def test_trap_14_each_row_alone_is_the_row_in_a_ragged_batch(window):
    model = tiny(window)
    prompts = prompts_of(1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 5)
    p = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    together = generate(model, prompts, p)
    for prompt, row in zip(prompts, together, strict=True):
        assert row.outputs[0].token_ids == slowly(model, prompt, 30)
        alone = generate(model, prompt, p)[0]
        assert alone.outputs[0].token_ids == row.outputs[0].token_ids
        for a, b in [
            *zip(alone.outputs[0].logprobs, row.outputs[0].logprobs, strict=True),
            *zip(alone.prompt_logprobs[1:], row.prompt_logprobs[1:], strict=True),
        ]:
            assert a.keys() == b.keys()
            assert all(a[t].logprob == pytest.approx(b[t].logprob, abs=1e-6) for t in a)


@pytest.mark.parametrize("window", [WINDOW, None])
def test_trap_14_logits_of_a_ragged_batch_are_those_of_each_row_alone(window, monkeypatch):
    """The logits themselves, float64 to 1e-10, with rows that leave on the way."""
    model = tiny(window)
    prompts = prompts_of(2, 2 * WINDOW + 3, WINDOW, 5)
    limits = [4, 20, 9, 14]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in limits]
    seen = []
    monkeypatch.setattr(model, "logits", lambda h, plain=model.logits: seen.append(plain(h)) or seen[-1])
    out = ids_of(generate(model, prompts, params))
    assert [len(ids) for ids in out] == limits
    assert len(seen[0]) == len(prompts)  # all prompts are read in one step
    decoded = seen[1:]
    assert [len(step) for step in decoded] == [sum(n > t for n in limits) for t in range(1, 20)]
    for prompt, ids in zip(prompts, out, strict=True):
        hidden = model.hidden(torch.tensor([[*prompt, *ids[:-1]]]), Stateless(window))
        want = Mistral7B.logits(model, hidden[0, len(prompt) :])
        for t, row in enumerate(want):
            assert (decoded[t] - row).abs().amax(-1).min() < 1e-10


def test_prompts_longer_than_a_chunk_and_texts_of_many_pages():
    for window in (None, 700):
        model = tiny(window, max_seq_len=4 * PREFILL_CHUNK)
        prompts = prompts_of(PREFILL_CHUNK + 70, 9)
        n = 300
        out = generate(model, prompts, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True))
        for prompt, ids in zip(prompts, ids_of(out), strict=True):
            hidden = model.hidden(torch.tensor([[*prompt, *ids]]), Stateless(window))
            assert model.logits(hidden)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == ids


def test_trap_15_finished_rows_neither_revive_nor_emit():
    """EOS forced at another step for each row; then the same tokens as the row alone, up to there."""
    model = tiny()
    prompts = prompts_of(4, 17, 9, 1, 12)
    free = ids_of(generate(model, prompts, GREEDY))
    ends = [5, 1, 30, 12, 2]

    for order in (range(5), reversed(range(5))):
        order = list(order)
        # the token that a row gives at its own end is what ends it
        params = [
            SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[free[i][ends[i] - 1]])
            for i in order
        ]
        out = generate(model, [prompts[i] for i in order], params)
        for i, r in zip(order, out, strict=True):
            first = free[i].index(free[i][ends[i] - 1]) + 1
            assert r.outputs[0].token_ids == free[i][:first]
            assert r.outputs[0].finish_reason == "stop"


def test_trap_15_eos_ends_each_row_by_itself(monkeypatch):
    model = tiny(vocab=2000)
    prompts = prompts_of(4, 17, 9, vocab=2000)
    ends = {tuple(p): n for p, n in zip(prompts, (7, 1, 3), strict=True)}
    plain = Completion.push

    def push(self, token, logprobs=None):
        due = ends[tuple(self.prompt)] == len(self.token_ids) + 1
        return plain(self, 2 if due else max(token, 800), logprobs)

    monkeypatch.setattr(Completion, "push", push)
    out = generate(model, prompts, SamplingParams(temperature=0, max_tokens=30), V3)
    for r, n in zip(out, (7, 1, 3), strict=True):
        c = r.outputs[0]
        assert (len(c.token_ids), c.token_ids[-1], c.finish_reason, c.stop_reason) == (n, 2, "stop", None)
        stream_of = V3.stream(after=r.prompt_token_ids)
        assert c.text == "".join(stream_of.push(t) for t in c.token_ids[:-1]) + stream_of.flush()


def test_what_is_sampled_depends_on_nothing_beside_it():
    model = tiny()
    prompts = prompts_of(5, 11, 18)
    p = SamplingParams(temperature=1.3, top_p=0.95, seed=42, n=3, max_tokens=12, ignore_eos=True)
    together = generate(model, prompts, p)
    for prompt, r in zip(prompts, together, strict=True):
        assert [c.index for c in r.outputs] == [0, 1, 2]
        for c in r.outputs:
            assert c.token_ids == slowly(model, prompt, 12, p, seed=42, index=c.index)
    assert len({tuple(ids) for ids in ids_of(together)}) == 9
    assert ids_of(generate(model, prompts, p, batch_size=1)) == ids_of(together)
    assert ids_of(generate(model, prompts[::-1], p))[-3:] == ids_of(together)[:3]
    torch.manual_seed(3)
    loose = SamplingParams(max_tokens=12)
    first = ids_of(generate(model, prompts, loose))
    assert ids_of(generate(model, prompts, loose)) != first
    torch.manual_seed(3)
    assert ids_of(generate(model, prompts, loose)) == first


def test_penalties_follow_their_rows_when_others_leave():
    model = tiny()
    prompts = prompts_of(3, 10, 6)
    base = {"temperature": 0, "ignore_eos": True, "repetition_penalty": 1.8, "frequency_penalty": 0.9}
    params = [SamplingParams(max_tokens=n, **base) for n in (5, 25, 15)]
    together = generate(model, prompts, params)
    for prompt, p, r in zip(prompts, params, together, strict=True):
        assert r.outputs[0].token_ids == ids_of(generate(model, prompt, p))[0]
    assert ids_of(generate(model, prompts[1], SamplingParams(temperature=0, max_tokens=25, ignore_eos=True))) != [
        together[1].outputs[0].token_ids
    ]


def test_logprobs_are_those_of_the_uncached_forward():
    model = tiny()
    prompt = prompts_of(150)[0]
    p = SamplingParams(temperature=0.7, seed=1, logprobs=3, prompt_logprobs=2, max_tokens=9, logit_bias={5: 50})
    r = generate(model, prompt, p)[0]
    c = r.outputs[0]
    assert c.token_ids[0] == 5  # biased, but its log-probability is the raw one
    hidden = model.hidden(torch.tensor([[*prompt, *c.token_ids]]), Stateless(WINDOW))
    table = model.logits(hidden)[0].log_softmax(-1)
    assert r.prompt_logprobs[0] is None
    assert len(r.prompt_logprobs) == 150
    for place, entry in enumerate([*r.prompt_logprobs[1:], *c.logprobs]):
        token = [*prompt, *c.token_ids][place + 1]
        best = table[place].topk(3 if place >= 149 else 2).indices.tolist()
        assert set(entry) == {token, *best}
        assert all(v.logprob == pytest.approx(table[place][t].item(), abs=1e-5) for t, v in entry.items())
    assert c.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(c.logprobs, c.token_ids, strict=True))
    )
    plain = generate(model, prompt, GREEDY)[0]
    assert (plain.prompt_logprobs, plain.outputs[0].logprobs, plain.outputs[0].cumulative_logprob) == (None,) * 3


def test_trap_13_only_the_last_row_of_a_prompt_is_projected(monkeypatch):
    model, rows = tiny(), []
    monkeypatch.setattr(
        model, "logits", lambda h, plain=model.logits: rows.append(h.shape[:-1].numel()) or plain(h)
    )
    generate(model, prompts_of(1500), SamplingParams(max_tokens=2, ignore_eos=True))
    assert rows == [1, 1]
    generate(model, prompts_of(1500), SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert max(rows) <= 64
    assert sum(rows) == 2 + 1499 + 1


def says(text, params, chunks=1):
    """What a completion makes of a text that comes token by token: pieces, and its output."""
    c = Completion(V3.encode("x"), params, 1000, 0, 0, V3)
    pieces = []
    for token in V3.encode(text, bos=False):
        if not c.finished:
            pieces.append(c.push(token))
    return pieces, c.output()


def test_text_is_cut_before_the_stop_across_tokens():
    text = "one two three four five"
    for stop in ("three", "ee fo", " ", "r five", "o three f", ["xx", "four", "thr"]):
        pieces, out = says(text, SamplingParams(stop=stop))
        stops = [stop] if isinstance(stop, str) else stop
        place, found = min((f" {text}".find(s), s) for s in stops if s in f" {text}")
        assert "".join(pieces) == out.text == f" {text}"[:place]
        assert (out.finish_reason, out.stop_reason) == ("stop", found)
    pieces, out = says(text, SamplingParams(stop=["five six", "zzz"]))
    assert out.finish_reason is None
    assert out.text == " one two three four "  # "five" is held back: the stop may still come
    assert pieces[:3] == [" one", " two", " three"]


def test_held_text_comes_out_when_the_length_is_reached():
    c = Completion(V3.encode("x"), SamplingParams(stop="one two"), 1, 0, 0, V3)
    assert c.push(V3.encode("one", bos=False)[0]) == " one"
    assert c.finish_reason == "length"


def test_min_tokens_bars_eos_and_stops():
    model = tiny(vocab=V)
    prompt = prompts_of(6)[0]
    bias = {2: 100, 7: 99}
    for least in (0, 1, 5):
        p = SamplingParams(temperature=0, logit_bias=bias, min_tokens=least, max_tokens=9)
        assert ids_of(generate(model, prompt, p)) == [[7] * least + [2]]
        p = SamplingParams(temperature=0, logit_bias={7: 100}, stop_token_ids=[7], min_tokens=least, max_tokens=9)
        c = generate(model, prompt, p)[0].outputs[0]
        assert (len(c.token_ids), 7 in c.token_ids[:-1], c.stop_reason) == (least + 1, False, 7)
    p = SamplingParams(temperature=0, logit_bias=bias, ignore_eos=True, min_tokens=3, max_tokens=4)
    assert ids_of(generate(model, prompt, p)) == [[2] * 4]
    _, out = says("a b a b a b", SamplingParams(stop="b", min_tokens=2))
    assert out.text == " a b a "


def test_texts_go_in_and_come_out():
    model = tiny(vocab=V3.vocab_size)
    p = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    texts = ["def hello", "日本", ""]
    for text, r in zip(texts, generate(model, texts, p, V3), strict=True):
        assert (r.prompt, r.prompt_token_ids) == (text, V3.encode(text))
        assert r.prompt_token_ids.count(V3.bos_id) == 1
        whole = V3.decode([*r.prompt_token_ids, *r.outputs[0].token_ids])
        assert whole == text + r.outputs[0].text
    with_text = generate(model, texts[0], SamplingParams(logprobs=1, max_tokens=1), V3)[0].outputs[0]
    assert all(v.decoded_token == V3.piece(t) for t, v in with_text.logprobs[0].items())


def test_the_tokenizer_beside_the_model_is_taken(tmp_path):
    model = tiny(vocab=V3.vocab_size)
    with refused(GenerationError, field="prompt"):
        generate(model, "hello", GREEDY)
    (tmp_path / "tokenizer.model").write_bytes(V3.path.read_bytes())
    model.source = tmp_path
    assert generate(model, "hello", GREEDY)[0].outputs[0].text
    model.source = tmp_path / "nowhere"
    with refused(GenerationError, field="prompt"):
        generate(model, ["hello"], GREEDY)
    assert generate(model, [1, 5], GREEDY)[0].outputs[0].text == ""


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [None, "e", ["th", " "]])
def test_streamed_pieces_join_to_what_generate_returns(n, stop):
    model = tiny(vocab=V3.vocab_size)
    p = SamplingParams(n=n, seed=5, max_tokens=40, stop=stop, temperature=1.0)
    want = generate(model, "Once upon", p, V3)[0].outputs
    pieces = list(stream(model, "Once upon", p, V3))
    assert sum(len(piece.token_ids) > 1 for piece in pieces) < len(pieces) / 2  # not all at the end
    for c in want:
        own = [piece for piece in pieces if piece.index == c.index]
        assert "".join(map(str, own)) == c.text
        assert [t for piece in own for t in piece.token_ids] == c.token_ids
        assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
        assert (own[-1].finish_reason, own[-1].stop_reason) == (c.finish_reason, c.stop_reason)


def test_a_piece_is_given_out_before_the_next_is_computed(monkeypatch):
    model, forwards = tiny(vocab=V3.vocab_size), []
    monkeypatch.setattr(model, "hidden", lambda *a, plain=model.hidden: forwards.append(1) or plain(*a))
    pieces = stream(model, "Once", GREEDY, V3)
    assert not forwards
    for n in range(1, 4):
        assert next(pieces).text
        assert len(forwards) == n
    assert torch.is_inference_mode_enabled() is False


@pytest.fixture
def pools(monkeypatch):
    """The memory for keys and values of every call, in the order of the calls."""
    made, plain = [], PagePool.__init__
    monkeypatch.setattr(PagePool, "__init__", lambda pool, *a, **k: made.append(pool) or plain(pool, *a, **k))
    return made


def test_closing_a_stream_frees_its_cache(pools):
    """At once, and not when the collector comes: it may be gigabytes."""
    model = tiny()
    generate(model, prompts_of(5), GREEDY)
    pools.clear()
    pieces = stream(model, prompts_of(5)[0], GREEDY)
    gc.collect()
    gc.disable()
    try:
        assert len(next(pieces).token_ids) == 1
        alive = weakref.ref(pools.pop().layers[0][0])
        pieces.close()
        assert alive() is None
        generate(model, prompts_of(5, 9), GREEDY)
        alive = weakref.ref(pools.pop().layers[0][0])
        assert alive() is None
    finally:
        gc.enable()


@torch.no_grad()
def by_hand(model, prompt, n, seed, kv_dtype):
    """Tokens sampled one by one from a cache of this type."""
    cache = model.rolling_cache(1, len(prompt) + n, kv_dtype=kv_dtype)
    ids, new = [], prompt
    for step in range(n):
        logits, _ = model(torch.tensor([new]), cache)
        new = sample_rows(logits[:, -1], [Row(SamplingParams(), uniforms(seed, 0, step, 1)[0])]).tolist()
        ids += new
    return ids


@pytest.mark.parametrize("window", [WINDOW, None])
def test_int8_keys_and_values_are_what_a_loop_over_such_a_cache_gives(window, pools):
    """In a ragged batch, streamed, and with guesses; for a quarter of float64's bytes and less."""
    model = tiny(window)
    prompts, n = prompts_of(1, 3, WINDOW + 1, 2 * WINDOW + 5), 40
    params = SamplingParams(max_tokens=n, ignore_eos=True, seed=6)
    wanted = [by_hand(model, p, n, 6, torch.int8) for p in prompts]
    assert wanted != [by_hand(model, p, n, 6, None) for p in prompts]  # the rounding shows
    generate(model, prompts, params)
    assert ids_of(generate(model, prompts, params, kv_dtype=torch.int8)) == wanted
    sizes = [sum(t.nbytes for entries in pool.layers for t in entries) for pool in pools]
    assert sizes[1] * 4 < sizes[0]
    assert ids_of(generate(model, prompts, params, kv_dtype=torch.int8, batch_size=1)) == wanted
    guessing = Speculation(max_draft=3, row_cost=0.0)
    assert ids_of(generate(model, prompts, params, kv_dtype=torch.int8, speculate=guessing)) == wanted
    pieces = stream(model, prompts[2], params, kv_dtype=torch.int8)
    assert [t for piece in pieces for t in piece.token_ids] == wanted[2]


def test_keys_and_values_of_another_type_are_refused_at_once():
    for call in (generate, stream):
        with refused(CacheError, field="kv_dtype"):
            call(tiny(), [3, 4], kv_dtype=torch.float16)


def tensor_bytes():
    seen = {}
    for o in gc.get_objects():
        # Other tests leave tensors behind that have no storage: fake ones, and those packed for oneDNN.
        if issubclass(type(o), torch.Tensor) and not isinstance(o, FakeTensor) and o.layout == torch.strided:
            seen[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(seen.values())


def test_memory_is_flat_beyond_the_window():
    window = 64
    model, tiny_full, held = tiny(window), tiny(None), []
    p = SamplingParams(max_tokens=5 * window, ignore_eos=True, seed=0)
    for i, _ in enumerate(stream(model, prompts_of(10)[0], p)):
        if i >= window and i % (window // 2) == 0:
            gc.collect()
            held.append(tensor_bytes())
    assert len(held) == 8
    assert len(set(held)) == 1
    cache, grows = None, []
    with torch.no_grad():
        for step in range(501):  # the control: the measure sees a cache that grows
            _, cache = tiny_full(torch.tensor([[5]]), cache)
            if step in (50, 500):
                grows.append(tensor_bytes())
    assert grows[1] > grows[0]


@pytest.mark.wording
def test_prompts_are_checked_and_named():
    model = tiny(None, max_seq_len=50)
    good = prompts_of(12)[0]
    for prompts, params, said in [
        ([good, []], GREEDY, "prompt 1 is empty"),
        ([good, [1, V]], GREEDY, f"prompt 1: {V} at index 1"),
        ([good, [-1]], GREEDY, "prompt 1: -1 at index 0"),
        ([good, [1.5]], GREEDY, "prompt 1: 1.5 at index 0"),
        ([[1], good], SamplingParams(max_tokens=39), r"prompt 1 has 12 tokens, and max_tokens=39.*context of 50"),
        ([[1], good * 5], SamplingParams(max_tokens=None), "prompt 1 has 60 tokens and fills the context of 50"),
        ([good], SamplingParams(stop="x", max_tokens=2), "tokenizer"),
        ([good], [GREEDY, GREEDY], "1 prompts with 2"),
    ]:
        with pytest.raises(GenerationError, match=said):
            generate(model, prompts, params)
    with refused(SamplingError, field="logit_bias"):
        generate(model, good, SamplingParams(logit_bias={V: 1}, max_tokens=2))
    with refused(GenerationError, field="batch_size"):
        generate(model, good, SamplingParams(max_tokens=2), batch_size=0)
    with refused(GenerationError, field="prompt"):
        stream(model, [good, good])
    assert generate(model, []) == []


def test_the_context_is_used_up_to_its_end():
    model = tiny(None, max_seq_len=20)
    p = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0)
    out = generate(model, prompts_of(12, 3), p)
    assert [len(ids) for ids in ids_of(out)] == [8, 17]
    assert {c.finish_reason for r in out for c in r.outputs} == {"length"}
    assert ids_of(generate(model, prompts_of(12, 3)[1], p)) == [ids_of(out)[1]]
    windowed = tiny(max_seq_len=20)
    assert len(ids_of(generate(windowed, prompts_of(30), GREEDY))[0]) == 30  # a window has no end of context


def test_logits_that_are_not_finite_are_told():
    model = tiny()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(GenerationError):
        generate(model, [1, 5], GREEDY)
