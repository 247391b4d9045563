"""What a request may ask for besides text: a grammar, tools, an adapter, a draft; alone and beside others."""

import json
import re

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of

from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import AdapterError, GenerationError, GrammarError
from mistral_7b.kernels.cpu.compiler import library
from mistral_7b.lora.files import Adapter, Factors
from mistral_7b.quantization import quantize
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.tokenizer import Tokenizer

CONFIG = EngineConfig(max_sequences=12, max_batch_tokens=48, page_size=4)
SCHEMA = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
}  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object", "required": ["city", "days"], "additionalProperties": False,
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def spoken():
    """A model of random weights that speaks v3."""
    model = tiny_model(tiny_args(vocab_size=32768, sliding_window=64, max_seq_len=1024), torch.float32)
    return LLM(model, CONFIG, tokenizer=Tokenizer.v3())


def structured(**how):
    return SamplingParams(max_tokens=200, seed=1, structured_outputs=how)


def test_outputs_obey_their_grammars_side_by_side(spoken):
    asked = [
        structured(json=SCHEMA),
        structured(regex="[a-c]{3,9}(x|yz)"),
        structured(choice=["red", "green", "dark blue"]),
        SamplingParams(max_tokens=30, seed=2),
        SamplingParams(
            max_tokens=200, seed=3, n=2, ignore_eos=True, min_tokens=150, structured_outputs={"json": SCHEMA}
        ),
    ]  # fmt: skip
    outputs = spoken.generate(["Say:"] * 5, asked)
    person = json.loads(outputs[0].outputs[0].text)
    assert person.keys() == {"name", "age"}
    assert person["age"] <= 99
    assert re.fullmatch("[a-c]{3,9}(x|yz)", outputs[1].outputs[0].text)
    assert outputs[2].outputs[0].text in ("red", "green", "dark blue")
    # A grammar that lets nothing follow ends the text, whatever min_tokens and ignore_eos would have.
    assert all(json.loads(o.text).keys() == person.keys() for o in outputs[4].outputs)
    assert [o.finish_reason for o in outputs[4].outputs] == ["stop", "stop"]
    alone = [spoken.generate("Say:", p)[0] for p in asked]
    assert [[c.token_ids for c in o.outputs] for o in alone] == [[c.token_ids for c in o.outputs] for o in outputs]
    spoken.engine.check()


@pytest.mark.parametrize("max_draft", [1, 6])
def test_guesses_and_grammars_go_together(spoken, max_draft):
    """A prompt that repeats what the grammar allows is guessed right, and wrong guesses change nothing."""
    prompt = 'abab {"name": "abab", "age": 1} {"name": "abab", "age": 1} '
    params = SamplingParams(max_tokens=120, seed=5, structured_outputs={"regex": "(ab){20,40}"})
    plain = spoken.generate(prompt, params)[0].outputs[0]
    before = spoken.engine.counts.accepted_tokens
    speculation = Speculation(row_cost=0.0, max_draft=max_draft, min_ngram=1)
    guessed = spoken.generate(prompt, params, speculation=speculation)[0].outputs[0]
    assert guessed == plain
    assert re.fullmatch("(ab){20,40}", guessed.text)
    assert spoken.engine.counts.accepted_tokens > before


def test_an_invalid_schema_is_refused_at_once(spoken):
    steps = spoken.engine.counts.steps
    with refused(GrammarError, field="structured_outputs.json"):
        spoken.generate("Say:", structured(json={"type": "nonsense"}))
    with refused(GrammarError, field="structured_outputs"):
        spoken.generate("Say:", structured(regex="(unclosed"))
    assert spoken.engine.counts.steps == steps
    bare = LLM(tiny_model(), CONFIG)
    with refused(GenerationError, field="structured_outputs"):
        bare.generate([1, 2], structured(json_object=True))


MESSAGES = [{"role": "user", "content": "How will the weather be?"}]


ONE = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", ONE])
def test_a_tool_that_must_be_called_is(spoken, choice):
    params = SamplingParams(max_tokens=300, seed=4, n=2)
    (output,) = spoken.chat(MESSAGES, params, tools=[WEATHER], tool_choice=choice)
    for c in output.outputs:
        assert c.token_ids[0] == spoken.tokenizer.tool_syntax.begin == 5
        assert c.text == ""
        assert c.tool_calls
        for call in c.tool_calls:
            assert call.name == "weather"
            assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
            assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)
    ids = [call.id for c in output.outputs for call in c.tool_calls]
    assert len(set(ids)) == len(ids)


def test_pieces_joined_are_the_tool_calls(spoken):
    pieces = []
    params = SamplingParams(max_tokens=300, seed=9)
    (output,) = spoken.chat(
        MESSAGES, params, tools=[WEATHER], tool_choice=ONE, on_output=lambda _, new: pieces.extend(new)
    )
    calls = output.outputs[0].tool_calls
    deltas = [d for piece in pieces for d in piece.tool_calls]
    for call in calls:
        own = [d for d in deltas if d.index == call.index]
        assert [d.name for d in own if d.name] == [call.name]
        assert "".join(d.arguments for d in own) == call.arguments
    assert len(deltas) > 2 * len(calls)  # while they are generated, not at the end
    assert "".join(p.text for p in pieces) == ""


def test_without_tools_the_control_token_begins_nothing(spoken):
    bias = SamplingParams(max_tokens=6, temperature=0, logit_bias={5: 100.0})
    (free,) = spoken.chat(MESSAGES, bias)
    assert free.outputs[0].tool_calls == []
    (none,) = spoken.chat(MESSAGES, bias, tools=[WEATHER], tool_choice="none")
    assert none.prompt_token_ids == free.prompt_token_ids
    assert none.outputs[0].tool_calls == []
    with refused(GrammarError, field="tool_choice"):
        spoken.chat(MESSAGES, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "x"}})
    with refused(GenerationError, field="structured_outputs"):
        spoken.chat(MESSAGES, structured(json_object=True), tools=[WEATHER], tool_choice="required")


# ---------------------------------------------------------------- adapters


def adapter_of(args, seed, rank=4):
    draw = torch.Generator().manual_seed(seed)
    sizes = {
        "attention.wq": (args.dim, args.n_heads * args.head_dim),
        "attention.wv": (args.dim, args.n_kv_heads * args.head_dim),
        "feed_forward.w2": (args.hidden_dim, args.dim),
    }  # fmt: skip
    return Adapter(
        {
            f"layers.{n}.{name}": Factors(
                torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw), 0.2
            )
            for n in range(args.n_layers)
            for name, (inputs, outputs) in sizes.items()
        }
    )


def adapted(scheme):
    model = tiny_model(tiny_args(max_seq_len=512), torch.bfloat16)
    llm = LLM(quantize(model, scheme) if scheme else model.double(), CONFIG)
    for seed in (1, 2):
        llm.engine.load_adapter(f"a{seed}", adapter_of(model.args, seed))
    return llm


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_every_request_runs_with_its_own_adapter(scheme):
    if scheme and library() is None:
        pytest.skip("without the kernel PyTorch's operators attend")
    llm = adapted(scheme)
    prompts = [tokens_of((n,), seed=n).tolist() for n in (5, 30, 30, 30, 17, 41)]
    prompts[2] = prompts[3] = prompts[1]  # the same prompt three times: nothing may be shared between adapters
    names = [None, None, "a1", "a2", "a2", "a1"]
    params = [SamplingParams(seed=i, max_tokens=10, ignore_eos=True, logprobs=2) for i in range(6)]
    together = llm.generate(prompts, params, asked=[RequestOptions(adapter=name) for name in names])
    again = llm.generate(
        prompts, params, asked=[RequestOptions(adapter=name) for name in names]
    )  # with prefixes found
    assert again[2].num_cached_tokens == 28
    plain = LLM(llm.engine.model, CONFIG)  # knows no adapters
    for i, name in enumerate(names):
        one = (llm if name else plain).generate(prompts[i], params[i], **({"adapter": name} if name else {}))[0]
        for other in (together[i], again[i]):
            assert other.outputs[0].token_ids == one.outputs[0].token_ids
            if scheme:  # to the bit
                assert other.outputs[0].logprobs == one.outputs[0].logprobs
    first = {tuple(o.outputs[0].logprobs[0].items()) for o in together[1:4]}
    assert len(first) == 3  # and each does something
    llm.engine.check()


def test_an_adapter_in_use_stays(monkeypatch):
    llm = adapted(None)
    request = llm.inputs.text([1, 2, 3], SamplingParams(max_tokens=5), RequestOptions(adapter="a1"))
    llm.engine.add(request)
    llm.engine.step()
    with pytest.raises(AdapterError):
        llm.engine.unload_adapter("a1")
    llm.engine.unload_adapter("a2")
    while not request.finished:
        llm.engine.step()
    llm.engine.unload_adapter("a1")
    with refused(AdapterError, field="adapter"):
        llm.generate([1], adapter="a1")


def test_an_adapter_loaded_anew_shares_no_prefix_with_the_old():
    llm = adapted(None)
    prompt, params = tokens_of((40,), seed=3).tolist(), SamplingParams(max_tokens=1, temperature=0)
    llm.generate(prompt, params, adapter="a1")
    assert llm.generate(prompt, params, adapter="a1")[0].num_cached_tokens == 36
    llm.engine.unload_adapter("a1")
    llm.engine.load_adapter("a1", adapter_of(llm.engine.model.args, 7))
    assert llm.generate(prompt, params, adapter="a1")[0].num_cached_tokens == 0


@pytest.mark.skipif(library() is None, reason="without the kernel PyTorch's operators attend")
def test_deterministic_bfloat16_gives_the_same_bits_in_any_company():
    model = tiny_model(tiny_args(max_seq_len=512), torch.bfloat16)
    llm = LLM(model, EngineConfig(12, 48, page_size=4, deterministic=True))
    prompts = [tokens_of((n,), seed=n).tolist() for n in (3, 40, 17, 33, 21, 60, 8)]
    params = [SamplingParams(seed=i, max_tokens=12, ignore_eos=True, logprobs=3) for i in range(7)]
    together = llm.generate(prompts, params)
    for prompt, p, output in zip(prompts, params, together, strict=True):
        assert llm.generate(prompt, p)[0].outputs == output.outputs
