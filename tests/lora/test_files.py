"""LoRA adapters: PEFT's logits from its files, our files in PEFT, mistral-finetune, and errors."""

from __future__ import annotations

import json
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import TINY, close, tiny_args, tiny_model, tokens_of
from torch import Tensor
from transformers import MistralForCausalLM

from mistral_7b import CheckpointError, ModelArgs
from mistral_7b.lora.adapters import Adapters
from mistral_7b.lora.files import Adapter, Factors, read_adapter, save_adapter
from mistral_7b.model import Mistral7B

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "one rank": {"r": 8, "lora_alpha": 16, "target_modules": TARGETS},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": [*TARGETS, "lm_head"],
        "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.k_proj": 7, "model.layers.0.mlp.down_proj": 1},
        "alpha_pattern": {"(q|v)_proj": 5, ".*.1.mlp.gate_proj": 2},
    },
    "rslora": {
        "r": 5, "lora_alpha": 9, "target_modules": ["q_proj", "k_proj", "up_proj"], "use_rslora": True,
        "rank_pattern": {"k_proj": 2}, "layers_to_transform": [1], "init_lora_weights": "gaussian",
    },
}  # fmt: skip
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model().save_pretrained(folder)
    return folder


def theirs(base: pathlib.Path) -> MistralForCausalLM:
    return MistralForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def peft_model(base: pathlib.Path, name: str) -> PeftModel:
    """A PEFT model with random factors, so that each one affects the logits."""
    model = get_peft_model(
        theirs(base), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **CONFIGS[name])
    ).eval()
    draw = torch.Generator().manual_seed(len(name))
    for parameter, value in model.named_parameters():
        if "lora_" in parameter:
            value.data.copy_(0.3 * torch.randn(value.shape, generator=draw) / value.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def saved(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[pathlib.Path, Tensor]]:
    """For each configuration the folder written by PEFT, and PEFT's logits."""
    out = {}
    for name in CONFIGS:
        folder = tmp_path_factory.mktemp("peft") / "adapter"
        model = peft_model(base, name)
        model.save_pretrained(folder, save_embedding_layers=False)
        out[name] = folder, model(tokens_of((2, 21))).logits.detach()
    return out


def ours(source: pathlib.Path | Adapter, model: Mistral7B | None = None) -> Tensor:
    adapters = Adapters(model or tiny_model())
    adapters.load("it", source)
    with adapters.over([("it", 42)]) as adapted:
        return adapted(tokens_of((2, 21)))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_trap_09_an_adapted_model_has_the_logits_of_peft(name: str, saved: dict[str, Any]) -> None:
    folder, wanted = saved[name]
    close(ours(folder), wanted)
    assert (wanted - tiny_model()(tokens_of((2, 21)))[0]).abs().max() > 0.1
    adapter = read_adapter(folder / WEIGHTS, TINY)
    ranks = {f.a.shape[0] for f in adapter.targets.values()}
    assert ranks == {"one rank": {8}, "patterns": {4, 3, 7, 1}, "rslora": {5, 2}}[name]
    assert adapter.rank == max(ranks)
    assert ("output" in adapter.targets) == (name == "patterns")


def test_trap_09_rows_of_b_left_as_they_are_would_be_seen(saved: dict[str, Any]) -> None:
    folder, wanted = saved["one rank"]
    right = read_adapter(folder, TINY)
    raw = load_file(folder / WEIGHTS)
    key = "layers.0.attention.wk"
    as_stored = raw[Q0.format("B").replace("q_proj", "k_proj")]
    assert not torch.equal(right.targets[key].b, as_stored)
    wrong = Adapter({**right.targets, key: right.targets[key]._replace(b=as_stored)})
    assert (ours(wrong) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_opens_what_is_written_here(
    name: str, base: pathlib.Path, saved: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    folder, wanted = saved[name]
    save_adapter(read_adapter(folder, TINY), tmp_path / "again", TINY, base_model="org/base")
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that it misses or does not know
        model = PeftModel.from_pretrained(theirs(base), tmp_path / "again").eval()
    close(model(tokens_of((2, 21))).logits, wanted)
    assert read_adapter(tmp_path / "again", TINY).base_model == "org/base"


def test_mistral_finetune_writes_and_reads_in_this_layout(tmp_path: pathlib.Path) -> None:
    def factors(r: int, scale: float) -> Factors:
        return Factors(torch.randn(r, TINY.dim), torch.randn(60, r), scale)

    adapter = Adapter({"layers.0.attention.wq": factors(4, 2.0), "layers.1.attention.wq": factors(4, 0.5)})
    save_adapter(adapter, tmp_path / "lora", TINY, "mistral")
    stored = load_file(tmp_path / "lora" / "lora.safetensors")
    assert stored.keys() == {f"layers.{n}.attention.wq.lora_{half}.weight" for n in (0, 1) for half in "AB"}
    first, second = adapter.targets.values()
    assert torch.equal(stored["layers.0.attention.wq.lora_B.weight"], first.b)  # rows in Mistral's order
    assert torch.equal(stored["layers.1.attention.wq.lora_B.weight"], second.b / 4)
    again = read_adapter(tmp_path / "lora", TINY)
    assert [f.scale for f in again.targets.values()] == [2.0, 2.0]
    assert torch.equal(ours(again), ours(adapter))

    save_file(stored, tmp_path / "alone.safetensors")  # scale 2 without params.json, else its value
    assert read_adapter(tmp_path / "alone.safetensors", TINY).targets["layers.0.attention.wq"].scale == 2.0
    (tmp_path / "params.json").write_text(json.dumps({"dim": 40, "lora": {"enable": True, "scaling": 3}}))
    assert read_adapter(tmp_path / "alone.safetensors", TINY).targets["layers.0.attention.wq"].scale == 3.0


def test_a_pickle_opens_as_tensors_alone(saved: dict[str, Any], tmp_path: pathlib.Path) -> None:
    folder, wanted = saved["one rank"]
    shutil.copy(folder / CONFIG, tmp_path)
    torch.save(load_file(folder / WEIGHTS), tmp_path / "adapter_model.bin")
    close(ours(tmp_path), wanted)
    ran = tmp_path / "ran"

    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return pathlib.Path.touch, (ran,)

    torch.save({Q0.format("A"): Bad()}, tmp_path / "adapter_model.bin")
    with refused(CheckpointError, place=tmp_path / "adapter_model.bin"):
        read_adapter(tmp_path, TINY)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True), ("use_dora", "yes"), ("use_rslora", 1),
        ("fan_in_fan_out", True), ("megatron_config", {"a": 1}), ("layer_replication", [[0, 1]]),
        ("lora_bias", 3), ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
        ("use_qalora", True), ("trainable_token_indices", [3]), ("target_parameters", ["w"]),
        ("alora_invocation_tokens", [1]), ("something_of_tomorrow", "yes"), ("peft_type", "IA3"),
        ("peft_type", ["LORA"]),
        ("r", None), ("r", "8"), ("lora_alpha", -1), ("lora_alpha", True), ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": "many"}), ("alpha_pattern", {"((a)+)+": 1}), ("alpha_pattern", {"(": 1}),
        ("rank_pattern", {"a*b*c*d*e*": 1}),
    ],
)  # fmt: skip
def test_other_kinds_of_adapter_are_refused_by_name(
    field: str, value: Any, saved: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(saved["one rank"][0], tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, field: value}))
    with refused(CheckpointError, field=field, place=folder / CONFIG):
        read_adapter(folder, TINY)


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return change


EMBEDDING = "base_model.model.model.embed_tokens."
QKV, MAGNITUDE = Q0.format("A").replace("q_proj", "qkv_proj"), Q0.format("lora_magnitude_vector")
BASE = "base_model.model.lm_head.base_layer.weight"
BAD: list[tuple[Callable[[dict[str, Tensor]], Any], str | None]] = [
    (lambda t: t.pop(Q0.format("A")), Q0.format("B")),
    (lambda t: t.update({Q0.format("A"): torch.zeros(8, 41)}), Q0.format("A")),
    (lambda t: t.update({Q0.format("B"): torch.zeros(30, 8)}), Q0.format("B")),
    (lambda t: t.update({Q0.format("B"): torch.zeros(60, 7)}), Q0.format("B")),
    (lambda t: t.update({Q0.format("A"): torch.zeros(())}), Q0.format("A")),
    (lambda t: t.update({Q0.format("A"): torch.zeros(8, 40).byte()}), Q0.format("A")),
    (
        lambda t: t.update({Q0.format("A"): torch.zeros(3, 40), Q0.format("B"): torch.zeros(60, 3)}),
        "model.layers.0.self_attn.q_proj",
    ),
    (
        renamed(Q0.format("A"), Q0.format("A").replace("layers.0", "layers.2")),
        Q0.format("A").replace("layers.0", "layers.2"),
    ),
    (
        renamed(Q0.format("A"), QKV),
        QKV,
    ),
    (renamed(Q0.format("A"), MAGNITUDE), MAGNITUDE),
    (renamed(Q0.format("A"), EMBEDDING + "lora_embedding_A"), EMBEDDING + "lora_embedding_A"),
    (renamed(Q0.format("A"), EMBEDDING + "lora_A.weight"), EMBEDDING + "lora_A.weight"),
    (lambda t: t.update({EMBEDDING + "weight": torch.zeros(67, 48)}), EMBEDDING + "weight"),
    (lambda t: t.update({EMBEDDING + "weight": torch.zeros(69, 40)}), EMBEDDING + "weight"),
    (lambda t: t.update({BASE: torch.zeros(69, 40), EMBEDDING + "weight": torch.zeros(68, 40)}), BASE),
    (lambda t: t.update({BASE: torch.zeros(67, 40).byte()}), BASE),
    (lambda t: t.clear(), None),
]


@pytest.mark.parametrize(("change", "field"), BAD)
def test_what_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], Any], field: str | None, saved: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(saved["one rank"][0], tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with refused(CheckpointError, field=field, place=folder / WEIGHTS):
        read_adapter(folder, TINY)


def test_places_without_an_adapter_are_named(saved: dict[str, Any], tmp_path: pathlib.Path) -> None:
    shutil.copy(saved["one rank"][0] / WEIGHTS, tmp_path)
    with refused(CheckpointError, place=tmp_path / WEIGHTS):
        read_adapter(tmp_path, TINY)
    with refused(CheckpointError, place=tmp_path / "nowhere"):
        read_adapter(tmp_path / "nowhere", TINY)
    for args in (tiny_args(dim=48), tiny_args(n_heads=3)):
        with refused(CheckpointError, place=saved["one rank"][0] / WEIGHTS):
            read_adapter(saved["one rank"][0], args)
    with refused(CheckpointError, field="format"):
        save_adapter(Adapter({}), tmp_path / "x", ModelArgs(), "huggingface")
    with refused(CheckpointError, place=tmp_path):
        save_adapter(read_adapter(saved["one rank"][0], TINY), tmp_path, TINY)
