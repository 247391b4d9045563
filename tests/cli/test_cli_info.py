"""`mistral-7b info`: from the configuration alone."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
from command import SHAPE
from tokenizer_files import sentencepiece_folder

from mistral_7b.cli.info import describe, readable, release
from mistral_7b.model import Mistral7B, ModelArgs

GB = 1e9


def test_facts_of_a_model(run, windowed: str) -> None:
    code, out, _ = run("info", windowed, "--context", "100", "--dtype", "float32", "--json")
    assert code == 0
    facts = json.loads(out)
    model = Mistral7B.from_pretrained(windowed)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["weights_bytes"] == 4 * facts["parameters"]
    assert facts["disk_bytes"] == sum(f.stat().st_size for f in pathlib.Path(windowed).iterdir())
    assert (facts["release"], facts["format"], facts["args"]["sliding_window"]) == ("custom", "huggingface", 8)
    assert {name: facts["args"][name] for name in SHAPE} == SHAPE


def test_cache_is_as_large_as_it_says(run, windowed: str, short: str) -> None:
    for folder, context in ((windowed, 50), (short, 50), (windowed, 5)):
        facts = json.loads(run("info", folder, "--context", str(context), "--json").out)
        ring = Mistral7B.from_pretrained(folder).rolling_cache(1, context)
        held = sum(t.nbytes for layer in ring.layers for t in (layer.k, layer.v))
        assert facts["cache_bytes"] == held
        assert facts["cache_bytes_without_window"] == facts["cache_bytes_per_token"] * context


def test_releases_are_known_by_their_numbers() -> None:
    names = [release(getattr(ModelArgs, name)()) for name in ("v0_1", "v0_2", "v0_3")]
    assert names == ["Mistral 7B v0.1", "Mistral 7B v0.2", "Mistral 7B v0.3"]
    assert release(ModelArgs(rope_theta=1e6)) == "custom"
    assert release(ModelArgs(max_seq_len=4096)) == "Mistral 7B v0.1"


def test_numbers_of_the_released_model() -> None:
    facts = describe(ModelArgs.v0_1(), 32768, "bfloat16")
    assert facts["parameters"] == 7_241_732_096  # as published for Mistral-7B-v0.1
    assert facts["weights_bytes"] == 14_483_464_192
    assert facts["cache_bytes"] == 2 * 32 * 8 * 128 * 2 * 4096  # an eighth of the size without the window
    assert facts["cache_bytes_without_window"] == 8 * facts["cache_bytes"]


def test_table_for_a_person(run, windowed: str) -> None:
    code, out, err = run("info", windowed)
    assert (code, err) == (0, "")
    for text in ("custom", "huggingface", "8 tokens a layer", "without the window", "32,768", "weights and cache"):
        assert text in out


def test_weights_are_not_needed(run, windowed: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text((pathlib.Path(windowed) / "config.json").read_text())
    assert json.loads(run("info", str(tmp_path), "--json").out)["args"]["sliding_window"] == 8


def test_a_scaled_rotary_embedding_is_shown(run, windowed: str, tmp_path: pathlib.Path) -> None:
    config = json.loads((pathlib.Path(windowed) / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    assert "yarn, factor 8, from 8,192 tokens" in run("info", str(tmp_path)).out
    facts = json.loads(run("info", str(tmp_path), "--json").out)
    assert (facts["args"]["rope_scaling"]["factor"], facts["args"]["max_seq_len"]) == (8.0, 65536)


def test_the_tokenizer_and_its_template_are_shown(run, windowed: str, tmp_path: pathlib.Path) -> None:
    told = json.loads(run("info", "demo", "--json").out)["tokenizer"]
    assert told["chat"]["name"] == "mistral-v3, by mistral-common"
    assert told["ends"] == [{"id": 2, "token": "</s>"}]
    assert "SentencePiece (tokenizer.model.v3), 4,096 tokens" in run("info", "demo").out
    folder = sentencepiece_folder(tmp_path)
    shutil.copy(pathlib.Path(windowed) / "config.json", folder)
    out = " ".join(run("info", str(folder)).out.replace("│", " ").split())
    assert "4,098 tokens, 2 of them added" in out
    assert "no chat template: choose one with --chat-template" in out
    assert "<|im_end|> (4096)" in out


@pytest.mark.parametrize("content", [None, "{", '{"model": {"type": "Unigram", "vocab": []}}'])
def test_a_tokenizer_that_cannot_be_opened_is_told_of(
    run, windowed: str, tmp_path: pathlib.Path, content: str | None
) -> None:
    (tmp_path / "config.json").write_text((pathlib.Path(windowed) / "config.json").read_text())
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    code, out, _ = run("info", str(tmp_path), "--json")
    assert (code, list(json.loads(out)["tokenizer"])) == (0, ["error"])
    code, out, _ = run("info", str(tmp_path))
    assert (code, "tokenizer" in out) == (0, True)


@pytest.mark.wording
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}", "--context", "0"], "--context must be at least 1"),
        (["{folder}", "--context", "many"], "--context"),
        (["/nowhere"], "/nowhere"),
        (["{empty}"], "an empty folder"),
    ],
)
def test_what_is_refused(run, windowed: str, tmp_path: pathlib.Path, words: list[str], message: str) -> None:
    code, out, err = run("info", *(w.format(folder=windowed, empty=tmp_path) for w in words))
    assert (code, out) == (2, "")
    assert message in err


def test_of_a_model_on_the_hub_only_the_configuration_is_fetched(run, windowed: str, monkeypatch) -> None:
    import huggingface_hub

    asked: list[object] = []

    def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
        asked.extend([repo_id, *allow_patterns])
        return windowed

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert json.loads(run("info", "some/model", "--json").out)["path"] == windowed
    assert asked[0] == "some/model"
    assert not any("safetensors" in str(name) or "*" in str(name) for name in asked)


def test_readable() -> None:
    assert [readable(n) for n in (12, 1500, 14_483_464_192)] == ["12 B", "1.5 kB", "14.48 GB"]
