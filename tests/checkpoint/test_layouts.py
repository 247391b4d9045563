"""Folders and files as people have them, end to end: logits, ids, conversations, ends, conversion, refusals."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from layout_table import LAYOUTS, REFUSED, Refused, table
from layouts import COMMON_V1, COMMON_V3, Layout, Places
from layouts_others import dequantized
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tiny import tokens_of

from mistral_7b import Mistral7B, Mistral7BError, SamplingParams, Tokenizer
from mistral_7b.checkpoint import convert, read_args
from mistral_7b.cli import main
from mistral_7b.engine.prompts import ends_of
from mistral_7b.generate import generate
from mistral_7b.lora import apply, read_adapter
from mistral_7b.text.template_library import TEMPLATES

TEXTS = [
    "Hello  world, don't  \n\n\tstop.", "  two spaces first", "日本語 🙂 👩‍👩‍👧 e\u0301 𒀀\u200b x\u00a0y",
    "\nint main(void) {\n    return 1234;\n}\n", "<0x0A> [INST </s <|im_ |> a_b#c",
]  # fmt: skip
CHAT = [
    {"role": "user", "content": "Hi  there <b>"}, {"role": "assistant", "content": "Hello!\nHow  are you? 🙂"},
    {"role": "user", "content": "日本語?"},
]  # fmt: skip
COMMON = {COMMON_V1: MistralTokenizer.v1, COMMON_V3: MistralTokenizer.v3}


class Opened(NamedTuple):
    layout: Layout
    places: Places
    path: pathlib.Path
    model: Mistral7B
    rest: Any  # of an adapter
    tokenizer: Tokenizer

    @property
    def theirs(self) -> pathlib.Path:
        """The folder that transformers opens."""
        return self.places.twin if self.places.twin.is_dir() else self.path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, own_cache: pathlib.Path) -> pathlib.Path:
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module", params=LAYOUTS)
def it(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, words: pathlib.Path) -> Opened:
    layout, places = LAYOUTS[request.param], Places(tmp_path_factory.mktemp("layout"), words)
    path = layout.make(places)
    model, rest, tokens = Mistral7B.from_pretrained(path, dtype=torch.float32), None, path
    if layout.adapter:
        found = read_adapter(places.folder / "adapter", model.args)
        model, rest = apply(model, found)
        assert found.tokenizer is not None
        tokens = found.tokenizer
    return Opened(layout, places, path, model, rest, Tokenizer.from_pretrained(tokens))


@functools.lru_cache(maxsize=1)  # for the tests of one layout
def auto(folder: pathlib.Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_logits(it: Opened) -> None:
    assert read_args(it.path)[1] == it.layout.opens
    source = it.theirs
    if not list(source.glob("*.safetensors*")) + list(source.glob("*.bin*")):
        source = it.path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    if it.rest is None:
        tokens = tokens_of((2, 21), it.model.args)
        wanted, logits = theirs(tokens).logits.detach(), it.model(tokens)[0].detach()
        rounds = any(hasattr(module, "dequantized") for module in it.model.modules())
        if rounds:  # the weights are theirs, and the kernels round activations to int8
            assert float((logits - wanted).abs().max() / wanted.std()) < 0.2
            logits = dequantized(it.model)(tokens)[0]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        return
    prompt = it.tokenizer.encode("Hello")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    (out,) = generate(it.model, prompt, params, it.tokenizer, adapter=it.rest)
    made = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert out.outputs[0].token_ids == made[0, len(prompt) :].tolist()


def test_ids_of_texts(it: Opened) -> None:
    ours = it.tokenizer
    if it.layout.words in COMMON:
        theirs = COMMON[it.layout.words]().instruct_tokenizer.tokenizer
        assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text, True, False) for text in TEXTS]
    else:
        theirs = auto(it.theirs)
        assert [ours.encode(text) for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
        for text in (f"a{theirs.eos_token} b", f"{theirs.bos_token}a\n{theirs.eos_token}\nb"):
            assert ours.encode_rendered(text) == theirs(text, add_special_tokens=False).input_ids
    for text in TEXTS:
        ids = ours.encode(text)
        if it.layout.words not in COMMON and ours.decode(ids) != text:  # Metaspace adds no space to one
            assert (ours.decode(ids), text[0]) == (theirs.decode(ids[1:], clean_up_tokenization_spaces=False), " ")
        else:
            assert ours.decode(ids) == text


def test_ids_of_a_conversation(it: Opened) -> None:
    if not it.layout.chat:
        assert it.tokenizer.chat is None
        return
    ours = it.tokenizer.encode_chat(CHAT)
    if it.layout.chat in COMMON:
        kinds = {"user": UserMessage, "assistant": AssistantMessage}
        request = ChatCompletionRequest(messages=[kinds[m["role"]](content=m["content"]) for m in CHAT])
        assert ours == COMMON[it.layout.chat]().encode_chat_completion(request).tokens
    else:
        theirs = auto(it.theirs)
        assert ours == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)


def test_ends(it: Opened) -> None:
    assert ends_of(it.model, it.tokenizer) == set(it.layout.ends)
    named = {i: it.tokenizer.vocabulary.names[i] for i in it.layout.ends}
    assert all(name in ("</s>", "<|im_end|>", "<|end_of_turn|>") for name in named.values()), named
    assert all(it.tokenizer.is_control(i) for i in named)


def test_generation(it: Opened) -> None:
    prompt = it.tokenizer.encode("Hello")
    free = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (out,) = generate(it.model, prompt, free, it.tokenizer, adapter=it.rest)
    assert len(out.outputs[0].token_ids) == 4
    for end in it.layout.ends:
        forced = SamplingParams(temperature=0, max_tokens=4, logit_bias={end: 100.0})
        (out,) = generate(it.model, prompt, forced, it.tokenizer, adapter=it.rest)
        assert (out.outputs[0].finish_reason, out.outputs[0].text) == ("stop", "")


STARTS = ("Instruct v0.2", "Instruct v0.3", "OpenHermes", "Hermes 2", "Dolphin", "a merge", "padded", "a Llama")
CONVERTED = [name for name in LAYOUTS if name.startswith(STARTS)]


@pytest.mark.parametrize("it", CONVERTED, indirect=True)
def test_to_gguf_and_back(it: Opened, tmp_path: pathlib.Path) -> None:
    """Ids, ends and the template stay, in the file and in the folder made of it."""
    convert(it.path, tmp_path / "a.gguf", to="gguf")
    convert(tmp_path / "a.gguf", tmp_path / "b")
    tokens = tokens_of((1, 9), it.model.args)
    for path in (tmp_path / "a.gguf", tmp_path / "b"):
        model, made = Mistral7B.from_pretrained(path, dtype=torch.float32), Tokenizer.from_pretrained(path)
        assert torch.equal(model(tokens)[0], it.model(tokens)[0])
        assert [made.encode(text) for text in TEXTS] == [it.tokenizer.encode(text) for text in TEXTS]
        assert ends_of(model, made) == ends_of(it.model, it.tokenizer)
        assert made.eos_id == it.tokenizer.eos_id
        assert made.encode_chat(CHAT) == it.tokenizer.encode_chat(CHAT)


@pytest.mark.parametrize("it", list(LAYOUTS)[:1], indirect=True)
@pytest.mark.parametrize("to", ["huggingface", "mistral", "gguf"])
def test_a_base_model_is_none_to_converse_with_in_any_layout(it: Opened, to: str, tmp_path: pathlib.Path) -> None:
    convert(it.path, tmp_path / f"out.{to}", to=to)
    assert Tokenizer.from_pretrained(tmp_path / f"out.{to}").chat is None


@pytest.mark.wording
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(
    case: Refused, tmp_path: pathlib.Path, words: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = case.make(Places(tmp_path, words))
    if case.by == "model":
        assert case.says in sentence(capsys, "generate", path, "--prompt", "a")
        with pytest.raises(Mistral7BError) as error:
            Mistral7B.from_pretrained(path)
        assert case.says in f"{error.value}; {error.value.hint}"
        return
    if case.by == "command":
        assert case.says in sentence(capsys, "generate", path, "--prompt", "a")
        return
    model = Mistral7B.from_pretrained(path, dtype=torch.float32)
    (out,) = generate(model, [1, 5], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(out.outputs[0].token_ids) == 2

    def attempt() -> object:
        if case.by == "chat":
            return Tokenizer.from_pretrained(path).encode_chat(CHAT)
        return generate(model, "a", SamplingParams(max_tokens=1))

    with pytest.raises(Mistral7BError) as error:
        attempt()
    assert case.says in str(error.value)
    if case.by == "chat":
        assert "chatml" in str(error.value.hint)
        named = Tokenizer.from_pretrained(path, "chatml").encode_chat(CHAT)
        assert named == auto(path).apply_chat_template(
            CHAT, chat_template=TEMPLATES["chatml"], add_generation_prompt=True, return_dict=False
        )


def sentence(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that is refused prints: one line."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


def test_the_document_has_this_table() -> None:
    text = (pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert table() in text
    assert len(LAYOUTS) + len(REFUSED) >= 40
