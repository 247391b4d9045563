"""A model whose vocabulary exceeds its tokenizer's: it emits ids that have no text, and no request is harmed."""

from __future__ import annotations

import asyncio

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model

from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.completion import Completion
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import GenerationError, SamplingError
from mistral_7b.generate import generate, stream
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.v3()
V = TOKENIZER.vocab_size
ENGINE = EngineConfig(max_sequences=6, max_batch_tokens=16, page_size=4)
PLAIN = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
PROMPT = TOKENIZER.encode("The sky is")


@pytest.fixture(scope="module", params=[1, 64])
def model(request: pytest.FixtureRequest) -> Mistral7B:
    return int8(tiny_model(tiny_args(vocab_size=V + request.param, sliding_window=64)))


def int8(model: Mistral7B) -> Mistral7B:
    """In whole numbers, whose rows do not depend on their neighbours."""
    quantize(model, Scheme("int8"))
    return model


def forced(model: Mistral7B, **changes: object) -> SamplingParams:
    """Parameters under which the last id of the model's vocabulary comes, again and again."""
    values = {"max_tokens": 6, "temperature": 0, "logprobs": 2, "logit_bias": {last_of(model): 100.0}, **changes}
    return SamplingParams(**values)  # type: ignore[arg-type]


def last_of(model: Mistral7B) -> int:
    return model.args.vocab_size - 1


def test_generate_and_stream(model: Mistral7B) -> None:
    last = last_of(model)
    for speculate in (None, Speculation(row_cost=0.0)):
        output = generate(model, [PROMPT], forced(model), TOKENIZER, speculate=speculate)[0].outputs[0]
        assert (output.text, output.token_ids, output.finish_reason) == ("", [last] * 6, "length")
        assert [entry[last].decoded_token for entry in output.logprobs or []] == [f"<unused_{last}>"] * 6
    pieces = list(stream(model, PROMPT, forced(model), TOKENIZER))
    assert ("".join(p.text for p in pieces), [t for p in pieces for t in p.token_ids]) == ("", [last] * 6)


def test_it_may_be_what_ends_a_completion(model: Mistral7B) -> None:
    """As the end of a turn that a fine-tune has added."""
    last = last_of(model)
    output = generate(model, [PROMPT], forced(model, stop_token_ids=[last]), TOKENIZER)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("", "stop", last)


def test_text_around_it_is_whole() -> None:
    words = TOKENIZER.encode("one two", bos=False)
    completion = Completion(PROMPT, SamplingParams(max_tokens=9, stop="never"), 9, 0, tokenizer=TOKENIZER)
    for token in (words[0], V, V + 63, *words[1:]):
        completion.push(token)
    completion.end()
    assert completion.text == " one two"


def test_prompts_may_hold_them(model: Mistral7B) -> None:
    prompt = [*PROMPT, last_of(model), V]
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=1)
    llm = LLM(model, ENGINE, tokenizer=TOKENIZER)
    for output in (generate(model, [prompt], params, TOKENIZER)[0], llm.generate([prompt], params)[0]):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[-1][V].decoded_token == f"<unused_{V}>"  # type: ignore[index]
        assert len(output.outputs[0].token_ids) == 3
    assert len(llm.embed([prompt])[0].embedding) == model.args.dim


def test_what_is_beyond_the_model_is_refused_at_the_door(model: Mistral7B) -> None:
    llm = LLM(model, ENGINE, tokenizer=TOKENIZER)
    for bad in (-1, model.args.vocab_size):
        for run in (lambda ids: generate(model, [ids], PLAIN, TOKENIZER), lambda ids: llm.generate([ids], PLAIN)):
            with refused(GenerationError, field="prompt"):
                run([1, bad])
    with refused(SamplingError, field="logit_bias"):
        generate(model, [PROMPT], SamplingParams(logit_bias={model.args.vocab_size: 1.0}), TOKENIZER)


def test_an_engine_lives_on_and_others_are_the_same_to_the_bit(model: Mistral7B) -> None:
    llm = LLM(model, ENGINE, tokenizer=TOKENIZER)
    alone = llm.generate([PROMPT], PLAIN)[0].outputs[0]
    for speculation in (None, Speculation(row_cost=0.0)):
        params = [PLAIN, forced(model), forced(model, stop="x", n=2), PLAIN]
        first, odd, _, second = llm.generate([PROMPT] * 4, params, speculation=speculation)
        assert first.outputs[0] == second.outputs[0] == alone
        assert (odd.outputs[0].text, odd.outputs[0].token_ids) == ("", [last_of(model)] * 6)
    llm.engine.check()


def test_an_engine_in_a_thread(model: Mistral7B) -> None:
    async def scene() -> None:
        async with AsyncLLM(model, ENGINE, tokenizer=TOKENIZER) as llm:

            async def last(params: SamplingParams) -> object:
                return [output async for output in llm.generate(PROMPT, params)][-1].outputs[0]

            alone = await last(PLAIN)
            odd, beside = await asyncio.gather(last(forced(model)), last(PLAIN))
            assert beside == alone
            assert (odd.text, odd.token_ids) == ("", [last_of(model)] * 6)  # type: ignore[attr-defined]
            chat = [o async for o in llm.chat([{"role": "user", "content": "Hi"}], forced(model))][-1]
            assert chat.outputs[0].text == ""
            assert llm.broken is None

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_a_grammar_never_allows_them(model: Mistral7B) -> None:
    pytest.importorskip("llguidance")
    llm = LLM(model, ENGINE, tokenizer=TOKENIZER)
    params = forced(model, max_tokens=20, structured_outputs=StructuredOutputs(choice=("yes", "no")))
    assert llm.generate([PROMPT], params)[0].outputs[0].text in ("yes", "no")


def test_perplexity_counts_them(model: Mistral7B) -> None:
    from mistral_7b.evaluation import perplexity

    ids = [*PROMPT, last_of(model), 5]
    logits = model(torch.tensor([ids]))[0][0, :-1].double().log_softmax(-1)
    nats = -float(logits[range(len(ids) - 1), ids[1:]].sum())
    assert perplexity(model, [ids]).nats == pytest.approx(nats, rel=1e-5)
