"""compare(): equal models in all formats, noise of rounding, and faults with the cause that is proved.

The faults of every kind in every format are made in experiments/compare_faults.py on real weights; a few are here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
import struct
from collections.abc import Callable

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_args, tiny_model, tokens_of
from torch import Tensor

from mistral_7b import Mistral7B, ModelArgs
from mistral_7b.bench.quality import engines
from mistral_7b.checkpoint import convert, quantize
from mistral_7b.checkpoint.hub import DEMO
from mistral_7b.errors import BenchmarkError, CheckpointError, EvaluationError
from mistral_7b.evaluation import compare
from mistral_7b.evaluation.comparison.engine import Ran
from mistral_7b.evaluation.comparison.figures import Figures
from mistral_7b.evaluation.comparison.plot import draw
from mistral_7b.evaluation.comparison.result import lines
from mistral_7b.lora.files import Adapter, Factors, save_adapter
from mistral_7b.quantization.distance import Comparison

WIDE = tiny_args(dim=64, head_dim=16, n_heads=4, n_kv_heads=2, hidden_dim=96)  # rows of whole blocks of 32
TOKENS = tokens_of((2, 21), WIDE)
pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer.model")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model(WIDE, torch.bfloat16).save_pretrained(folder)
    return folder


def edited(base: pathlib.Path, out: pathlib.Path, **config: object) -> pathlib.Path:
    """A copy with other settings."""
    shutil.copytree(base, out)
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


@pytest.mark.parametrize(("to", "type"), [("mistral", None), ("gguf", None), ("gguf", "f32")])
def test_the_same_weights_in_another_format_have_no_distance(
    base: pathlib.Path, tmp_path: pathlib.Path, to: str, type: str | None
) -> None:
    convert(base, tmp_path / "out", to, type=type)
    result = compare(base, tmp_path / "out", TOKENS)
    assert (result.verdict, result.kld, result.causes, result.parts_at) == ("noise", 0.0, (), None)
    assert all(place.error == 0 for place in result.growth)
    assert [place.module for place in result.growth][:3] == [
        "tok_embeddings", "layers.0.attention", "layers.0.feed_forward"
    ]  # fmt: skip


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_rounding_is_noise_of_the_expected_size(base: pathlib.Path, tmp_path: pathlib.Path, type: str) -> None:
    convert(base, tmp_path / "out.gguf", "gguf", type=type)
    result = compare(base, tmp_path / "out.gguf", TOKENS)
    assert result.verdict == "noise"
    assert 0.2 < result.kld / result.expected_kld < 3
    assert 0.2 < result.rounding.error / result.rounding.bound < 1


def test_another_model_hidden_in_coarse_rounding_is_found_by_its_effect(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """An error of w2 that is small beside its weights, and in the direction of its inputs."""
    same = torch.full((1, 21), 5)
    model = tiny_model(WIDE)
    w2, inputs = model.layers[1].get_submodule("feed_forward.w2"), []
    hook = w2.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0, -1]))
    with torch.no_grad():
        model(same)
        update = torch.outer(torch.randn(64, generator=torch.Generator().manual_seed(3)), inputs[0])
        w2.weight += 0.1 * w2.weight.norm() / update.norm() * update
    hook.remove()
    model.save_pretrained(tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "other.gguf", "gguf", type="q4_0")
    result = compare(base, tmp_path / "other.gguf", same)
    assert not result.unexplained
    assert result.kld > 3 * result.expected_kld
    assert result.verdict == "fault"
    assert result.parts_at is not None


def with_tensors(base: pathlib.Path, out: pathlib.Path, change: object) -> pathlib.Path:
    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, out / "model.safetensors")
    return out


def unpermuted(tensors: dict[str, torch.Tensor]) -> None:
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        for layer in range(2):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            rows = tensors[key]
            order = [h * 16 + i // 2 + i % 2 * 8 for h in range(heads) for i in range(16)]
            tensors[key] = rows[order].contiguous()


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    a, b = (f"model.layers.1.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm"))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def scaled(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] *= 8


@pytest.mark.parametrize(
    ("change", "cause", "module"),
    [
        (unpermuted, "qk_not_permuted", "layers.0.attention.wq"),
        (swapped, "norms_swapped", "layers.1.attention_norm"),
        (scaled, "embedding_scale", "tok_embeddings"),
    ],
)
def test_a_tensor_at_fault_is_named_and_the_cause_proved(
    base: pathlib.Path, tmp_path: pathlib.Path, change: object, cause: str, module: str
) -> None:
    result = compare(base, with_tensors(base, tmp_path / "out", change), TOKENS)
    assert (result.verdict, result.parts_at) == ("fault", module)
    (found,) = result.causes
    assert (found.cause, found.proved) == (cause, True)
    assert found.after < 1e-9 < found.before == result.kld


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"sliding_window": None}, "window_ignored"),
        ({"sliding_window": 9}, "window_off_by_one"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_theta"),
        ({"rms_norm_eps": 1e-2}, "norm_eps"),
    ],
)
def test_a_setting_at_fault_is_named_and_the_cause_proved(
    base: pathlib.Path, tmp_path: pathlib.Path, config: dict[str, object], cause: str
) -> None:
    result = compare(base, edited(base, tmp_path / "out", **config), TOKENS)
    assert result.verdict == "fault"
    (found,) = result.causes
    assert (found.cause, found.proved) == (cause, True)
    assert found.after < 1e-9 < found.before


def test_two_causes_are_undone_one_after_another(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = with_tensors(base, tmp_path / "out", unpermuted)
    both = edited(out, tmp_path / "both", sliding_window=None)
    result = compare(base, both, TOKENS)
    assert [c.cause for c in result.causes] == ["qk_not_permuted", "window_ignored"]
    first, second = result.causes
    assert result.kld == first.before > first.after == second.before > second.after
    assert first.proved
    assert second.proved


def test_a_window_longer_than_the_rows_is_noted_and_no_fault(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = compare(base, edited(base, tmp_path / "out", sliding_window=None), TOKENS[:, :8])
    assert result.verdict == "noise"
    assert any("sliding_window" in note for note in result.notes)


def test_an_unknown_change_is_a_fault_without_a_cause(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3] = 0  # one row

    result = compare(base, with_tensors(base, tmp_path / "out", damage), TOKENS)
    assert (result.verdict, result.causes) == ("fault", ())
    assert [d.name for d in result.unexplained] == ["layers.1.feed_forward.w3.weight"]
    assert result.parts_at == "layers.1.feed_forward.w3"


def test_an_adapter_that_is_not_applied(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 64, generator=draw) * 0.05, torch.randn(64, 2, generator=draw) * 0.05
    save_adapter(Adapter({"layers.1.attention.wq": Factors(a, b, 2.0)}), tmp_path / "adapter", WIDE)
    source = f"{base}+{tmp_path / 'adapter'}"
    convert(base, tmp_path / "b.gguf", "gguf", type="q8_0")  # its update is a few times the rounding error
    result = compare(source, tmp_path / "b.gguf", TOKENS)
    assert (result.verdict, result.parts_at) == ("fault", "layers.1.attention.wq")
    assert [(c.cause, c.proved) for c in result.causes] == [("adapter_not_applied", True)]
    assert compare(source, source, TOKENS).verdict == "noise"


def test_the_bundled_models_tokens_tell_a_missing_bos(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(DEMO, out)
    (out / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    result = compare("demo", out, "import os\n\ndef main():\n    return os.getcwd()\n")
    assert result.verdict == "fault"
    assert [(c.cause, c.module, c.proved) for c in result.causes] == [("bos_missing", "tokenizer", True)]


def engine_of(
    base: pathlib.Path, args: ModelArgs, wrong: Callable[[Mistral7B], object]
) -> Callable[[Tensor], Ran]:
    """Another engine: the model in float32, changed by `wrong`, with the states of each half of each layer."""
    model = Mistral7B(args, dtype=torch.float32)
    model.load_state_dict(tiny_model(WIDE, torch.bfloat16).float().state_dict())
    wrong(model)

    def run(tokens: Tensor) -> Ran:
        states: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
            for block in model.layers
            for module in (block.get_submodule("attention_norm"), block.get_submodule("ffn_norm"))
        ]
        hooks.append(model.norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0])))
        with torch.no_grad():
            logits = model(tokens)[0]
        for hook in hooks:
            hook.remove()
        return Ran(logits, states)

    return run


def test_an_engine_that_ignores_the_window(base: pathlib.Path) -> None:
    sound = engine_of(base, WIDE, lambda model: None)
    deaf = engine_of(base, dataclasses.replace(WIDE, sliding_window=None), lambda model: None)
    for states in (False, True):

        def ran(engine: Callable[[Tensor], Ran], tokens: Tensor, states: bool = states) -> Ran:
            found = engine(tokens)
            return found if states else Ran(found.logits)

        assert compare(base, base, TOKENS, run_b=functools.partial(ran, sound)).verdict == "noise"
        result = compare(base, base, TOKENS, run_b=functools.partial(ran, deaf))
        module = "layers.0.attention" if states else "engine"
        assert [(c.cause, c.module, c.proved) for c in result.causes] == [("window_ignored", module, True)]
        assert result.parts_at == module


def test_an_engines_fault_is_placed_by_its_hidden_states_though_the_logits_hide_it(base: pathlib.Path) -> None:
    def slightly(model: Mistral7B) -> None:
        with torch.no_grad():
            model.get_submodule("layers.1.feed_forward.w2").weight *= 1 + 2e-4  # type: ignore[operator]

    engine = engine_of(base, WIDE, slightly)
    result = compare(base, base, TOKENS, run_b=engine)
    assert (result.verdict, result.parts_at) == ("fault", "layers.1.feed_forward")
    assert [(c.cause, c.proved) for c in result.causes] == [("engine", False)]
    errors = {place.module: place.error for place in result.growth}
    assert errors["layers.1.attention"] < 1e-6 < errors["layers.1.feed_forward"]


def test_the_hidden_states_of_transformers_are_those_of_each_half_layer(base: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    result = compare(base, base, TOKENS, run_b=lambda tokens: engines.ran("transformers", base, tokens, ""))
    assert (result.verdict, result.parts_at) == ("noise", None)
    assert len(result.growth) == 1 + 2 * WIDE.n_layers
    assert max(place.error for place in result.growth) < 1e-5


def test_a_side_without_a_tokenizer_borrows_the_others_and_says_so(tmp_path: pathlib.Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(DEMO, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    text = "import os\n\ndef main():\n    return os.getcwd()\n"
    for sides, own in ((("demo", bare), "B"), ((bare, "demo"), "A")):
        result = compare(*sides, text)
        assert result.verdict == "noise"
        assert [note for note in result.notes if note.startswith(f"{own} has no tokenizer")]
    assert compare("demo", "demo", text).notes == ()


def test_a_quantized_folder_is_noise_on_either_side(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantize(base, tmp_path / "int8", "int8", TOKENS, "random")
    result = compare(base, tmp_path / "int8", TOKENS)
    assert (result.verdict, result.formats[1]) == ("noise", "quantized")
    assert 0 < result.rounding.error < result.rounding.bound
    assert compare(tmp_path / "int8", tmp_path / "int8", TOKENS).kld == 0


def test_an_adapter_of_another_model_is_refused(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    factors = Factors(torch.ones(2, 32), torch.ones(32, 2), 1.0)
    narrow = tiny_args(dim=32, head_dim=16, n_heads=2, n_kv_heads=2, hidden_dim=64)
    save_adapter(Adapter({"layers.0.attention.wq": factors}), tmp_path / "narrow", narrow)
    with refused(CheckpointError):
        compare(base, f"{base}+{tmp_path / 'narrow'}", TOKENS)


def test_transformers_runs_converted_files_of_other_formats(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    wanted = engines.ran("transformers", base, TOKENS, "").logits
    for name, to in (("base.gguf", "gguf"), ("mistral", "mistral")):
        convert(base, tmp_path / name, to)
        assert torch.equal(engines.ran("transformers", tmp_path / name, TOKENS, "").logits, wanted)
    quantize(base, tmp_path / "int8", "int8", TOKENS, "ids")
    with refused(BenchmarkError, place=tmp_path / "int8"):
        engines.ran("transformers", tmp_path / "int8", TOKENS, "")


def test_the_figures_are_those_of_the_definitions() -> None:
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(40, 11, generator=draw, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 11, (40,), generator=draw)
    figures, other = Figures(), Comparison()
    for part in (slice(0, 17), slice(17, 40)):
        figures.add(a[part], b[part], targets[part])
    other.add(a, b, targets)
    found, wanted = figures.result(), other.result("")
    p, q = (t.softmax(-1).gather(1, targets[:, None])[:, 0] for t in (a, b))
    assert found["Mean KLD"] == pytest.approx(wanted["kl"], rel=1e-12)
    assert found["Same top p"] == pytest.approx(100 * wanted["top1_agreement"])
    assert found["Mean PPL(Q)"] == pytest.approx(wanted["perplexity"])
    assert found["RMS Δp"] == pytest.approx(100 * (q - p).square().mean().sqrt().item())
    assert found["Median Δp"] == pytest.approx(100 * torch.quantile(q - p, 0.5).item())
    assert found["Maximum KLD"] >= found["99.9% KLD"] >= found["Median KLD"] >= found["Minimum KLD"]


def test_what_cannot_be_compared_is_one_error(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tiny_model(dataclasses.replace(WIDE, hidden_dim=64), torch.bfloat16).save_pretrained(tmp_path / "narrow")
    tiny_model(dataclasses.replace(WIDE, vocab_size=60), torch.bfloat16).save_pretrained(tmp_path / "fewer")
    with refused(EvaluationError, field="hidden_dim"):
        compare(base, tmp_path / "narrow", TOKENS)
    with refused(EvaluationError, field="vocab_size"):
        compare(base, tmp_path / "fewer", TOKENS)
    with refused(EvaluationError, field="text"):
        compare("demo", "demo", "")
    with refused(EvaluationError, field="text"):
        compare(base, base, TOKENS[:, :1])
    with refused(EvaluationError, field="text"):
        compare(base, base, "no tokenizer is beside these weights")
    with refused(EvaluationError, field="model"):
        compare(base, "transformers:demo", TOKENS)


def test_the_report_and_the_plot(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = compare(base, edited(base, tmp_path / "out", sliding_window=None), TOKENS)
    text = "\n".join(lines(result))
    for name in ("Mean KLD", "99.9% KLD", "Median KLD", "Mean Δp", "RMS Δp", "Same top p", "window_ignored"):
        assert name in text
    assert json.loads(json.dumps(result.to_dict()))["parts_at"] == "layers.0.attention"
    draw(tmp_path / "growth.png", result)
    width, height = struct.unpack(">II", (tmp_path / "growth.png").read_bytes()[16:24])
    assert width > height > 100
