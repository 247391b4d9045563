"""A model's own sampling defaults, from its generation_config.json, in the library and on the command line."""

from __future__ import annotations

import json
import pathlib
import shutil
import warnings
from typing import Any

import pytest
from gguf_inputs import BLOCKS, F32, I32, TEXT, built, pairs_of

from mistral_7b import LLM, Mistral7B, SamplingParams, generate
from mistral_7b.checkpoint.generation_settings import generation_settings
from mistral_7b.checkpoint.hub import DEMO
from mistral_7b.cli import main
from mistral_7b.engine.config import EngineConfig
from mistral_7b.sampling.defaults import sampling_defaults

PROMPT = "import os\n"


def model_defaults(source: pathlib.Path | None) -> dict[str, Any]:
    return sampling_defaults(*generation_settings(source))


def write(folder: pathlib.Path, settings: Any) -> pathlib.Path:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / "generation_config.json").write_text(text)
    return folder


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the bundled model whose file asks for greedy decoding of 5 tokens."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model.v3"):
        shutil.copy(DEMO / name, folder)
    return write(folder, {"eos_token_id": 2, "do_sample": False, "temperature": 0.9, "max_new_tokens": 5})


def test_fields_of_the_file(tmp_path: pathlib.Path) -> None:
    assert model_defaults(None) == model_defaults(tmp_path) == {}
    every = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    write(tmp_path, {**every, "do_sample": True, "max_new_tokens": 7, "eos_token_id": [2, 5], "min_p": None})
    wanted = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "max_tokens": 7}
    assert model_defaults(tmp_path) == wanted
    assert model_defaults(tmp_path / "model.safetensors") == wanted  # weights beside the file
    write(tmp_path, {**every, "do_sample": False})
    assert model_defaults(tmp_path) == {"temperature": 0.0, "repetition_penalty": 1.2}


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"temperature": "hot", "top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 2, "top_k": 3.5, "repetition_penalty": 0, "max_new_tokens": 0, "min_p": True}, {}),
        ({"do_sample": "no", "top_k": 4}, {"top_k": 4}),
        ([1, 2], {}),
        ("{", {}),
        ("[" * 100_000, {}),
    ],
)
def test_what_cannot_be_used_is_left_out_with_a_warning(
    tmp_path: pathlib.Path, settings: Any, left: dict[str, Any]
) -> None:
    with pytest.warns(UserWarning, match=r"generation_config\.json"):
        assert model_defaults(write(tmp_path, settings)) == left


def test_a_file_that_is_no_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe{")
    with pytest.warns(UserWarning, match="generation_config"):
        assert model_defaults(tmp_path) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model_defaults(tmp_path / "no" / "such") == {}


def test_a_gguf_file_brings_its_own(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.gguf"
    kept = {"huggingface.generation_config": (TEXT, json.dumps({"temperature": 0.9, "top_p": 0.8}))}
    keys = {"temp": (F32, 0.6), "top_k": (I32, 20), "min_p": (F32, 0.05), "penalty_repeat": (F32, 1.1)}
    own = {f"general.sampling.{name}": value for name, value in keys.items()}
    wanted = {"temperature": 0.6, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    path.write_bytes(built(pairs_of(BLOCKS) | own, []))
    assert model_defaults(path) == wanted
    path.write_bytes(built(pairs_of(BLOCKS) | kept | own, []))
    assert model_defaults(path) == {**wanted, "top_p": 0.8}  # the keys, which people change, precede what was kept
    write(tmp_path, {"top_k": 3})
    assert model_defaults(path) == {**wanted, "top_p": 0.8}
    path.write_bytes(built(pairs_of(BLOCKS), []))
    assert model_defaults(path) == {"top_k": 3}  # beside a file that has none
    path.write_bytes(built(pairs_of(BLOCKS) | {"general.sampling.temp": (F32, -1.0)}, []))
    with pytest.warns(UserWarning, match=r"x\.gguf: 'temperature' is ignored"):
        assert model_defaults(path) == {}


def test_the_library_takes_them_where_no_parameters_are_given(model: pathlib.Path) -> None:
    llm = LLM(model, EngineConfig(max_sequences=2, kv_cache_bytes=1 << 22), dtype="float32")
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=5)
    greedy = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids
    assert llm.generate(PROMPT)[0].outputs[0].token_ids == greedy[:5]
    assert llm.generate(PROMPT, max_tokens=8)[0].outputs[0].token_ids == greedy
    assert [t for piece in llm.stream(PROMPT) for t in piece.token_ids] == greedy[:5]
    assert generate(llm.engine.model, PROMPT)[0].outputs[0].token_ids == greedy[:5]
    assert len(llm.generate(PROMPT, SamplingParams(ignore_eos=True))[0].outputs[0].token_ids) == 16


def test_a_command_takes_them_for_flags_that_are_not_given(
    model: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*flags: str) -> list[int]:
        assert main(["generate", str(model), "--prompt", PROMPT, "--dtype", "float32", "--json", *flags]) == 0
        return list(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"])

    greedy = Mistral7B.from_pretrained(model, dtype="float32")
    wanted = generate(greedy, PROMPT, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids
    assert run() == wanted[:5]
    assert run("--max-tokens", "8") == wanted
    # The flag's own default, given as such, is not replaced by the model's.
    assert run("--temperature", "0.7", "--max-tokens", "8", "--seed", "3") != wanted
    assert run("--choice", "xyz", "--max-tokens", "8") != wanted  # a constraint is kept


def test_the_bundled_model_penalizes_repetition() -> None:
    assert model_defaults(DEMO) == {"repetition_penalty": 1.1}
