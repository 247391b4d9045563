"""`verify`: each kind of damage is found, and sound files of all formats pass."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_args, tiny_model

from mistral_7b.checkpoint import convert, quantize
from mistral_7b.cli import main
from mistral_7b.errors import Mistral7BError
from mistral_7b.evaluation import verify, verify_model
from mistral_7b.lora.files import Adapter, Factors, save_adapter

DATA = MistralTokenizer._data_path()
V1_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    out = tmp_path / "model"
    tiny_model(tiny_args(vocab_size=32768), torch.bfloat16).save_pretrained(out)
    shutil.copy(DATA / "mistral_instruct_tokenizer_240323.model.v3", out / "tokenizer.model.v3")
    return out


def bad(path: pathlib.Path) -> set[str]:
    report = verify_model(path)
    assert report.ok == (not any(f.mark == "bad" for f in report.findings))
    return {finding.check for finding in report.findings if finding.mark == "bad"}


def change(folder: pathlib.Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors | ({} if value is None else {name: value}), folder / "model.safetensors")


def test_sound_files_of_every_format(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    convert(folder, tmp_path / "mistral", "mistral")
    convert(folder, tmp_path / "model.gguf", "gguf")
    quantize(folder, tmp_path / "int8", "int8", torch.tensor([[1, 5, 6, 7]]), "ids")
    for path in (folder, tmp_path / "mistral", tmp_path / "model.gguf", tmp_path / "int8"):
        report = verify_model(path)
        assert report.ok, report
        by_check = {f.check: f for f in report.findings}
        assert by_check["tensors"].mark == "ok"
        assert "v3" in by_check["chat template"].text
    demo = verify_model("demo")
    assert demo.ok
    assert [f.mark for f in demo.findings if f.check == "hash"] == ["ok"]


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("check", "value"),
    [
        ("finite values", "nan"), ("finite values", "inf"), ("zeros", "zeros"), ("tensors", "shape"),
        ("tensors", "missing"), ("tensors", "type"),
    ],
)  # fmt: skip
def test_a_damaged_tensor(folder: pathlib.Path, check: str, value: str) -> None:
    tensor = load_file(folder / "model.safetensors")[GATE]
    if value in ("nan", "inf"):
        tensor[3, 5] = float(value)
    new = {"zeros": tensor * 0, "shape": tensor[:-1], "missing": None, "type": tensor.to(torch.int8)}
    change(folder, GATE, new.get(value, tensor))
    assert bad(folder) == {check}
    found = next(f for f in verify_model(folder).findings if f.mark == "bad")
    assert found.field in (GATE, "layers.1.feed_forward.w1.weight")


def test_an_outlier_is_noted(folder: pathlib.Path) -> None:
    tensor = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tensor[3, 5] = 1e6
    change(folder, "model.embed_tokens.weight", tensor)
    notes = [f.check for f in verify_model(folder).findings if f.mark == "note"]
    assert "outliers" in notes
    assert bad(folder) == set()


def test_a_quantized_folder_with_a_broken_scale(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantize(folder, tmp_path / "int8", "int8", torch.tensor([[1, 5, 6, 7]]), "ids")
    file = tmp_path / "int8" / "quantized.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(".d"))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    assert bad(tmp_path / "int8") == {"finite values"}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_folders(folder: pathlib.Path, tmp_path: pathlib.Path, scheme: str, calibrated: bool) -> None:
    ids, out = torch.arange(1, 33)[None], tmp_path / scheme
    quantize(folder, out, scheme, ids, "ids", calibration_tokens=ids if calibrated else None)
    report = verify_model(out)
    assert report.ok, report
    assert scheme in next(f.text for f in report.findings if f.check == "tensors")
    file = out / "quantized.safetensors"
    sound = load_file(file)
    wq = "layers.0.attention.wq"
    for check, changed in {
        "zeros": {f"{wq}.d": sound[f"{wq}.d"] * 0},
        "finite values": {f"{wq}.d": sound[f"{wq}.d"] * float("inf")},
        "tensors": {f"{wq}.codes": sound[f"{wq}.codes"][:-1]},
    }.items():
        save_file(sound | changed, file)
        assert bad(out) == {check}
    save_file({name: t for name, t in sound.items() if name != f"{wq}.d"}, file)
    assert bad(out) == {"tensors"}
    file.write_bytes(file.read_bytes()[:-100])
    assert bad(out) == {"tensors"}


def test_codes_of_zeros_are_found(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantize(folder, tmp_path / "int4", "int4", torch.tensor([[1, 5, 6, 7]]), "ids")
    file = tmp_path / "int4" / "quantized.safetensors"
    tensors = load_file(file)
    tensors["layers.0.attention.wq.codes"].zero_()
    save_file(tensors, file)
    assert bad(tmp_path / "int4") == {"zeros"}


def test_an_adapter(folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = tiny_args(vocab_size=32768)
    factors = Factors(torch.ones(2, args.n_heads * args.head_dim), torch.ones(args.dim, 2), 1.0)

    def failed(name: str, own: Factors, layer: int = 0) -> set[str]:
        adapter = Adapter({f"layers.{layer}.attention.wo": own}, base_model="tiny")
        save_adapter(adapter, tmp_path / name, args)
        found = verify_model(folder, adapter=tmp_path / name)
        return {finding.check for finding in found.findings if finding.mark == "bad"}

    assert failed("sound", factors) == set()
    assert failed("broken", factors._replace(b=factors.b * float("nan"))) == {"adapter's values"}
    assert failed("zero", factors._replace(b=factors.b * 0)) == {"adapter's effect"}
    assert failed("narrow", factors._replace(a=factors.a[:, 2:])) == {"adapter"}
    assert failed("deep", factors, layer=7) == {"adapter"}
    assert main(["verify", str(folder), "--adapter", str(tmp_path / "deep"), "--json"]) == 1
    assert "of another model, tiny" in capsys.readouterr().out
    assert main(["verify", str(folder), "--adapter", str(folder)]) == 1
    assert main(["verify", str(folder), "--adapter", str(tmp_path / "nowhere")]) == 2


def test_a_tokenizer_of_another_model(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "small"
    tiny_model(tiny_args(vocab_size=32000), torch.bfloat16).save_pretrained(out)
    shutil.copy(DATA / "mistral_instruct_tokenizer_240323.model.v3", out / "tokenizer.model.v3")
    assert bad(out) == {"tokenizer"}
    (out / "tokenizer.model.v3").write_bytes(b"nonsense")
    assert bad(out) == {"tokenizer"}


def test_a_template_of_another_version(folder: pathlib.Path) -> None:
    config = {"chat_template": V1_TEMPLATE, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert bad(folder) == {"chat template"}
    config["chat_template"] = V1_TEMPLATE.replace("[INST] ", "<|user|>").replace(" [/INST]", "<|assistant|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert bad(folder) == set()  # a fine-tune's own


def test_golden_ids_are_those_of_mistral_common() -> None:
    from mistral_7b import Tokenizer

    messages = [{"role": role, "content": text} for role, text in verify.TURNS]
    for version, ids in verify.GOLDEN.items():
        assert getattr(Tokenizer, version)().encode_chat(messages) == ids


def test_theta_and_window(folder: pathlib.Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(config | {"rope_theta": 1e6, "sliding_window": 4096}))
    assert bad(folder) == {"theta and window"}
    path.write_text(json.dumps(config | {"rope_theta": 1e4, "sliding_window": 0}))
    assert bad(folder) == {"configuration"}
    path.write_text(json.dumps(config | {"rope_theta": 1e4, "sliding_window": 500}))
    notes = {f.check for f in verify_model(folder).findings if f.mark == "note"}
    assert "theta and window" in notes


def test_a_known_file_with_other_bytes(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setitem(verify.KNOWN, "model.safetensors", verify.Known("x", size, "0" * 64))
    assert bad(folder) == {"hash"}


def test_the_command(folder: pathlib.Path, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    assert main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    change(folder, GATE, None)
    assert main(["verify", str(folder)]) == 1
    assert "✗" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty")]) == 2
    with refused(Mistral7BError):
        verify_model(tmp_path / "nowhere")
