"""What a user of the package sees first: its names, its types for a checker, and its reprs."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model

import mistral_7b
from mistral_7b import LLM, ConfigError, EngineError, GenerationError, Mistral7B, SamplingParams, Tokenizer
from mistral_7b.cache import GrowingCache
from mistral_7b.checkpoint.hub import DEMO
from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.config import EngineConfig

ROOT = pathlib.Path(mistral_7b.__file__).parent.parent


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", EngineConfig(max_sequences=2, kv_cache_bytes=1 << 22), dtype="float32")


def test_generate_is_a_function_before_and_after_its_module_is_imported() -> None:
    code = (
        "import sys, mistral_7b\n"
        "from mistral_7b import stream\n"
        "assert 'mistral_7b.generate' in sys.modules\n"
        "from mistral_7b import generate\n"
        "import mistral_7b.generate\n"
        "from mistral_7b.generate import generate as same, stream as too\n"
        "assert generate is same is mistral_7b.generate and stream is too\n"
        "model = mistral_7b.Mistral7B.from_pretrained('demo')\n"
        "print(len(generate(model, 'x', mistral_7b.SamplingParams(max_tokens=2, ignore_eos=True))))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.slow
def test_a_type_checker_knows_what_the_model_returns(
    tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import torch\n"
        "from mistral_7b import LLM, Mistral7B, generate\n"
        "model = Mistral7B.from_pretrained('demo', dtype='float32')\n"
        "logits, cache = model(torch.tensor([[1]]))\n"
        "reveal_type(logits)\n"
        "reveal_type(cache)\n"
        "reveal_type(generate(model, 'x'))\n"
        "reveal_type(LLM('demo').generate('x', max_tokens=3))\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mistral_7b").symlink_to(ROOT / "mistral_7b")  # beside nothing else of the checkout
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "user.py"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"MYPYPATH": str(tmp_path / "site"), "MYPY_CACHE_DIR": str(request.config.cache.mkdir("mypy"))},
    )  # fmt: skip
    revealed = [line.split('"')[1].rsplit(".", 1)[-1] for line in done.stdout.splitlines() if "Revealed" in line]
    assert revealed == ["Tensor", "Cache", "RequestOutput]", "RequestOutput]"], done.stdout
    assert "error" not in done.stdout


def test_dtypes_by_name() -> None:
    assert Mistral7B.from_pretrained("demo", dtype="float32").norm.weight.dtype == torch.float32
    assert Mistral7B.from_pretrained("demo", dtype="half").norm.weight.dtype == torch.float16
    assert Mistral7B.from_pretrained("demo", dtype="auto").norm.weight.dtype == torch.bfloat16
    wrong: Any
    for wrong in ("float8", torch.int64, 32):
        with refused(ConfigError, field="dtype"):
            Mistral7B.from_pretrained("demo", dtype=wrong)


def test_sampling_fields_by_name(llm: LLM) -> None:
    by_name = llm.generate("import os\n", max_tokens=3, temperature=0)[0]
    assert len(by_name.outputs[0].token_ids) == 3
    default = llm.get_default_sampling_params()
    assert llm.generate("import os\n", temperature=0, request_id="a")[0].request_id == "a"
    assert len(llm.generate("import os\n", seed=1, ignore_eos=True)[0].outputs[0].token_ids) == default.max_tokens
    assert sum(len(p.token_ids) for p in llm.stream("import os\n", max_tokens=3)) == 3
    assert len(llm.chat([{"role": "user", "content": "x"}], max_tokens=2)[0].outputs[0].token_ids) <= 2


def test_an_unknown_argument_is_named_with_the_right_one(llm: LLM) -> None:
    for name, right in (
        ("max_new_tokens", "max_tokens"),
        ("sampling_params", "params"),
        ("temprature", "temperature"),
        ("use_tqdm", "progress"),
    ):
        with refused(EngineError, field=name) as caught:
            llm.generate("x", **{name: 1})
        assert caught.value.hint
        if caught.value.hint != "reworded":
            assert right in caught.value.hint
    with refused(EngineError, field="max_tokens"):
        llm.generate("x", SamplingParams(), max_tokens=3)
    with refused(EngineError, field="temperature"):
        llm.embed("x", temperature=1)
    for kind in (LLM, AsyncLLM):
        with refused(EngineError, field="max_model_len"):
            kind("demo", max_model_len=100)
        with refused(EngineError, field="quantisation"):
            kind("demo", quantisation="int8")


def test_the_tokenizer_of_an_llm(llm: LLM) -> None:
    assert llm.get_tokenizer() is llm.tokenizer
    assert LLM(llm.engine.model, llm.engine.config, tokenizer=DEMO).get_tokenizer().vocab_size == 4096
    bare = LLM(tiny_model(tiny_args()), EngineConfig(kv_cache_bytes=1 << 20))
    with refused(GenerationError, field="tokenizer"):
        bare.get_tokenizer()


def test_reprs_are_short_and_say_what_it_is(llm: LLM) -> None:
    model = llm.engine.model
    _, cache = model(torch.tensor([[1, 2, 3]]))
    assert isinstance(cache, GrowingCache)
    output = llm.generate("import os\n", max_tokens=3, temperature=0)[0]
    tokenizer = Tokenizer.from_pretrained("demo")
    for thing, facts in (
        (model, ("Mistral7B(", "n_layers=6", "float32", "demo")),
        (llm, ("LLM(Mistral7B(", "EngineConfig(")),
        (tokenizer, ("Tokenizer(", "4096 tokens")),
        (cache, ("GrowingCache(6 layers, window=256, length=3)",)),
        (model.rolling_cache(batch=2), ("RollingCache(6 layers, window=256, length=[0, 0])",)),
        (output, ("RequestOutput(prompt='import os\\n'", "text='", "3 tokens", "finish_reason='length'")),
    ):
        for fact in facts:
            assert fact in repr(thing)
        assert len(repr(thing)) < 900
