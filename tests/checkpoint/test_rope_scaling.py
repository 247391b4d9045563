"""Scaled rotary embeddings: logits of transformers beyond the original context, every cache, every format."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import pytest
import torch
import transformers
from refusals import refused
from releases import RELEASES
from tiny import close, tiny_args, tiny_model, tokens_of

from mistral_7b import CheckpointError, Mistral7B, ModelArgs, SamplingParams
from mistral_7b.cache import Stateless
from mistral_7b.checkpoint import convert, huggingface, read_args, rope
from mistral_7b.errors import ConfigError
from mistral_7b.generate import generate
from mistral_7b.kernels.cpu.compiler import library
from mistral_7b.model import rope_phases
from mistral_7b.quantization.schemes import quantize
from mistral_7b.rope import RopeScaling

HF_V1 = RELEASES["v0.1 base, Hugging Face"][1]
LENGTH = 32  # of the original context; prompts are more than twice as long
# name: (the fields of rope_parameters, the scaling)
SCALINGS: dict[str, tuple[dict[str, Any], RopeScaling]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
    "yarn": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": LENGTH},
        RopeScaling("yarn", 8.0, LENGTH),
    ),
    "yarn, its ramp": (
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": LENGTH, "beta_fast": 3.0,
         "beta_slow": 0.5, "truncate": False},
        RopeScaling("yarn", 16.0, LENGTH, beta_fast=3.0, beta_slow=0.5, truncate=False),
    ),
    "yarn, its gain": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH, "attention_factor": 1.5},
        RopeScaling("yarn", 4.0, LENGTH, attention_factor=1.5),
    ),
    "yarn, mscale": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH, "mscale": 2.0,
         "mscale_all_dim": 0.5},
        RopeScaling(
            "yarn", 4.0, LENGTH,
            attention_factor=(0.1 * 2.0 * math.log(4.0) + 1) / (0.1 * 0.5 * math.log(4.0) + 1),
        ),
    ),
}  # fmt: skip


def args_of(scaling: RopeScaling | None, **changes: Any) -> ModelArgs:
    return tiny_args(head_dim=16, rope_scaling=scaling, max_seq_len=512, **changes)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("name", SCALINGS)
def test_logits_of_transformers_beyond_the_original_context(
    tmp_path: pathlib.Path, name: str, window: int | None
) -> None:
    fields, scaling = SCALINGS[name]
    args = args_of(scaling, sliding_window=window)
    torch.manual_seed(3)
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
            num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
            head_dim=args.head_dim, rms_norm_eps=args.norm_eps, sliding_window=window,
            rope_parameters={"rope_theta": args.rope_theta, **fields}, max_position_embeddings=args.max_seq_len,
            tie_word_embeddings=False, initializer_range=0.2, attn_implementation="eager",
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    model = Mistral7B.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert model.args == args
    tokens = tokens_of((2, 2 * LENGTH + 9), args)
    wanted = theirs(tokens).logits.detach()
    scale = max(1.0, float(wanted.abs().max()) / 5)  # relative to the logits that the tolerance was chosen for
    close(model(tokens)[0] / scale, wanted / scale)
    plain = Mistral7B(dataclasses.replace(args, rope_scaling=None), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    assert float((plain(tokens)[0].detach() - wanted).abs().max()) > 1e-2 * scale  # scaling does matter here


@pytest.mark.parametrize("name", SCALINGS)
def test_transformers_opens_what_is_saved(tmp_path: pathlib.Path, name: str) -> None:
    model = tiny_model(args_of(SCALINGS[name][1]))
    model.save_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = tokens_of((1, 2 * LENGTH + 9), model.args)
    close(theirs(tokens).logits.detach(), model(tokens)[0])


def yarn_by_hand(position: int, pairs: int, theta: float, scaling: RopeScaling) -> tuple[list[float], float]:
    """The angles of arXiv:2309.00071, a pair at a time, and the gain."""
    length, angles = scaling.original_max_seq_len, []
    assert length is not None
    for i in range(pairs):
        frequency = theta ** (-i / pairs)

        def pair(turns: float) -> float:
            return pairs * math.log(length / (2 * math.pi * turns)) / math.log(theta)

        low, high = (
            max(math.floor(pair(scaling.beta_fast)), 0),
            min(math.ceil(pair(scaling.beta_slow)), 2 * pairs - 1),
        )
        share = min(max((i - low) / (high - low), 0.0), 1.0)
        angles.append(position * ((1 - share) * frequency + share * frequency / scaling.factor))
    return angles, 0.1 * math.log(scaling.factor) + 1


@pytest.mark.parametrize("position", [0, 5000, 131_071])
def test_the_phases_of_yarn_mistral_are_those_of_the_paper(position: int) -> None:
    scaling = RopeScaling("yarn", 16.0, 8192)
    args = ModelArgs(rope_scaling=scaling)
    cos, sin = rope_phases(torch.tensor([position]), args, torch.float64)
    angles, gain = yarn_by_hand(position, 64, 1e4, scaling)
    for i, angle in enumerate(angles):
        assert abs(cos[0, 0, i].item() - gain * math.cos(angle)) < 1e-9
        assert abs(sin[0, 0, i].item() - gain * math.sin(angle)) < 1e-9


@pytest.mark.parametrize(
    "scaling", [SCALINGS["linear"][1], SCALINGS["yarn"][1], RopeScaling("dynamic", 2.0, LENGTH)]
)
def test_every_cache_gives_the_logits_of_the_uncached_forward(scaling: RopeScaling) -> None:
    model = tiny_model(args_of(scaling), torch.float64)
    window, tokens = model.args.sliding_window, tokens_of((2, 2 * LENGTH + 9))
    wanted = model(tokens, Stateless(window))[0]
    for cache in (None, model.rolling_cache(batch=2), model.rolling_cache(batch=2, static=True)):
        got, kept = [], cache
        for part in (tokens[:, :11], tokens[:, 11:40], *tokens[:, 40:].split(1, dim=1)):
            logits, kept = model(part, kept)
            got.append(logits)
        close(torch.cat(got, dim=1), wanted)


def test_the_engine_generates_as_the_uncached_forward() -> None:
    model = tiny_model(args_of(SCALINGS["yarn"][1]), torch.float64)
    prompts = [tokens_of((n,), model.args, seed=n).tolist() for n in (3, 40, 71)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for prompt, output in zip(prompts, generate(model, prompts, params), strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]), Stateless(model.args.sliding_window))[0][0, -1].argmax()))
        assert list(output.outputs[0].token_ids) == ids[len(prompt) :]


@pytest.mark.skipif(library() is None, reason="without the kernel PyTorch's operators attend")
@torch.inference_mode()
def test_fused_layers_scale_too() -> None:
    """int8 modules, whose layers run in one kernel call: bit-identical in chunks, and close to the original."""
    args = args_of(SCALINGS["yarn"][1])
    tokens = tokens_of((1, 2 * LENGTH + 9), args)
    model = quantize(tiny_model(args, torch.bfloat16), "int8")
    whole, ring = model(tokens)[0], model.rolling_cache()
    assert torch.equal(torch.cat([model(part, ring)[0] for part in tokens.split(7, dim=1)], dim=1), whole)
    unscaled = quantize(tiny_model(dataclasses.replace(args, rope_scaling=None), torch.bfloat16), "int8")
    exact = tiny_model(args)(tokens)[0]
    assert (whole - exact).abs().mean() < 0.2 * (unscaled(tokens)[0] - exact).abs().mean()


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "yarn, its ramp"])
def test_conversions_keep_the_scaling(tmp_path: pathlib.Path, name: str) -> None:
    scaling = SCALINGS[name][1]
    model = tiny_model(args_of(scaling))
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf")
    convert(tmp_path / "b.gguf", tmp_path / "c", to="huggingface")
    for path in ("a", "b.gguf", "c"):
        found = read_args(tmp_path / path)[0].rope_scaling
        assert found is not None
        assert found.gain == pytest.approx(scaling.gain, rel=1e-6)  # GGUF holds it in float32
        assert dataclasses.replace(found, attention_factor=None) == dataclasses.replace(
            scaling, attention_factor=None
        )
    copy = Mistral7B.from_pretrained(tmp_path / "c", dtype=torch.float32)
    tokens = tokens_of((1, 2 * LENGTH + 9), model.args)
    close(copy(tokens)[0], model(tokens)[0])


def test_gguf_has_llama_cpps_keys(tmp_path: pathlib.Path) -> None:
    gguf = pytest.importorskip("gguf")
    scaling = RopeScaling("yarn", 4.0, LENGTH, attention_factor=2.0, beta_fast=16.0)
    tiny_model(args_of(scaling)).save_pretrained(tmp_path / "it.gguf", format="gguf")
    fields = gguf.GGUFReader(tmp_path / "it.gguf").fields
    keys_of = gguf.Keys.Rope
    keys = (
        keys_of.SCALING_TYPE, keys_of.SCALING_FACTOR, keys_of.SCALING_ORIG_CTX_LEN, keys_of.SCALING_YARN_BETA_FAST
    )  # fmt: skip
    found = [fields[key.format(arch="llama")].contents() for key in keys]
    assert found == ["yarn", 4.0, LENGTH, 16.0]
    # llama.cpp multiplies this by the 0.1 ln(4) + 1 of the paper.
    gain = fields[keys_of.SCALING_ATTN_FACTOR.format(arch="llama")].contents()
    assert gain * (0.1 * math.log(4) + 1) == pytest.approx(2.0, rel=1e-6)
    theirs = {key.partition(".")[2] for name, key in vars(keys_of).items() if name.startswith("SCALING_")}
    assert theirs <= rope.GGUF_KEYS | rope.GGUF_VALUES.keys()


def test_gguf_keys_are_read_with_llama_cpps_defaults() -> None:
    def scaling(**keys: Any) -> RopeScaling | None:
        data = {"context_length": 512} | {f"rope.{key.replace('__', '.')}": value for key, value in keys.items()}
        return rope.read_gguf(pathlib.Path("x.gguf"), data)

    assert scaling() is None
    assert scaling(scaling__type="none", scaling__factor=4.0) is None
    assert scaling(scaling__type="linear", scaling__factor=0.0) is None
    assert scaling(scaling__type="yarn") is None
    assert scaling(scaling__factor=4.0) == RopeScaling("linear", 4.0)
    assert scaling(scale_linear=2.0) == RopeScaling("linear", 2.0)
    assert scaling(scaling__type="yarn", scaling__factor=4.0) == RopeScaling("yarn", 4.0, 512)
    found = scaling(scaling__type="yarn", scaling__factor=4.0, scaling__attn_factor=2.0)
    assert found is not None
    assert found.gain == 2 * (0.1 * math.log(4) + 1)
    found = scaling(scaling__type="yarn", scaling__factor=4.0, scaling__yarn_log_multiplier=0.5)
    assert found is not None  # as transformers with "mscale": 1, "mscale_all_dim": 0.5
    assert found.gain == pytest.approx((0.1 * math.log(4) + 1) / (0.1 * 0.5 * math.log(4) + 1))
    for keys in (
        {"scaling__attn_factor": 2.0}, {"scaling__type": "yarn", "scaling__yarn_ext_factor": 0.5},
        {"scaling__yarn_log_multiplier": 0.5},
    ):  # fmt: skip
        with refused(CheckpointError, place="x.gguf"):
            scaling(**keys)


def test_formats_without_a_field_for_it_refuse_it(tmp_path: pathlib.Path) -> None:
    model = tiny_model(args_of(SCALINGS["yarn, its ramp"][1]))
    for format in ("mistral", "gguf"):
        with refused(CheckpointError, field="rope_scaling"):
            model.save_pretrained(tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


# Dynamic scaling: transformers rotates a sequence of T tokens by angles for T, here all by those of the context.
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
FIXED = "whose angles change in transformers as a sequence grows"


def dynamic_args(context: int) -> ModelArgs:
    return dataclasses.replace(args_of(RopeScaling("dynamic", 2.0, LENGTH)), max_seq_len=context)


@pytest.mark.parametrize("context", [LENGTH, 2 * LENGTH + 9])
def test_dynamic_scaling_is_that_of_transformers_for_a_sequence_of_the_context(
    tmp_path: pathlib.Path, context: int
) -> None:
    """Up to the original context for every prompt; beyond it for one as long as the context, in one forward."""
    model = tiny_model(dynamic_args(context))
    model.save_pretrained(tmp_path / "ours")
    data = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**data, "max_position_embeddings": LENGTH}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert theirs.config.rope_parameters["rope_type"] == "dynamic"
    for n in (context, *((5, 20) if context == LENGTH else ())):
        tokens = tokens_of((1, n), model.args)
        close(model(tokens)[0], theirs(tokens).logits.detach())
    plain = tiny_model(dataclasses.replace(model.args, rope_scaling=None))
    differs = float((plain(tokens_of((1, context)))[0] - model(tokens_of((1, context)))[0]).detach().abs().max())
    assert (differs > 1e-2) == (context > LENGTH)


@pytest.mark.parametrize(("longest", "context"), [(None, 32768), (LENGTH, LENGTH), (4 * LENGTH, 4 * LENGTH)])
def test_the_context_of_dynamic_scaling_is_the_one_that_is_stated(
    tmp_path: pathlib.Path, longest: int | None, context: int
) -> None:
    data = {**HF_V1, "rope_scaling": {**DYNAMIC, "original_max_position_embeddings": LENGTH}}
    data = {k: v for k, v in {**data, "max_position_embeddings": longest}.items() if v is not None}
    with pytest.warns(UserWarning, match=FIXED):
        args = read(tmp_path, data)
    assert (args.max_seq_len, args.rope_scaling) == (context, RopeScaling("dynamic", 2.0, LENGTH))
    with pytest.warns(UserWarning, match=FIXED):
        own = read(tmp_path, {**HF_V1, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert own.rope_scaling == RopeScaling("dynamic", 2.0, 32768)


@pytest.mark.filterwarnings(f"ignore:.*{FIXED}")
@pytest.mark.parametrize("to", ["huggingface", "mistral", "gguf"])
def test_conversions_of_dynamic_scaling_keep_the_logits(tmp_path: pathlib.Path, to: str) -> None:
    """GGUF and params.json have no field for it, and get its theta."""
    model = tiny_model(dynamic_args(2 * LENGTH + 9))
    model.save_pretrained(tmp_path / "a", format=to)
    args = read_args(tmp_path / "a")[0]
    assert args.rope_scaling == (model.args.rope_scaling if to == "huggingface" else None)
    tokens = tokens_of((1, 2 * LENGTH + 9), model.args)
    copy = Mistral7B.from_pretrained(tmp_path / "a", dtype=torch.float32)
    close(copy(tokens)[0], model(tokens)[0])


def read(tmp_path: pathlib.Path, data: dict[str, Any]) -> ModelArgs:
    (tmp_path / "config.json").write_text(json.dumps(data))
    return read_args(tmp_path)[0]


@pytest.mark.parametrize(("factor", "longest"), [(8.0, 65_536), (16.0, 131_072)])
def test_yarn_mistral_64k_and_128k(tmp_path: pathlib.Path, factor: float, longest: int) -> None:
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": 8192, "finetuned": True}
    args = read(tmp_path, {**HF_V1, "sliding_window": longest, "rope_scaling": scaling})
    assert args == ModelArgs(
        sliding_window=longest, max_seq_len=longest, rope_scaling=RopeScaling("yarn", factor, 8192)
    )


def test_defaults_are_those_of_transformers(tmp_path: pathlib.Path) -> None:
    args = read(tmp_path, {**HF_V1, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}})
    assert args.rope_scaling == RopeScaling("yarn", 4.0, 32768)
    assert args.max_seq_len == 131_072
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 8192, "beta_fast": None}
    assert read(tmp_path, {**HF_V1, "rope_scaling": scaling}).rope_scaling == RopeScaling("yarn", 4.0, 8192)


def test_linear_leaves_the_length_as_it_is_stated(tmp_path: pathlib.Path) -> None:
    args = read(tmp_path, {**HF_V1, "rope_scaling": {"type": "linear", "factor": 2}})
    assert (args.max_seq_len, args.rope_scaling) == (32768, RopeScaling("linear", 2))


@pytest.mark.parametrize("scaling", [None, *(s for _, s in SCALINGS.values())])
def test_configs_round_trip(scaling: RopeScaling | None) -> None:
    args = args_of(scaling)
    assert huggingface.read(pathlib.Path("x"), json.loads(json.dumps(huggingface.config(args, "float32")))) == args


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
REFUSED = {
    "dynamic without a factor": {"type": "dynamic"},
    "dynamic with a gain": {"type": "dynamic", "factor": 2.0, "attention_factor": 1.0},
    "Llama 3.1": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "Phi-3": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
    "unknown type": {"rope_type": ["yarn"]},
    "no factor": {"rope_type": "linear"},
    "factor below 1": {"rope_type": "linear", "factor": 0.5},
    "infinite factor": {"rope_type": "linear", "factor": 10**400},
    "factor as text": {**YARN, "factor": "4"},
    "length of 0": {**YARN, "original_max_position_embeddings": 0},
    "ramp reversed": {**YARN, "beta_fast": 0.5},
    "gain of 0": {**YARN, "attention_factor": 0.0},
    "unknown field": {**YARN, "llama_4_scaling_beta": 0.1},
    "mscale as text": {**YARN, "mscale": "1", "mscale_all_dim": 1},
}


@pytest.mark.parametrize("scaling", REFUSED.values(), ids=REFUSED)
def test_other_scalings_are_refused(tmp_path: pathlib.Path, scaling: dict[str, Any]) -> None:
    with refused(CheckpointError, field="rope_scaling", place=tmp_path / "config.json"):
        read(tmp_path, {**HF_V1, "rope_scaling": scaling})


def test_two_scalings_that_differ_are_refused(tmp_path: pathlib.Path) -> None:
    with refused(CheckpointError, field="rope_scaling", place=tmp_path / "config.json"):
        read(tmp_path, {**HF_V1, "rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}})


def test_a_scaling_that_cannot_be_is_refused() -> None:
    for field, made in {
        "type": lambda: RopeScaling("longrope", 2.0),
        "original_max_seq_len": lambda: RopeScaling("yarn", 2.0),
        "attention_factor": lambda: RopeScaling("linear", 2.0, attention_factor=1.0),
        "beta_fast": lambda: RopeScaling("dynamic", 2.0, 8, beta_fast=3.0),
    }.items():
        with refused(ConfigError, field=field):
            made()
    with refused(ConfigError, field="head_dim"):
        RopeScaling("dynamic", 2.0, 8).theta(1e4, 2, 16)
    args = ModelArgs(rope_theta=1.0, rope_scaling=RopeScaling("yarn", 2.0, 8))
    with refused(ConfigError, field="rope_theta"):
        rope_phases(torch.arange(3), args, torch.float32)
