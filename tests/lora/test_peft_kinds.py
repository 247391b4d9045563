"""Every kind of LoRA that PEFT saves: its logits at run time and merged, or a refusal that names the way out."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import peft
import pytest
import torch
from peft_models import KINDS, Saved, save, theirs, trained
from refusals import refused
from tiny import TINY, close, tiny_model, tokens_of
from torch import Tensor

from mistral_7b.engine.fingerprint import weights_of
from mistral_7b.errors import AdapterError, CheckpointError
from mistral_7b.lora import apply, merge, read_adapter
from mistral_7b.lora.adapters import Adapters
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import quantize

Save = Callable[[str], Saved]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    return functools.cache(lambda name: save(name, tmp_path_factory.mktemp("kind")))


def adapted_logits(model: Mistral7B, folder: pathlib.Path, tokens: Tensor) -> Tensor:
    """Logits of tokens (B, T) with an adapter: what `apply` leaves goes to `Adapters`."""
    model, rest = apply(model, read_adapter(folder, model.args))
    if rest is None:
        return model(tokens)[0]
    adapters = Adapters(model)
    adapters.load("it", rest)
    with adapters.over([("it", tokens.numel())]) as adapted:
        return adapted(tokens)[0]


@pytest.mark.parametrize("name", KINDS)
def test_at_run_time_and_merged_it_has_the_logits_of_peft(name: str, saved: Save, tmp_path: pathlib.Path) -> None:
    it = saved(name)
    base = Mistral7B.from_pretrained(it.base, dtype=torch.float32)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    close(adapted_logits(base, it.folder, it.tokens), it.logits)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    if name == "bias":
        with refused(AdapterError, field="layers.0.attention.wq"):
            merge(it.base, it.folder, tmp_path / "out", it.tokens)
        assert not (tmp_path / "out").exists()
        return
    made = merge(it.base, it.folder, tmp_path / "out", it.tokens, "drawn")
    assert made.changed > 0
    assert made.distance["kl"] < 1e-9
    merged = Mistral7B.from_pretrained(tmp_path / "out", dtype=torch.float32)
    close(merged(it.tokens)[0], it.logits)
    assert merged.args.tie_embeddings == (name in ("tied modules", "tied resized"))
    assert merged.args.vocab_size == it.logits.shape[-1]
    if it.tokens.max() < TINY.vocab_size:
        assert (it.logits[..., :60] - base(it.tokens)[0][..., :60]).abs().max() > 0.02  # a control


def test_peft_itself_opens_the_adapters_on_these_bases(saved: Save) -> None:
    for name in ("embedding", "dora", "tied module"):
        it = saved(name)
        model = peft.PeftModel.from_pretrained(theirs(it.base), it.folder).eval()
        close(model(it.tokens).logits, it.logits)


@pytest.mark.parametrize("name", ["dora", "bias", "embedding", "modules"])
def test_one_adapter_of_many_is_plain_lora(name: str, saved: Save) -> None:
    it = saved(name)
    with pytest.raises(AdapterError) as caught:
        Adapters(tiny_model()).load("it", it.folder)
    assert caught.value.hint


def test_an_unchanged_embedding_that_peft_saves_is_no_obstacle(tmp_path: pathlib.Path) -> None:
    """PEFT saves embedding and output with an adapter of lm_head."""
    tiny_model().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"])
    model = trained(peft.get_peft_model(theirs(tmp_path / "base"), config))
    model.save_pretrained(tmp_path / "adapter")
    base, tokens = tiny_model(), tokens_of((2, 21))
    adapter = read_adapter(tmp_path / "adapter", TINY)
    assert "output.weight" in adapter.weights
    assert apply(base, adapter) == (base, adapter)
    close(adapted_logits(base, tmp_path / "adapter", tokens), model(tokens).logits)


@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("name", ["dora", "modules", "embedding"])
@torch.inference_mode()
def test_over_a_quantized_base_each_row_keeps_its_bits(name: str, scheme: str, saved: Save) -> None:
    it = saved(name)
    base = quantize(tiny_model(TINY, torch.bfloat16), scheme)
    whole = adapted_logits(base, it.folder, it.tokens)
    agreement = (whole.argmax(-1) == it.logits.argmax(-1)).float().mean()
    assert agreement > (0.3 if scheme == "int4" else 0.8)
    assert (whole - base(it.tokens)[0]).abs().max() > 0.1
    if name == "dora" and scheme != "bf16":
        alone = adapted_logits(base, it.folder, it.tokens[:1])
        assert torch.equal(alone, whole[:1])


@pytest.mark.parametrize("name", ["dora", "embedding", "modules"])
def test_the_fingerprint_of_an_adapted_model_is_its_own(name: str, saved: Save) -> None:
    """Prefixes on disk are found by it."""
    base, adapter = tiny_model(), read_adapter(saved(name).folder, TINY)
    special = {target: f._replace(a=2 * f.a) for target, f in adapter.targets.items()}
    own = {target: 2 * weight for target, weight in adapter.weights.items()}
    found = [apply(base, one)[0] for one in (adapter, dataclasses.replace(adapter, targets=special, weights=own))]
    assert len({weights_of(model) for model in (base, *found)}) == 3


def test_a_model_with_an_adapter_of_its_own_is_not_saved_as_plain(saved: Save, tmp_path: pathlib.Path) -> None:
    it = saved("dora")
    model, rest = apply(tiny_model(), read_adapter(it.folder, TINY))
    assert rest is None
    with refused(CheckpointError):
        model.save_pretrained(tmp_path / "out")


def test_pissa_converted_by_peft_is_plain_lora(tmp_path: pathlib.Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj"], init_lora_weights="pissa"
    )
    model = peft.get_peft_model(theirs(tmp_path / "base"), config)
    model.peft_config["default"].init_lora_weights = True  # as the conversion asks for
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    model.eval()
    tokens = tokens_of((2, 21))
    wanted = model(tokens).logits.detach()
    model.save_pretrained(tmp_path / "raw")
    with refused(CheckpointError, field="init_lora_weights"):
        read_adapter(tmp_path / "raw", TINY)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    close(adapted_logits(tiny_model(), tmp_path / "plain", tokens), wanted)


OTHERS = {
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "loha": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], r=2),
    "adalora": peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], total_step=10),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_are_refused_with_the_way_out(name: str, saved: Save, tmp_path: pathlib.Path) -> None:
    model = peft.get_peft_model(theirs(saved("list").base), OTHERS[name])
    model.save_pretrained(tmp_path / "adapter")
    with refused(CheckpointError, field="peft_type") as caught:
        read_adapter(tmp_path / "adapter", TINY)
    assert caught.value.hint
    assert caught.value.place == str(tmp_path / "adapter" / "adapter_config.json")


@pytest.mark.wording
def test_x_lora_and_prompts_are_not_sent_to_a_merge(saved: Save, tmp_path: pathlib.Path) -> None:
    it, hints = saved("list"), {}
    weights = "adapter_model.safetensors"
    (tmp_path / weights).write_bytes((it.folder / weights).read_bytes())
    for kind in ("XLORA", "PREFIX_TUNING", "IA3"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with refused(CheckpointError, field="peft_type") as caught:
            read_adapter(tmp_path, TINY)
        hints[kind] = str(caught.value.hint)
    assert "merge_and_unload" in hints["IA3"]
    assert not any("merge_and_unload" in hints[kind] for kind in ("XLORA", "PREFIX_TUNING"))


def test_magnitudes_and_the_configuration_agree(saved: Save, tmp_path: pathlib.Path) -> None:
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    for name, dora in (("list", True), ("dora", False)):
        it = saved(name)
        (tmp_path / weights).write_bytes((it.folder / weights).read_bytes())
        data = json.loads((it.folder / config).read_text())
        (tmp_path / config).write_text(json.dumps({**data, "use_dora": dora}))
        with refused(CheckpointError, field="use_dora"):
            read_adapter(tmp_path, TINY)
