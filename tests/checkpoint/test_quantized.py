"""Quantized folders: exact round trips, memory-mapping, and errors."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY, tiny_args, tiny_model, tokens_of

from mistral_7b import CheckpointError, Mistral7B, QuantizationError, WriteError
from mistral_7b.checkpoint import convert, load, quantize, read_args, read_record
from mistral_7b.checkpoint.unfinished import STATE
from mistral_7b.quantization import quantize as quantize_model
from mistral_7b.quantization.schemes import KINDS, Scheme

SCHEMES = [Scheme(name) for name in KINDS]
WEIGHTS = "quantized.safetensors"
TEXT = tokens_of((3, 20))
DISTANCE = {
    "kl": 0.01, "top1_agreement": 0.9, "perplexity_original": 5.0, "perplexity": 5.1, "tokens": 100,
    "text": "a text",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`plain`, the original in bfloat16, and `int4`, quantized from it."""
    folder = tmp_path_factory.mktemp("quantized")
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder / "plain")
    (folder / "plain" / "tokenizer_config.json").write_text("{}")
    quantize(folder / "plain", folder / "int4", "int4", TEXT, "random tokens")
    return folder


@pytest.fixture
def copy(folders: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A quantized folder to damage."""
    return pathlib.Path(shutil.copytree(folders / "int4", tmp_path / "copy"))


def logits(model: Mistral7B) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens_of((2, 20), model.args))[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_four_ways_to_quantize_give_one_model(
    tmp_path: pathlib.Path, scheme: Scheme, layout: str, tied: bool
) -> None:
    """Quantization in memory, during loading, on disk, and saved from memory: the same bits."""
    tiny_model(tiny_args(tie_embeddings=tied), torch.bfloat16).save_pretrained(tmp_path / "plain", format=layout)
    record = quantize(tmp_path / "plain", tmp_path / "disk", scheme, TEXT, "random tokens")
    model = quantize_model(load(tmp_path / "plain"), scheme)
    model.save_pretrained(tmp_path / "memory", format="quantized", distance=record.distance)
    wanted = logits(model)
    assert torch.equal(logits(load(tmp_path / "plain", quantization=scheme)), wanted)
    assert torch.equal(logits(Mistral7B.from_pretrained(tmp_path / "disk")), wanted)
    assert torch.equal(logits(load(tmp_path / "disk" / WEIGHTS, quantization=scheme.name)), wanted)
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    assert read_record(tmp_path / "memory") == record
    assert record.scheme == scheme


def test_bf16_on_load_equals_packing_the_model(folders: pathlib.Path) -> None:
    wanted = logits(quantize_model(load(folders / "plain"), "bf16"))
    assert torch.equal(logits(load(folders / "plain", quantization="bf16")), wanted)
    with refused(QuantizationError, field="dtype"):
        load(folders / "plain", quantization="bf16", dtype=torch.float32)
    with refused(QuantizationError, field="quantization"):
        load(folders / "plain", quantization="int3")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the map of memory from Linux's /proc")
def test_weights_are_mapped_and_aligned_to_cache_lines(tmp_path: pathlib.Path) -> None:
    """With ordinary sizes, all tensors are aligned to 64 bytes; tensors of any size are mapped."""
    ordinary = tiny_args(dim=64, head_dim=16, n_heads=4, n_kv_heads=4, hidden_dim=128, vocab_size=96)
    for name, args in (("ordinary", ordinary), ("odd", TINY)):
        tiny_model(args, torch.bfloat16).save_pretrained(tmp_path / name)
        out = tmp_path / f"{name}-int4"
        quantize(tmp_path / name, out, "int4", TEXT, "random tokens")
        model = load(out)
        lines = [line.split() for line in pathlib.Path("/proc/self/maps").read_text().splitlines()]
        spans = [[int(n, 16) for n in f[0].split("-")] for f in lines if f[-1] == str(out / WEIGHTS)]
        for key, tensor in model.state_dict().items():
            assert any(begin <= tensor.data_ptr() < end for begin, end in spans), key
            if args is ordinary:
                assert tensor.data_ptr() % 64 == 0, key
        copied = load(out, mmap=False)
        for key, tensor in copied.state_dict().items():
            assert not any(begin <= tensor.data_ptr() < end for begin, end in spans), key
            assert tensor.data_ptr() % 64 == 0, key
        assert torch.equal(logits(copied), logits(model))


def test_a_sharded_quantized_folder_loads(folders: pathlib.Path, copy: pathlib.Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    table = {}
    for i, names in enumerate((list(tensors)[:20], list(tensors)[20:]), start=1):
        table.update(dict.fromkeys(names, f"quantized-0000{i}-of-00002.safetensors"))
        save_file({name: tensors[name] for name in names}, copy / table[names[0]])
    (copy / "quantized.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert torch.equal(logits(load(copy)), logits(load(folders / "int4")))


def test_the_configuration_records_the_quantization(folders: pathlib.Path) -> None:
    args, form = read_args(folders / "int4")
    assert (args, form) == (TINY, "quantized")
    said = json.loads((folders / "int4" / "config.json").read_text())["quantization_config"]
    with safe_open(folders / "int4" / WEIGHTS, "pt") as file:
        names = set(file.keys())
    distance, nbytes = said.pop("distance"), said.pop("bytes")
    assert said == {
        "quant_method": "mistral_7b", "format": 2, "scheme": "int4", "calibration": None,
    }  # fmt: skip
    assert distance == read_record(folders / "int4").distance
    assert nbytes == sum(t.nbytes for t in load(folders / "int4").state_dict().values())
    assert {"layers.0.attention.wq.codes", "layers.1.feed_forward.w2.d", "output.codes"} <= names
    assert (folders / "int4" / "tokenizer_config.json").is_file()
    assert read_record(folders / "plain") is None


def test_the_distance_equals_that_of_the_two_models(tmp_path: pathlib.Path) -> None:
    """Computed by definition from two whole models; rows are longer than two windows."""
    tiny_model().save_pretrained(tmp_path / "plain")
    found = quantize(tmp_path / "plain", tmp_path / "int4", "int4", TEXT, "a text").distance
    models = load(tmp_path / "plain", dtype=torch.float32), load(tmp_path / "int4", dtype=torch.float32)
    with torch.inference_mode():
        log_p, log_q = (m(TEXT)[0][:, :-1].double().log_softmax(-1) for m in models)
    targets = TEXT[:, 1:].flatten()
    wanted = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(),
        "perplexity_original": F.cross_entropy(log_p.flatten(0, 1), targets).exp().item(),
        "perplexity": F.cross_entropy(log_q.flatten(0, 1), targets).exp().item(),
        "tokens": len(targets),
    }
    assert found.pop("text") == "a text"
    assert found == pytest.approx(wanted, rel=1e-3)
    assert 0.001 < found["kl"] < 1  # the distance is not zero


@pytest.mark.parametrize("kernels", ["off", "scalar"])
def test_the_folder_is_the_same_on_every_machine(tmp_path: pathlib.Path, kernels: str) -> None:
    """Written and loaded with other instruction sets: the same file and the same products."""
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "here", "int4", TEXT, "a text")
    code = (
        "import hashlib, pathlib, sys, torch\n"
        "from mistral_7b.checkpoint import load, quantize\n"
        "tokens = torch.tensor(eval(sys.argv[2])); folder = pathlib.Path(sys.argv[1])\n"
        "quantize(folder / 'plain', folder / 'there', 'int4', tokens, 'a text')\n"
        "model = load(folder / 'here')\n"
        "x = torch.linspace(-1, 1, 40).bfloat16().expand(3, 40)\n"
        "print(hashlib.sha256(model.layers[0].attention.wq(x).view(torch.uint8).numpy().tobytes()).hexdigest())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path, str(TEXT.tolist())],
        env={**os.environ, "MISTRAL_7B_KERNELS": kernels}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "here" / WEIGHTS).read_bytes() == (tmp_path / "there" / WEIGHTS).read_bytes()
    out = load(tmp_path / "here").layers[0].attention.wq(torch.linspace(-1, 1, 40).bfloat16().expand(3, 40))
    assert run.stdout.strip() == hashlib.sha256(out.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_transformers_refuses_the_folder(folders: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    for door in (transformers.AutoModelForCausalLM, transformers.MistralForCausalLM):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            door.from_pretrained(folders / "int4")


def test_another_scheme_is_refused(folders: pathlib.Path) -> None:
    for asked in ("int8", "bf16", Scheme("q4_k_m")):
        with refused(QuantizationError, field="quantization"):
            load(folders / "int4", quantization=asked)
    assert load(folders / "int4", quantization=Scheme("int4")).args == TINY


def test_a_quantized_folder_is_refused_as_a_source(folders: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for act in (
        lambda: convert(folders / "int4", tmp_path / "out", to="mistral"),
        lambda: quantize(folders / "int4", tmp_path / "out", "int8", TEXT, "a text"),
    ):
        with refused(CheckpointError, field="quantization_config"):
            act()
    for scheme in ("bf16", "fp8"):
        with refused(QuantizationError, field="scheme"):
            quantize(folders / "plain", tmp_path / "out", scheme, TEXT, "a text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "distance",
    [None, {}, {**DISTANCE, "kl": float("nan")}, {**DISTANCE, "text": None}, {**DISTANCE, "tokens": True}],
)
def test_saving_without_a_measured_distance_is_refused(
    folders: pathlib.Path, tmp_path: pathlib.Path, distance: dict[str, Any] | None
) -> None:
    with pytest.raises(QuantizationError):
        load(folders / "int4").save_pretrained(tmp_path / "out", format="quantized", distance=distance)
    assert not list(tmp_path.iterdir())


def test_incompatible_formats_and_models_are_refused(folders: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantized, plain = load(folders / "int4"), load(folders / "plain")
    with refused(CheckpointError, field="format"):
        quantized.save_pretrained(tmp_path / "out")
    with refused(CheckpointError, field="format"):
        plain.save_pretrained(tmp_path / "out", distance=DISTANCE)
    with refused(QuantizationError, field="format"):
        plain.save_pretrained(tmp_path / "out", format="quantized", distance=DISTANCE)
    quantized.layers[1].attention.wo = plain.layers[1].attention.wo
    with refused(QuantizationError, field="format"):
        quantized.save_pretrained(tmp_path / "out", format="quantized", distance=DISTANCE)
    assert not list(tmp_path.iterdir())


Q1 = "layers.1.attention.wq.codes"


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[Q1]


def _transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q1] = tensors[Q1].transpose(0, 1)


def _sign(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q1] = tensors[Q1].view(torch.int8)


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["output.d"] = tensors["output.d"].bfloat16()


def _whole(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].to(torch.uint8)


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.attention.wq.weight"] = torch.zeros(60, 40)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_drop, Q1),
        (_transpose, Q1),
        (_sign, Q1),
        (_narrow, "output.d"),
        (_whole, "norm.weight"),
        (_add, "layers.0.attention.wq.weight"),
    ],
)
def test_damaged_quantized_weights_are_refused(
    copy: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], None], field: str
) -> None:
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    save_file({k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}, copy / WEIGHTS)
    with refused(CheckpointError, field=field):
        load(copy)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_quantized_weights_are_refused(copy: pathlib.Path, keep: int) -> None:
    raw = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(raw[:keep])
    with refused(CheckpointError, place=copy / WEIGHTS):
        load(copy)
    (copy / WEIGHTS).unlink()
    with refused(CheckpointError, place=copy):
        load(copy)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("format", 3, "quantization_config.format"),
        ("format", None, "quantization_config.format"),
        ("scheme", "int3", "quantization_config"),
        ("scheme", "bf16", "quantization_config"),
        ("scheme", "int8", "layers.0.attention.wq.codes"),
        ("bytes", "many", "quantization_config.bytes"),
        ("calibration", 3, "quantization_config"),
        ("distance", None, "quantization_config.distance"),
        ("distance", {"kl": 0.1}, "top1_agreement"),
        ("quant_method", "gptq", "quantization_config"),
    ],
)
def test_a_damaged_quantization_config_is_refused(
    copy: pathlib.Path, field: str, value: object, named: str
) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"][field] = value
    (copy / "config.json").write_text(json.dumps(config))
    with refused(CheckpointError, field=named):
        load(copy)


def test_a_folder_of_the_former_format_names_the_command_that_remakes_it(copy: pathlib.Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= {"format": 1, "scheme": "int8"}
    (copy / "config.json").write_text(json.dumps(config))
    with refused(CheckpointError, field="quantization_config.format") as error:
        load(copy)
    assert "mistral-7b quantize ORIGINAL OUT --scheme int8" in str(error.value)


def test_codes_under_a_weights_name_are_refused(folders: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(folders / "plain", tmp_path / "plain")
    path = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.uint8)
    save_file(tensors, path)
    with refused(CheckpointError, field="lm_head.weight"):
        load(tmp_path / "plain")


QUANTIZE_AND_HANG = """
import sys, time, torch
from mistral_7b.checkpoint import quantize

def progress(done, total, name):
    if name.startswith("layers.1"):
        print("here", flush=True)
        time.sleep(600)

quantize(sys.argv[1], sys.argv[2], "int4", torch.ones(1, 9, dtype=torch.long), "ones", progress)
"""


def test_a_killed_quantization_leaves_nothing_that_opens(folders: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", QUANTIZE_AND_HANG, folders / "plain", out], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "here\n"
        run.kill()
    assert not out.exists()
    (rest,) = tmp_path.iterdir()
    assert rest.name.startswith(".out.partial-")
    assert {path.name for path in rest.iterdir()} == {WEIGHTS, STATE}  # it was killed while writing
    for path in (rest, rest / WEIGHTS, rest / STATE):
        with pytest.raises(CheckpointError):
            load(path)


@pytest.mark.parametrize("error", [OSError("disk on fire"), ValueError])
def test_a_failed_quantization_cleans_up(
    folders: pathlib.Path, tmp_path: pathlib.Path, error: Exception | type[Exception]
) -> None:
    def fail(done: int, total: int, name: str) -> None:
        if name.startswith("layers.1"):
            raise error

    with pytest.raises(WriteError if isinstance(error, OSError) else error):  # type: ignore[arg-type]
        quantize(folders / "plain", tmp_path / "out", "int4", TEXT, "a text", fail)
    assert not list(tmp_path.iterdir())


def test_progress_counts_every_byte_once(folders: pathlib.Path, tmp_path: pathlib.Path) -> None:
    told: list[tuple[int, int, str]] = []
    record = quantize(folders / "plain", tmp_path / "out", "int8", TEXT, "a text", lambda *now: told.append(now))
    assert [done for done, _, _ in told] == sorted({done for done, _, _ in told})
    assert {total for _, total, _ in told} == {record.nbytes}
    assert told[-1][0] == record.nbytes
    assert {name for _, _, name in told} == set(load(tmp_path / "out").state_dict())
