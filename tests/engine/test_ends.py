"""What ends a completion: every id that the files of a model name, with and without its tokenizer."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_args, tiny_model
from tokenizer_files import DEMO, byte_fallback_folder, byte_level_folder, sentencepiece_folder, write

from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.grammar.vocabulary import Vocabulary
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import GenerationError, GrammarError, SamplingError
from mistral_7b.generate import generate
from mistral_7b.model import Mistral7B
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer

ENGINE = EngineConfig(max_sequences=4, max_batch_tokens=16, page_size=4)


def model_folder(folder: Path, make: Any = byte_level_folder, spare: int = 3, **ends: Any) -> Path:
    """A model with `spare` ids beyond its tokenizer's; `ends`: eos_token_id of a file of the folder, by name."""
    tokenizer = Tokenizer.from_pretrained(make(folder / "files"))
    model = tiny_model(tiny_args(vocab_size=tokenizer.vocab_size + spare, sliding_window=64))
    folder /= "model"
    model.save_pretrained(folder)
    for file in tokenizer.path.parent.glob("token*"):
        shutil.copy(file, folder)
    for name in ("config", "generation_config"):
        content = json.loads((folder / f"{name}.json").read_text()) | {"eos_token_id": ends.get(name)}
        write(folder, **{name: content})
    return folder


def opened(folder: Path) -> Mistral7B:
    return Mistral7B.from_pretrained(folder, dtype=torch.float32, device="cpu").requires_grad_(False)


def forced(token: int, **more: Any) -> SamplingParams:
    """Parameters under which `token` comes again and again."""
    return SamplingParams(**{"max_tokens": 4, "temperature": 0, "logit_bias": {token: 100.0}, **more})


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize(
    ("ends", "stops"),
    [
        ({"config": 300}, {300}), ({"config": [300, 301]}, {300, 301}),
        ({"generation_config": [301, 5]}, {301, 5}), ({"config": 300, "generation_config": 301}, {300, 301}),
        ({"config": 10**9, "generation_config": 301}, {301}),
        ({"config": None, "generation_config": ["x", True, -1]}, set()),
    ],
)  # fmt: skip
def test_every_end_that_a_file_names(tmp_path: Path, ends: dict[str, Any], stops: set[int], without: bool) -> None:
    folder = model_folder(tmp_path, **ends)
    named = stops | ({2} if not stops or not without else set())  # of tokenizer_config; without any, Mistral's
    if without:
        (folder / "tokenizer.json").unlink()
    model = opened(folder)
    llm = LLM(model, ENGINE)
    assert (llm.tokenizer is None) == without
    for token in {300, 301, 5, 2, 40}:
        found = llm.generate([[1, 40]], forced(token))[0].outputs[0]
        assert (found.finish_reason, len(found.token_ids)) == (("stop", 1) if token in named else ("length", 4))
        assert found.stop_reason is None
        assert found == generate(model, [[1, 40]], forced(token))[0].outputs[0]
    for token in sorted(named)[:1]:
        found = llm.generate([[1, 40]], forced(token, ignore_eos=True))[0].outputs[0]
        assert found.finish_reason == "length"
        least = llm.generate([[1, 40]], forced(token, min_tokens=3))[0].outputs[0]
        assert (len(least.token_ids) >= 3, named.isdisjoint(least.token_ids[:3])) == (True, True)


def test_speculation_and_streams_end_there(tmp_path: Path) -> None:
    llm = LLM(opened(model_folder(tmp_path, config=[300, 301])), ENGINE)
    prompt = [40, 301] * 6  # drafts contain the end
    for speculation in (None, Speculation(row_cost=0.0)):
        found = llm.generate([prompt], forced(301), speculation=speculation)[0].outputs[0]
        assert found.token_ids == [301]

    async def scene() -> None:
        async with AsyncLLM(llm.engine.model, ENGINE) as server:
            last = [o async for o in server.generate(prompt, forced(301))][-1].outputs[0]
            assert (last.token_ids, last.finish_reason) == ([301], "stop")

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_stop_token_ids_are_told_and_checked(tmp_path: Path) -> None:
    llm = LLM(opened(model_folder(tmp_path)), ENGINE)
    found = llm.generate([[40]], forced(300, stop_token_ids=[300]))[0].outputs[0]
    assert (found.finish_reason, found.stop_reason, found.text) == ("stop", 300, "")
    with pytest.raises(SamplingError):
        llm.generate([[40]], forced(300, stop_token_ids=[10**6]))


@pytest.mark.parametrize("make", [byte_level_folder, byte_fallback_folder, sentencepiece_folder])
def test_ids_beyond_the_tokenizer_have_no_text(tmp_path: Path, make: Any) -> None:
    """The rows of padding of 32001, 32064, 32770..."""
    llm = LLM(opened(model_folder(tmp_path, make, spare=64)), ENGINE)
    assert llm.tokenizer is not None
    last = llm.engine.model.args.vocab_size - 1
    assert last == llm.tokenizer.vocab_size + 63
    found = llm.generate(["def f"], forced(last))[0].outputs[0]
    assert (found.text, found.token_ids) == ("", [last] * 4)
    plain = llm.generate(["def f"], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))[0].outputs[0]
    assert plain.text == "".join(p.text for p in llm.stream("def f", SamplingParams(
        max_tokens=12, temperature=0, ignore_eos=True)))  # fmt: skip


GRAMMARS: list[tuple[dict[str, Any], str]] = [
    ({"regex": r"(日本|é|ü ?){3}🙂 [a-z]{2,4}!"}, r"(日本|é|ü ?){3}🙂 [a-z]{2,4}!"),
    ({"choice": ["def f(x):", " naïve", "한국"]}, r"def f\(x\):| naïve|한국"),
    ({"json": {"type": "object", "properties": {"größe": {"type": "integer", "maximum": 99, "minimum": 0}},
               "required": ["größe"], "additionalProperties": False}}, r'\s*\{\s*"größe"\s*:\s*\d+\s*\}'),
]  # fmt: skip


def spaceless_folder(folder: Path) -> Path:
    """tokenizer.json whose decoding drops no space before the first word."""
    return byte_fallback_folder(folder, "never")


@pytest.mark.parametrize("make", [byte_level_folder, byte_fallback_folder, sentencepiece_folder, spaceless_folder])
@pytest.mark.parametrize(("grammar", "wanted"), GRAMMARS)
def test_text_under_a_grammar(tmp_path: Path, make: Any, grammar: dict[str, Any], wanted: str) -> None:
    pytest.importorskip("llguidance")
    llm = LLM(opened(model_folder(tmp_path, make, config=300)), ENGINE)
    params = SamplingParams(
        max_tokens=90, temperature=1.3, seed=5, n=3, structured_outputs=StructuredOutputs(**grammar)
    )
    for prompt in ("def f", [1]):
        for output in llm.generate([prompt], params)[0].outputs:
            assert output.finish_reason == "stop"
            assert re.fullmatch(wanted, output.text), output.text


def test_any_end_may_end_a_text_under_a_grammar_and_none_may_before(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    text = StructuredOutputs(regex="a{3,60}")
    for number, ends in enumerate(({"config": [300, 301]}, {"generation_config": 300})):
        folder = model_folder(tmp_path / str(number), **ends)
        llm = LLM(opened(folder), ENGINE)
        found = llm.generate(["a"], forced(300, max_tokens=70, structured_outputs=text))[0].outputs[0]
        assert (found.finish_reason, found.token_ids[-1]) == ("stop", 300)
        assert re.fullmatch("a{3,60}", found.text)
    beyond = {"eos_token_id": 10**9}
    config = json.loads((folder / "config.json").read_text()) | beyond
    folder = folder.rename(tmp_path / "endless")
    write(folder, tokenizer_config={}, config=config, generation_config=beyond)
    llm = LLM(opened(folder), ENGINE)  # a model that names no end it has: the text ends where the grammar does
    assert llm.inputs.ends == frozenset()
    found = llm.generate(["a"], SamplingParams(max_tokens=70, temperature=0, structured_outputs=text))[0].outputs[
        0
    ]
    assert (found.finish_reason, set(found.text), len(found.text)) == ("stop", {"a"}, 60)


def test_an_end_beyond_the_tokenizer_ends_a_text_under_a_grammar() -> None:
    t = Tokenizer.from_file(DEMO)
    size = t.vocab_size
    vocabulary = Vocabulary(t, size + 40, frozenset((size + 39,)))
    ends = np.flatnonzero(np.unpackbits(vocabulary.only_ends.view(np.uint8), bitorder="little"))
    assert ends.tolist() == [size + 39]


def test_a_begun_answer_within_a_token_excludes_a_grammar(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    llm = LLM(opened(model_folder(tmp_path)), ENGINE)

    class Chat:
        version = None
        tags_tool_calls = False

        def encode(self, *_: Any) -> tuple[list[int], None]:
            return [40], None

        def turn_end(self) -> None: ...

    assert llm.tokenizer is not None
    llm.inputs.tokenizer = Tokenizer(llm.tokenizer.vocabulary, Chat())
    params = SamplingParams(max_tokens=4, structured_outputs=StructuredOutputs(regex="a"))
    with pytest.raises(GenerationError) as caught:
        llm.chat([{"role": "user", "content": "x"}], params)
    assert caught.value.field == "structured_outputs"
    assert not isinstance(caught.value, GrammarError)


def test_the_bundled_model_ends_as_before() -> None:
    assert Tokenizer.from_pretrained().stop_ids == frozenset((2,))
    assert Tokenizer.from_file(DEMO).stop_ids == Tokenizer.v1().stop_ids == frozenset((2,))
