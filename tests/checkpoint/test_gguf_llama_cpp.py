"""GGUF files and llama.cpp: each reads the other's files, with equal logits.

Skipped without llama-cpp-python (`pip install llama-cpp-python` builds llama.cpp; benchmarks also use its source
tree). llama.cpp has no sliding window for the architecture `llama`, so that prompts stay within it. llama.cpp
rounds activations to the type of the weights (bfloat16, float16, or 8 bits in blocks of 32 or 256) before every
product, while this package computes in float32. The tolerances allow for this rounding; with float32 weights,
where nothing is rounded, they are tight. Whether float16 is rounded depends on llama.cpp's build: some kernels
multiply float16 weights with float32 activations.
"""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib
import shutil
from typing import Any

import jinja2
import pytest
import tokenizer_folders
import torch
from tiny import tiny_args, tiny_model
from tokenizers import Tokenizer as Fast
from torch import Tensor

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.checkpoint import convert
from mistral_7b.checkpoint.gguf.file import read
from mistral_7b.checkpoint.hub import DEMO
from mistral_7b.checkpoint.reading import open_checkpoint

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python to compare with llama.cpp")

# Maximum |difference| of logits over their standard deviation, and maximum KL of a token in nats.
# Measured on an AMX Xeon: f32 and f16 1.2e-5, bf16 0.017, q8_0 0.052, q4_0 0.064; LLAMA_CPP_TYPES 0.16 to 0.31.
# On an EPYC with AVX-512, which rounds activations to float16: f32 1.3e-5, f16 0.0017, bf16 0.017, q8_0 0.057.
EXACT = (2e-4, 1e-5)
BFLOAT16 = (0.05, 2e-4)
# float16 has three more bits in its significand than bfloat16: activations are rounded by 2^-11 of their size, not
# 2^-8, so the difference is an eighth. KL is quadratic in it: a 64th, which is below the bound of float32.
FLOAT16 = (BFLOAT16[0] / 8, EXACT[1])
TOLERANCES = {
    "f32": EXACT, "f16": FLOAT16, "bf16": BFLOAT16, "q8_0": (0.15, 2e-3), "q4_0": (0.15, 2e-3),
    "q6_k": (0.15, 2e-3), "q4_k_m": (0.15, 2e-3),
}  # fmt: skip
ROUNDED = (0.6, 1e-2)  # random weights with sharp attention make more of the same rounding
LLAMA_CPP_TYPES = {  # llama.cpp's number for a whole file
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17,
    "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
}  # fmt: skip
WIDE = tiny_args(  # rows of 256 and 512, as the K types need
    dim=256, n_layers=2, head_dim=64, hidden_dim=512, n_heads=4, n_kv_heads=2, vocab_size=4096,
    sliding_window=None, rope_theta=1e6, max_seq_len=512,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    @llama_cpp.llama_log_callback
    def nothing(level: int, text: bytes, data: ctypes.c_void_p) -> None: ...

    _quiet.keep = nothing  # type: ignore[attr-defined]
    llama_cpp.llama_log_set(nothing, ctypes.c_void_p(0))


def their_logits(path: pathlib.Path, tokens: list[int]) -> Tensor:
    """Return llama.cpp's logits of every token, (T, V) float32, with a float32 KV cache."""
    model = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True, n_threads=2, n_threads_batch=2,
        type_k=0, type_v=0, flash_attn=False, verbose=False,
    )  # fmt: skip
    model.eval(tokens)
    out = torch.tensor(model.scores[: len(tokens)])
    model.close()
    return out


def compared(path: pathlib.Path, theirs: Tensor, tokens: list[int], most: float, most_kl: float) -> None:
    """Check that our float32 logits of the file at `path` are close to `theirs`."""
    ours = Mistral7B.from_pretrained(path, dtype=torch.float32)(torch.tensor(tokens)[None])[0][0].detach()
    off = float((ours - theirs).abs().max() / theirs.std())
    kl = float((theirs.log_softmax(-1).exp() * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).max())
    agreed = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    print(f"{path.name}: off by {off:.2e} standard deviations, KL {kl:.1e}, top-1 {agreed:.1%}")
    assert off <= most
    assert kl <= most_kl


def prompt() -> list[int]:
    source = pathlib.Path(torch.__file__).parent.joinpath("_utils.py").read_text()
    return Tokenizer.from_pretrained("demo").encode(source)[:240]  # the demo's window is 256


@pytest.mark.parametrize("type", TOLERANCES)
def test_llama_cpp_has_our_logits_on_our_files(tmp_path: pathlib.Path, type: str) -> None:
    convert("demo", tmp_path / f"{type}.gguf", to="gguf", type=type)
    path, tokens = tmp_path / f"{type}.gguf", prompt()
    compared(path, their_logits(path, tokens), tokens, *TOLERANCES[type])


def quantized(source: pathlib.Path, out: pathlib.Path, file_type: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = file_type, 2, True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A float32 model with rows wide enough for every type, and a tokenizer for llama.cpp."""
    model = tiny_model(WIDE)
    model.source = DEMO
    path = tmp_path_factory.mktemp("wide") / "f32.gguf"
    model.save_pretrained(path, format="gguf")
    return path


@pytest.mark.parametrize(("type", "name"), [("q4_k_m", "Q4_K_M"), ("q6_k", "Q6_K")])
def test_our_k_types_are_those_of_llama_cpp(tmp_path: pathlib.Path, type: str, name: str) -> None:
    """The same mixture of types, closer to the original, and llama.cpp has our logits."""
    model = tiny_model(dataclasses.replace(WIDE, n_layers=11))
    model.source = DEMO
    plain, ours, theirs = (tmp_path / f"{n}.gguf" for n in ("plain", "ours", "theirs"))
    model.save_pretrained(plain, format="gguf")
    convert(plain, ours, to="gguf", type=type)
    quantized(plain, theirs, LLAMA_CPP_TYPES[name])
    kinds = [{n: entry.kind.name for n, entry in read(path).entries.items()} for path in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert read(ours).metadata["general.file_type"] == read(theirs).metadata["general.file_type"]
    errors = []
    for path in (ours, theirs):
        checkpoint = open_checkpoint(path)
        pairs = [(checkpoint.read(n, torch.float32), w) for n, w in model.state_dict().items() if w.dim() == 2]
        errors.append(sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5)
    print(f"{name}: error {errors[0]:.4f}, of llama.cpp {errors[1]:.4f}")
    assert errors[0] < errors[1]
    tokens = prompt()[:16]  # 11 random layers with sharp attention: not the whole prompt
    compared(ours, their_logits(ours, tokens), tokens, *ROUNDED)


@pytest.mark.parametrize("name", LLAMA_CPP_TYPES)
def test_we_have_llama_cpps_logits_on_its_quantized_files(
    tmp_path: pathlib.Path, wide: pathlib.Path, name: str
) -> None:
    theirs, again, tokens = tmp_path / f"{name}.gguf", tmp_path / "again.gguf", prompt()
    quantized(wide, theirs, LLAMA_CPP_TYPES[name])
    kinds = {entry.kind.name for entry in read(theirs).entries.values()}
    assert any(kind.startswith(name.removesuffix("_M")) for kind in kinds)
    quantized(theirs, again, 0)  # back to float32, by llama.cpp
    plain = tmp_path / "plain.gguf"
    convert(theirs, plain, to="gguf", type="f32")  # dequantized by us: loading would keep its blocks
    ours = Mistral7B.from_pretrained(plain, dtype=torch.float32).state_dict()
    for tensor, value in Mistral7B.from_pretrained(again, dtype=torch.float32).state_dict().items():
        # Equal here; a compiler that fuses d q + m rounds only once.
        torch.testing.assert_close(ours[tensor], value, rtol=1e-6, atol=1e-7 * float(value.abs().max()))
    compared(plain, their_logits(again, tokens), tokens, *EXACT)
    compared(theirs, their_logits(theirs, tokens), tokens, *ROUNDED)


TEXTS = (
    "def f(x):\n    return x  # na\u00efve", "  two  spaces ", "\u4f60\u597d \U0001f600", "[INST] </s> <s>",
    "\n\n\t", "a", "", "x = {'k': [1, 22, 333]}\r\n", "\u2581 \u2047 <0x0A>",
)  # fmt: skip
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?  And how?"}],
    [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Three\nfour"},
    ],
)  # fmt: skip


@pytest.fixture(scope="module", params=["v1", "v3", "demo"])
def vocabulary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, object]:
    """Our tokenizer, and llama.cpp's from a GGUF file with it."""
    folder = tmp_path_factory.mktemp("vocabulary")
    ours = Tokenizer.from_pretrained() if request.param == "demo" else getattr(Tokenizer, request.param)()
    shutil.copyfile(ours.path, folder / ("tokenizer.model" if request.param == "v1" else "tokenizer.model.v3"))
    model = tiny_model(tiny_args(vocab_size=ours.vocab_size))
    model.source = folder
    model.save_pretrained(folder / "it.gguf", format="gguf")
    return ours, llama_cpp.Llama(str(folder / "it.gguf"), vocab_only=True, verbose=False)


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_tokenizes_as_we_do(vocabulary: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = vocabulary
    assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ours.encode(text)


@pytest.mark.parametrize("chat", CHATS, ids=len)
def test_trap_16_llama_cpp_encodes_chats_as_we_do(
    vocabulary: tuple[Tokenizer, Any], chat: list[dict[str, str]]
) -> None:
    ours, theirs = vocabulary
    template = jinja2.Environment().from_string(theirs.metadata["tokenizer.chat_template"])
    text = template.render(messages=chat, bos_token="<s>", eos_token="</s>")
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours.encode_chat(chat)


def test_llama_cpp_recognizes_the_templates_without_jinja(vocabulary: tuple[Tokenizer, Any]) -> None:
    """Compare texts: v1 puts spaces outside [INST], v3 does not."""
    ours, theirs = vocabulary
    role, content = b"user", b"Hello"
    message = llama_cpp.llama_chat_message(role, content)
    out = ctypes.create_string_buffer(200)
    template = theirs.metadata["tokenizer.chat_template"].encode()
    size = llama_cpp.llama_chat_apply_template(template, ctypes.byref(message), 1, True, out, 200)
    assert out.raw[:size] == (b" [INST] Hello [/INST]" if ours.version == "v1" else b"[INST] Hello[/INST]")


@pytest.fixture(scope="module", params=tokenizer_folders.KINDS)
def fine_tune(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fast, Any]:
    """A tokenizer with added tokens as Hugging Face's files define it, and llama.cpp's from our GGUF file."""
    folder, other = tmp_path_factory.mktemp("fine-tune"), tmp_path_factory.mktemp("other")
    tokenizer_folders.KINDS[request.param](folder)
    model = tiny_model(tiny_args(vocab_size=4128 if request.param in ("sentencepiece", "fast") else 768))
    model.source = folder
    model.save_pretrained(folder / "it.gguf", format="gguf")
    if request.param == "sentencepiece":  # the same vocabulary
        tokenizer_folders.fast(other)
        folder.joinpath("tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    theirs = llama_cpp.Llama(str(folder / "it.gguf"), vocab_only=True, verbose=False)
    return Fast.from_file(str(folder / "tokenizer.json")), theirs


@pytest.mark.parametrize("special", [False, True], ids=["text", "controls"])
def test_llama_cpp_gives_the_ids_of_fine_tunes_tokenizers(fine_tune: tuple[Fast, Any], special: bool) -> None:
    """With added tokens, of every kind of vocabulary; control tokens are text, or parsed."""
    original, theirs = fine_tune
    original.encode_special_tokens = not special
    for text in tokenizer_folders.fuzzed(1000, seed=5):
        wanted = original.encode(text, add_special_tokens=False).ids
        assert theirs.tokenize(text.encode(), add_bos=False, special=special) == wanted, repr(text)


def test_llama_cpp_knows_the_ends_and_templates_of_fine_tunes(fine_tune: tuple[Fast, Any]) -> None:
    original, theirs = fine_tune
    assert theirs.token_eos() == original.token_to_id("<|im_end|>")
    assert theirs.metadata["tokenizer.chat_template"] == tokenizer_folders.CHATML
    assert theirs.metadata["tokenizer.ggml.add_bos_token"] == ("true" if theirs.n_vocab() == 4128 else "false")
