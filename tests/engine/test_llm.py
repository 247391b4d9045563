"""LLM as a user meets it: what comes out, in which shape, and what is refused."""

import gc

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of, truth

from mistral_7b.engine.batch import PagedBatch
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.request import Request, SequenceState
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import (
    AdapterError,
    ConfigError,
    EngineError,
    GenerationError,
    PromptTooLongError,
    SamplingError,
)
from mistral_7b.generate import generate
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.tokenizer import Tokenizer

SMALL = EngineConfig(max_sequences=6, max_batch_tokens=16, page_size=4)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def llm_of(config=SMALL, window=8, dtype=torch.float64, **args):
    return LLM(tiny_model(tiny_args(sliding_window=window, **args), dtype), config)


def prompts_of(*lengths):
    return [tokens_of((n,), seed=n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def demo():
    return LLM("demo", dtype=torch.float32)


@pytest.mark.parametrize("window", [None, 8])
def test_outputs_are_those_of_generate(window):
    """Prompts shorter and much longer than window, page and step; each with parameters of its own."""
    llm = llm_of(window=window)
    prompts = prompts_of(1, 4, 16, 17, 33, 40)
    params = [
        GREEDY,
        SamplingParams(seed=1, max_tokens=9, n=3),
        SamplingParams(seed=2, temperature=0.7, top_p=0.8, max_tokens=12, logprobs=3),
        SamplingParams(seed=3, top_k=5, repetition_penalty=1.3, frequency_penalty=0.5, max_tokens=10),
        SamplingParams(seed=4, min_p=0.1, logit_bias={5: 3.0}, min_tokens=5, max_tokens=11, prompt_logprobs=2),
        SamplingParams(seed=5, stop_token_ids=list(range(0, 60, 3)), n=2, logprobs=0),
    ]
    outputs = llm.generate(prompts, params)
    for ours, theirs in zip(outputs, generate(llm.engine.model, prompts, params), strict=True):
        assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-5)
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        for mine, yours in zip(ours.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True):
            assert mine is yours is None or mine.keys() == yours.keys()
    llm.engine.check()
    assert llm.engine.counts.finished == {"length": 5, "stop": 1}


def test_the_shape_of_an_output(demo):
    output = demo.generate("import os\n", SamplingParams(seed=0, max_tokens=8, n=2, logprobs=1))[0]
    assert output.prompt == "import os\n"
    assert output.prompt_token_ids == demo.tokenizer.encode("import os\n")
    assert output.finished
    assert output.error is None
    assert [o.index for o in output.outputs] == [0, 1]
    assert (
        output.outputs[0].text
        == demo.tokenizer.decode(output.prompt_token_ids + output.outputs[0].token_ids)[len("import os\n") :]
    )
    assert output.outputs[0].cumulative_logprob == pytest.approx(
        sum(e[t].logprob for t, e in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True))
    )
    m = output.metrics
    assert m.arrived <= m.started <= m.first_token <= m.finished
    assert m.time_to_first_token >= m.queue_time >= 0


def test_chat_is_generate_on_the_encoded_conversation(demo):
    messages = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(temperature=0, max_tokens=6)
    ids = demo.tokenizer.encode_chat(messages)
    (one,) = demo.chat(messages, params)
    assert one.prompt_token_ids == ids
    both = demo.chat([messages, messages], [params, params])
    assert [o.outputs[0].token_ids for o in both] == [demo.generate(ids, params)[0].outputs[0].token_ids] * 2


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_models_own_states(pooling):
    llm = llm_of()
    prompts = prompts_of(1, 7, 40)
    for prompt, out in zip(prompts, llm.embed(prompts, pooling=pooling, normalize=False), strict=True):
        states = llm.engine.model.hidden(torch.tensor(prompt)[None], llm.engine.model.rolling_cache(1))[0]
        wanted = states.mean(0) if pooling == "mean" else states[-1]
        torch.testing.assert_close(torch.tensor(out.embedding), wanted.float(), atol=1e-6, rtol=1e-6)
    unit = llm.embed(prompts[2], pooling=pooling)[0].embedding
    assert torch.tensor(unit).norm() == pytest.approx(1, abs=1e-6)
    assert llm.embed(prompts[2], pooling=pooling)[0].embedding == unit  # with whatever of it was cached
    llm.engine.check()


def test_logits_beyond_three_windows_are_the_references():
    llm = llm_of(max_batch_tokens := EngineConfig(max_sequences=2, max_batch_tokens=12, page_size=4))
    assert max_batch_tokens.max_batch_tokens < 3 * 8
    (prompt,) = prompts_of(41)
    output = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=-1))[0]
    wanted = truth(llm.engine.model, torch.tensor(prompt)).log_softmax(-1)
    for place, entry in enumerate(output.prompt_logprobs[1:]):
        found = torch.tensor([entry[t].logprob for t in range(67)], dtype=torch.float64)
        torch.testing.assert_close(found, wanted[place], atol=2e-6, rtol=0)  # entries are float32


def test_a_request_with_a_window_holds_no_more_than_it_and_a_step():
    llm = llm_of(EngineConfig(max_sequences=1, max_batch_tokens=16, page_size=4), max_seq_len=400)
    most, end = 0, llm.engine.scheduler.advance

    def watched(sequence, n):
        nonlocal most
        most = max(most, len(sequence.held) * 4)  # with the pages of the step that is done
        end(sequence, n)

    llm.engine.scheduler.advance = watched
    llm.generate(prompts_of(90), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    assert 8 + 4 < most <= 8 + 16


def test_a_prefix_is_computed_once():
    llm = llm_of(window=None)
    (prompt,) = prompts_of(40)
    first = llm.generate(prompt, GREEDY)[0]
    assert first.num_cached_tokens == 0
    again = llm.generate(prompt, GREEDY)[0]
    assert again.num_cached_tokens == 36  # 40 is ten pages, and one token must be left to compute (trap 6)
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    assert llm.generate([*prompt[:20], 1, 2, 3], GREEDY)[0].num_cached_tokens == 20
    assert llm.generate(prompt, GREEDY, cache_salt="another tenant")[0].num_cached_tokens == 0
    assert llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))[0].num_cached_tokens == 0
    without = llm_of(EngineConfig(**{**vars(SMALL), "prefix_caching": False}), window=None)
    without.generate(prompt, GREEDY)
    assert without.generate(prompt, GREEDY)[0].num_cached_tokens == 0


def test_with_a_window_a_prefix_needs_only_its_last_tokens():
    """Pages that have left the window may be gone; the prefix is found by those that have not."""
    llm = llm_of()
    (prompt,) = prompts_of(40)
    first = llm.generate(prompt, GREEDY)[0]
    pool = llm.engine.pool
    for page in list(pool._idle)[:6]:  # the first tokens' pages are those freed longest ago
        del pool._idle[page], pool.page_of[pool._key_of.pop(page)]
        pool._free.append(page)
    again = llm.generate(prompt, GREEDY)[0]
    assert again.num_cached_tokens == 36
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_guesses_change_nothing_but_the_steps():
    prompt = [3, 4, 5, 6] * 6
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logit_bias={5: 6.0})
    plain = llm_of()
    wanted = plain.generate([prompt, prompt[1:]], params)
    speculation = Speculation(row_cost=0.01)
    llm = llm_of()
    outputs = llm.generate([prompt, prompt[1:]], params, speculation=speculation)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in wanted]
    assert llm.engine.counts.accepted_tokens > 0
    assert llm.engine.counts.steps < plain.engine.counts.steps
    llm.engine.check()


def test_int8_pages_take_half_the_memory():
    wide, narrow = llm_of(dtype=torch.bfloat16), llm_of(EngineConfig(**{**vars(SMALL), "kv_dtype": "int8"}))
    assert narrow.engine.pool.layers[0][0].dtype == torch.int8
    out = narrow.generate(prompts_of(30), GREEDY)[0].outputs[0]
    assert len(out.token_ids) == 12
    assert wide.engine.pool.layers[0][0].dtype == torch.bfloat16


def test_memory_is_as_was_said():
    args = tiny_args()
    page = 2 * args.n_layers * args.n_kv_heads * args.head_dim * 8 * 4  # bytes of a page of 4 in float64
    assert llm_of(EngineConfig(6, 16, page_size=4, kv_cache_bytes=10 * page + 1)).engine.pool.n_pages == 10
    assert llm_of().engine.pool.n_pages == 6 * (8 + 16 + 4) // 4  # what six sequences with a window ever hold
    with refused(ConfigError, field="kv_cache_bytes"):
        llm_of(EngineConfig(6, 16, page_size=4, kv_cache_bytes=page - 1))


FOREIGN = Speculation(tiny_model(tiny_args(vocab_size=9)))
REFUSED = {
    "no tokens": (GenerationError, "prompt", [], GREEDY, {}),
    "a token that the model lacks": (GenerationError, "prompt", [67], GREEDY, {}),
    "too long": (PromptTooLongError, "prompt", [1] * 90, GREEDY, {}),
    "too many completions": (EngineError, "n", [1], SamplingParams(n=7), {}),
    "an adapter that is not loaded": (AdapterError, "adapter", [1], GREEDY, {"adapter": "x"}),
    "a text without a tokenizer": (GenerationError, "prompt", "text", GREEDY, {}),
    "a draft model of another vocabulary": (
        GenerationError, "draft_model", [1], GREEDY,
        {"speculation": Speculation(tiny_model(tiny_args(vocab_size=9)))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_before_anything_is_computed(name):
    llm = llm_of(window=None)
    kind, field, prompt, params, asked = REFUSED[name]
    with refused(kind, field=field):
        llm.generate([[1, 2], prompt], [GREEDY, params], asked=[RequestOptions(), RequestOptions(**asked)])
    assert llm.engine.counts.steps == 0
    assert llm.engine.idle
    assert len(llm.generate([1, 2], GREEDY)) == 1


def test_what_never_fits_the_pages_is_refused():
    args = tiny_args()
    page = 2 * args.n_layers * args.n_kv_heads * args.head_dim * 8 * 4
    llm = llm_of(EngineConfig(6, 16, page_size=4, kv_cache_bytes=5 * page), window=None)
    with refused(EngineError, field="prompt"):
        llm.generate([1] * 20, GREEDY)
    assert len(llm.generate([1] * 8, GREEDY)[0].outputs[0].token_ids) == 12


@pytest.mark.parametrize(
    "fields",
    [
        {"max_sequences": 0},
        {"page_size": 1.5},
        {"kv_cache_bytes": -1},
        {"max_batch_tokens": 64},
        {"kv_dtype": "fp8"},
    ],
)
def test_a_configuration_that_cannot_be(fields):
    with refused(ConfigError, field=next(iter(fields))):
        EngineConfig(**fields)


def test_arguments_that_contradict_each_other():
    with refused(EngineError, field="model"):
        LLM(tiny_model(), SMALL, device="cpu")
    with refused(EngineError, field="asked"):
        llm_of().generate([1], GREEDY, asked=RequestOptions(), priority=1)
    for model in (tiny_model(dtype=torch.float64), quantize(tiny_model(dtype=torch.float64), Scheme("int8"))):
        with refused(EngineError, field="deterministic"):
            LLM(model, EngineConfig(deterministic=True))
    with refused(EngineError, field="colour") as caught:
        llm_of().generate([1], GREEDY, colour="red")
    assert isinstance(caught.value, TypeError)
    with refused(GenerationError, field="pooling"):
        llm_of().embed([1], pooling="max")
    with pytest.raises(SamplingError):
        llm_of().generate([1], SamplingParams(logit_bias={99: 1.0}))


def test_text_needs_no_tokenizer_given_where_one_lies_beside_the_model(demo):
    mine = LLM(demo.engine.model, tokenizer=Tokenizer.from_pretrained("demo"))
    params = SamplingParams(temperature=0, max_tokens=4)
    assert mine.generate("import", params)[0].outputs[0].text == demo.generate("import", params)[0].outputs[0].text


def test_a_bar_is_drawn_on_standard_error(capsys):
    llm_of().generate(prompts_of(3, 5), GREEDY, progress=True)
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert captured.out == ""


def test_nothing_is_left_for_the_collector() -> None:
    """Neither of steps nor of requests: a full collection stops everybody, and tensors wait for it."""
    llm = llm_of()
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    gc.collect()
    gc.disable()
    try:
        llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=20, n=2, ignore_eos=True))
        left = [type(o) for o in gc.get_objects() if type(o) in (PagedBatch, Request, SequenceState)]
    finally:
        gc.enable()
    assert left == []
