"""Merging: exact in float32 and rounded once, in every format, with a distance that tells a wrong merge."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch
from refusals import refused
from test_adapters import adapter_of
from tiny import TINY, tiny_args, tiny_model, tokens_of
from torch import Tensor

from mistral_7b.checkpoint import convert, quantize
from mistral_7b.errors import AdapterError, CheckpointError, QuantizationError
from mistral_7b.lora import merge, merging
from mistral_7b.lora.adapters import Adapters
from mistral_7b.lora.files import Adapter, save_adapter
from mistral_7b.model import Mistral7B
from mistral_7b.quantization.distance import Comparison

WIDE = tiny_args(dim=64, head_dim=16, n_heads=4, n_kv_heads=2, hidden_dim=96)  # rows of whole blocks of 32
TOKENS = tokens_of((2, 21))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A bfloat16 model; a file of a tokenizer lies beside it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model(WIDE, torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"of": "base"}')
    return folder


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return adapter_of(WIDE, 4, 3, lambda name: "wq" in name or "w2" in name or name == "output")


def test_a_merged_weight_is_rounded_once_and_the_others_are_kept(
    base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    made = merge(base, adapter, tmp_path / "out", TOKENS, "drawn")
    before = Mistral7B.from_pretrained(base).state_dict()
    after = Mistral7B.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in before.items():
        if factors := adapter.targets.get(name.removesuffix(".weight")):
            exact = weight.double() + factors.scale * factors.b.double() @ factors.a.double()
            off = (after[name].double() - exact).abs()
            assert (off <= exact.abs() * 2**-8).all()  # half a unit in the last place of bfloat16, and float32
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)
    assert (made.weights, made.changed, made.dtype, made.dequantized) == (5, 5, "bfloat16", 0)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["distance"] == made.distance
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"of": "base"}'


@pytest.mark.filterwarnings("ignore:there is no tokenizer.model")
@pytest.mark.parametrize("to", ["mistral", "gguf"])
def test_every_format_has_the_same_weights(
    to: str, base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    merge(base, adapter, tmp_path / "hf", TOKENS)
    source = tmp_path / "source"
    convert(base, source, to=to)
    merge(source, adapter, tmp_path / "out", TOKENS, to=to)
    wanted, got = (Mistral7B.from_pretrained(tmp_path / name).state_dict() for name in ("hf", "out"))
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def measured(base: pathlib.Path, adapter: Adapter, out: pathlib.Path, tokens: Tensor) -> dict[str, float]:
    """The distance from whole models: rows through `Adapters`, and the merged model as it is opened."""
    model, merged, comparison = Mistral7B.from_pretrained(base), Mistral7B.from_pretrained(out), Comparison()
    adapters = Adapters(model)
    adapters.load("it", adapter)
    with torch.inference_mode(), adapters.over([("it", tokens.numel())]) as adapted:
        pair = [m(tokens)[0][:, :-1].flatten(0, 1) for m in (adapted, merged)]
    comparison.add(*pair, tokens[:, 1:].flatten())
    return comparison.result("")


def test_the_distance_is_that_of_the_whole_models(
    base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    made = merge(base, adapter, tmp_path / "out", TOKENS, "drawn")
    wanted = measured(base, adapter, tmp_path / "out", TOKENS)
    assert made.distance["tokens"] == wanted["tokens"] == 40
    assert 1e-6 < made.distance["kl"] < 1e-2
    assert made.distance["kl"] == pytest.approx(wanted["kl"], rel=0.5)
    assert made.distance["perplexity_original"] == pytest.approx(wanted["perplexity_original"], rel=0.01)


def test_trap_22_a_wrong_merge_shows_in_the_distance(
    base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merge(base, adapter, tmp_path / "right", TOKENS).distance["kl"]
    plain = merging.updated
    monkeypatch.setattr(merging, "updated", lambda w, f: plain(w, f._replace(scale=2 * f.scale)))
    assert merge(base, adapter, tmp_path / "wrong", TOKENS).distance["kl"] > max(0.01, 10 * right)


def scaled(adapter: Adapter, scale: float) -> Adapter:
    return Adapter({name: f._replace(scale=scale) for name, f in adapter.targets.items()})


def test_trap_26_a_merge_that_changes_nothing_is_refused(
    base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    zero = Adapter({name: f._replace(b=torch.zeros_like(f.b)) for name, f in adapter.targets.items()})
    for nothing in (zero, scaled(adapter, 1e-9)):
        with refused(AdapterError, field="adapter"):
            merge(base, nothing, tmp_path / "out", TOKENS)
    with refused(AdapterError, field="layers.0.attention.wq.weight"):
        merge(base, scaled(adapter, float("1e39")), tmp_path / "out", TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_is_said_before_any_work(
    base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(merging._Merging, "measure", never)
    quantize(base, tmp_path / "int4", "int4", TOKENS, "drawn")
    with refused(QuantizationError, field="quantization", place=tmp_path / "int4"):
        merge(tmp_path / "int4", adapter, tmp_path / "out", TOKENS, into="int8")
    with refused(CheckpointError, field="type"):
        merge(base, adapter, tmp_path / "out.gguf", TOKENS, into="int4", to="gguf")
    with refused(CheckpointError, place=tmp_path):
        merge(base, adapter, tmp_path, TOKENS)
    for tokens in (tokens_of((1, 1)), torch.full((1, 4), TINY.vocab_size)):
        with refused(AdapterError, field="tokens"):
            merge(base, adapter, tmp_path / "out", tokens)
    (tmp_path / "file.gguf").touch()
    with refused(CheckpointError, place=tmp_path / "file.gguf"):
        merge(base, adapter, tmp_path / "file.gguf", TOKENS, to="gguf")
    save_adapter(adapter_of(TINY, 4, 3), tmp_path / "other", TINY)
    with refused(CheckpointError):
        merge(base, tmp_path / "other", tmp_path / "out", TOKENS)
    assert not (tmp_path / "out").exists()


def test_trap_22_an_adapter_is_merged_into_the_quantized_weights_it_was_trained_on(
    base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    """Of a folder of `quantize`, or quantized on the way: the same model, near the adapter over int4 alone."""
    quantize(base, tmp_path / "int4", "int4", TOKENS, "drawn")
    of_folder = merge(tmp_path / "int4", adapter, tmp_path / "folder", TOKENS)
    on_the_way = merge(base, adapter, tmp_path / "way", TOKENS, into="int4")
    assert of_folder.into == on_the_way.into == "int4"
    assert of_folder.dequantized == on_the_way.dequantized == 16
    assert of_folder.distance == on_the_way.distance
    unquantized = on_the_way.unquantized_distance
    assert of_folder.unquantized_distance is None
    assert unquantized is not None
    assert on_the_way.distance["kl"] < 1e-3
    assert unquantized["kl"] > 10 * on_the_way.distance["kl"]
    first, second = (Mistral7B.from_pretrained(tmp_path / name).state_dict() for name in ("folder", "way"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    served = Mistral7B.from_pretrained(tmp_path / "int4")
    for name, weight in first.items():
        if name.endswith("norm.weight"):
            continue
        target = name.removesuffix(".weight")
        exact = served.get_submodule(target).dequantized().double()  # type: ignore[operator]
        if f := adapter.targets.get(target):
            exact = exact + f.scale * f.b.double() @ f.a.double()
        assert ((weight.double() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.filterwarnings("ignore:there is no tokenizer.model")
def test_a_quantized_gguf_is_dequantized_and_says_so(
    base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    convert(base, tmp_path / "q8.gguf", to="gguf", type="q8_0")
    plain = Mistral7B.from_pretrained(tmp_path / "q8.gguf", dtype=torch.float32)
    made = merge(tmp_path / "q8.gguf", adapter, tmp_path / "out", TOKENS)
    assert (made.dequantized, made.dtype) == (16, "float32")
    name = "layers.0.attention.wq"
    got = Mistral7B.from_pretrained(tmp_path / "out", dtype=torch.float32).get_submodule(name).weight
    f = adapter.targets[name]
    dequantized = plain.get_submodule(name).dequantized()  # type: ignore[operator]
    torch.testing.assert_close(got, dequantized + f.scale * f.b @ f.a, atol=1e-6, rtol=1e-6)
    with refused(CheckpointError, field="type"):
        merge(tmp_path / "q8.gguf", adapter, tmp_path / "again.gguf", TOKENS, to="gguf")
    merge(tmp_path / "q8.gguf", adapter, tmp_path / "again.gguf", TOKENS, to="gguf", type="q8_0")
    assert (tmp_path / "again.gguf").stat().st_size == (tmp_path / "q8.gguf").stat().st_size


def peft_folder(adapter: Adapter, folder: pathlib.Path, *files: str) -> pathlib.Path:
    save_adapter(adapter, folder, WIDE)
    for name in files:
        (folder / name).write_text(f"{name} of the adapter")
    return folder


@pytest.mark.parametrize("words", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_beside_the_adapter_replaces_that_of_the_base(
    words: str, base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    (source / "tokenizer.model.v3").write_text("of the base")
    (source / "generation_config.json").write_text('{"eos_token_id": 5}')
    own = peft_folder(adapter, tmp_path / "own", words, "added_tokens.json", "training_args.bin")
    merge(source, own, tmp_path / "out", TOKENS)
    found = {file.name for file in (tmp_path / "out").iterdir()}
    weights = {"config.json", "generation_config.json", "merge.json", "model.safetensors"}
    assert found == {*weights, words, "added_tokens.json"}
    assert (tmp_path / "out" / words).read_text() == f"{words} of the adapter"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 5}
    merge(source, peft_folder(adapter, tmp_path / "plain"), tmp_path / "kept", TOKENS)
    assert (tmp_path / "kept" / "tokenizer.model.v3").read_text() == "of the base"


def test_the_record_names_no_folder_of_this_machine(
    base: pathlib.Path, adapter: Adapter, tmp_path: pathlib.Path
) -> None:
    merge(base, peft_folder(adapter, tmp_path / "mine"), tmp_path / "out", TOKENS)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["base"], record["adapter"]) == ("model", "mine/adapter_model.safetensors")
