"""Reading and writing GGUF: bit-identical, compared with the gguf package, and errors."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import struct
import warnings
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from refusals import refused
from tiny import TINY, close, tiny_args, tiny_model, tokens_of, truth

from mistral_7b import CheckpointError, Mistral7B, ModelArgs, TokenizerError
from mistral_7b.checkpoint import convert, read_args
from mistral_7b.checkpoint.gguf import quantizing
from mistral_7b.checkpoint.gguf.file import KINDS
from mistral_7b.checkpoint.gguf.modules import BlockEmbedding
from mistral_7b.checkpoint.names import expected, rename
from mistral_7b.checkpoint.reading import open_checkpoint
from mistral_7b.cli import main
from mistral_7b.quantization.linear import BlockLinear

# All sizes differ, and rows are multiples of 32, so that all block types but K types fit.
NARROW = tiny_args(dim=64, head_dim=32, n_heads=4, n_kv_heads=2, hidden_dim=96)
CONFIGS = {
    "window": TINY,
    "no window, v0.1's theta": tiny_args(sliding_window=None),
    "v0.3's theta": tiny_args(sliding_window=None, rope_theta=1e6, dim=44, n_heads=5, n_kv_heads=1),
    "another theta": tiny_args(rope_theta=5e5, norm_eps=1e-6, n_heads=7, n_kv_heads=7, head_dim=12, dim=48),
    "tied": tiny_args(tie_embeddings=True, vocab_size=83, n_heads=9, n_kv_heads=3, head_dim=4),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:no tokenizer.model lies beside"),
    pytest.mark.filterwarnings("ignore:.*theta 1e4 as in v0.1"),  # tests of this warning catch it
]


def opened(path: pathlib.Path, dtype: torch.dtype = torch.float32) -> Mistral7B:
    return Mistral7B.from_pretrained(path, dtype=dtype)


def weights_of(model: Mistral7B) -> dict[str, torch.Tensor]:
    """All weights by Mistral's names; blocks are dequantized."""
    out = {name: value for name, value in model.state_dict().items() if name.endswith("weight")}
    blocks: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, BlockLinear)}
    if isinstance(model.tok_embeddings, BlockEmbedding):
        blocks["tok_embeddings"] = model.tok_embeddings
    return out | {f"{name}.weight": m.dequantized().to(model.norm.weight.dtype) for name, m in blocks.items()}


def same_bits(a: Mistral7B, b: Mistral7B) -> bool:
    one, two = weights_of(a), weights_of(b)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("args", CONFIGS.values(), ids=CONFIGS)
def test_trap_09_round_trips_through_gguf_are_bit_identical(
    tmp_path: pathlib.Path, args: ModelArgs, dtype: torch.dtype
) -> None:
    model = tiny_model(args, dtype)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf")
    convert(tmp_path / "b.gguf", tmp_path / "c", to="mistral")
    convert(tmp_path / "c", tmp_path / "d.gguf", to="gguf")
    convert(tmp_path / "d.gguf", tmp_path / "e", to="huggingface")
    for copy in (opened(tmp_path / name, dtype) for name in ("a", "b.gguf", "c", "d.gguf", "e")):
        assert copy.args == args
        assert same_bits(model, copy)
        assert (copy.output.weight is copy.tok_embeddings.weight) == args.tie_embeddings
    assert files(tmp_path / "a") == files(tmp_path / "e")


def test_the_demo_round_trips_through_gguf(tmp_path: pathlib.Path) -> None:
    convert("demo", tmp_path / "demo.gguf", to="gguf", type="bf16")
    convert(tmp_path / "demo.gguf", tmp_path / "back", to="huggingface")
    back, demo = files(tmp_path / "back"), files(pathlib.Path(Mistral7B.from_pretrained("demo").source or ""))
    assert back.keys() >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.model.v3"}
    differ = [name for name in back if back[name] != demo.get(name)]
    # see test_gguf_tokenizer; transformers looks for tokenizer.model alone
    assert sorted(differ) == ["tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json"]


def test_an_f16_file_has_the_reference_logits(tmp_path: pathlib.Path) -> None:
    model = tiny_model(TINY, torch.float16)
    model.save_pretrained(tmp_path / "x.gguf", format="gguf")
    tokens = tokens_of((41,))
    close(opened(tmp_path / "x.gguf")(tokens[None])[0][0], truth(model.float(), tokens))


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_the_gguf_package_reads_our_files(tmp_path: pathlib.Path, type: str) -> None:
    model = tiny_model(NARROW, torch.bfloat16)
    model.save_pretrained(tmp_path / "x.gguf", format="gguf", type=type)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    values = {tensor.name: tensor for tensor in reader.tensors}
    assert list(values) == [rename(name, "mistral", "gguf") for name, _ in expected(NARROW)]
    for name, weight in weights_of(model).items():
        theirs = values[rename(name, "mistral", "gguf")]
        assert theirs.data_offset % 32 == 0
        kind = (
            "F32" if weight.dim() == 1 else "Q8_0" if (type, name) == ("q4_0", "output.weight") else type.upper()
        )
        assert theirs.tensor_type.name == ("F32" if weight.dim() == 1 else kind)
        wanted = quantize(weight.float().numpy(), theirs.tensor_type)
        assert np.array_equal(theirs.data.view(np.uint8), wanted.view(np.uint8))
    field = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert field == {
        "general.architecture": "llama", "general.name": "Mistral 7B",
        "general.file_type": getattr(gguf.LlamaFileType, "ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"),
        **({"general.quantization_version": gguf.GGML_QUANT_VERSION} if type[0] == "q" else {}),
        "llama.embedding_length": 64, "llama.block_count": 2, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.vocab_size": 67,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "llama.context_length": 96,
        "llama.rope.freq_base": 1e4, "llama.rope.dimension_count": 32, "llama.attention.key_length": 32,
        "llama.attention.value_length": 32, "llama.attention.sliding_window": 8, "tokenizer.ggml.model": "none",
    }  # fmt: skip


def their_file(
    path: pathlib.Path, args: ModelArgs, change: Callable[[gguf.GGUFWriter], None] = lambda w: None,
    kinds: Callable[[str], str] = lambda name: "F32", arch: str = "llama", **keys: Any,
) -> Mistral7B:  # fmt: skip
    """A file as converters write it, by the gguf package; `keys` replaces keys, None omits one."""
    model = tiny_model(args)
    values = {
        "context_length": args.max_seq_len, "embedding_length": args.dim, "block_count": args.n_layers,
        "feed_forward_length": args.hidden_dim, "rope.dimension_count": args.head_dim,
        "attention.head_count": args.n_heads, "attention.head_count_kv": args.n_kv_heads,
        "attention.layer_norm_rms_epsilon": args.norm_eps, "rope.freq_base": args.rope_theta,
        "attention.key_length": args.head_dim, "attention.value_length": args.head_dim,
        "vocab_size": args.vocab_size,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        add = {float: writer.add_float32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
        if value is not None:
            add.get(type(value), writer.add_uint32)(f"{arch}.{key}", value)
    for name, weight in weights_of(model).items():
        kind = gguf.GGMLQuantizationType[kinds(name) if weight.dim() > 1 else "F32"]
        if name != "output.weight" or not args.tie_embeddings:
            data = quantize(weight.numpy(), kind)
            writer.add_tensor(rename(name, "mistral", "gguf") or "", data, raw_dtype=kind)
            weight.copy_(torch.from_numpy(dequantize(data, kind).copy()))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("args", [NARROW, dataclasses.replace(NARROW, tie_embeddings=True)], ids=["", "tied"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_we_read_files_of_the_gguf_package(tmp_path: pathlib.Path, kind: str, args: ModelArgs) -> None:
    args = dataclasses.replace(args, sliding_window=None, rope_theta=1e6)
    theirs = their_file(tmp_path / "x.gguf", args, kinds=lambda name: "F16" if name[:3] == "tok" else kind)
    ours = opened(tmp_path / "x.gguf")
    assert ours.args == args
    assert same_bits(ours, theirs)


def test_mixed_blocks_are_kept_and_others_dequantized(tmp_path: pathlib.Path) -> None:
    kinds = {"w1": "Q8_0", "w2": "Q4_1", "w3": "Q5_0", "wq": "F16", "tok_embeddings": "Q5_1", "output": "Q4_0"}
    theirs = their_file(tmp_path / "x.gguf", NARROW, kinds=lambda name: kinds.get(name.split(".")[-2], "F32"))
    ours = opened(tmp_path / "x.gguf")
    found = {name: m.kind for name, m in ours.named_modules() if isinstance(m, BlockLinear)}
    wanted = {f"layers.{i}.feed_forward.{w}": kinds[w] for i in range(2) for w in ("w1", "w2", "w3")}
    assert found == {**wanted, "output": "Q4_0"}
    assert isinstance(ours.tok_embeddings, BlockEmbedding)
    assert same_bits(ours, theirs)
    tokens = tokens_of((3, 5))
    assert torch.equal(ours.tok_embeddings(tokens), theirs.tok_embeddings(tokens))
    assert opened(tmp_path / "x.gguf", torch.bfloat16).tok_embeddings(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_converting_to_gguf_keeps_blocks_bit_identical(tmp_path: pathlib.Path, kind: str) -> None:
    """Blocks that requantization would change: every code is far from its block's maximum."""

    def weak(writer: gguf.GGUFWriter) -> None:
        for tensor in writer.tensors[0].values():
            if tensor.tensor.dtype == np.uint8:
                tensor.tensor[..., 2::19] = 0x11

    their_file(tmp_path / "x.gguf", NARROW, weak, kinds=lambda name: kind)
    convert(tmp_path / "x.gguf", tmp_path / "y.gguf", to="gguf")
    one, two = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in "xy")
    assert [(t.name, t.tensor_type, t.data.tobytes()) for t in one] == [
        (t.name, t.tensor_type, t.data.tobytes()) for t in two
    ]
    again = weights_of(opened(tmp_path / "x.gguf"))["output.weight"]
    requantized = quantizing.quantize(KINDS[kind], again)
    assert requantized.numpy().tobytes() != one[-1].data.tobytes()  # or this would prove nothing


def test_gguf_of_v0_1_gets_its_window_with_a_warning(tmp_path: pathlib.Path) -> None:
    their_file(tmp_path / "v1.gguf", TINY)
    with pytest.warns(UserWarning, match=r"v1.gguf: theta 1e4 as in v0.1.*4096"):
        assert read_args(tmp_path / "v1.gguf") == (tiny_args(sliding_window=4096), "gguf")
    their_file(tmp_path / "default.gguf", TINY, rope__freq_base=None)
    with pytest.warns(UserWarning, match=r"theta 1e4 as in v0.1"):
        assert read_args(tmp_path / "default.gguf")[0] == tiny_args(sliding_window=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for theta in (1e6, 5e5):
            their_file(tmp_path / f"{theta}.gguf", TINY, rope__freq_base=theta)
            found = read_args(tmp_path / f"{theta}.gguf")[0]
            assert found == tiny_args(sliding_window=None, rope_theta=theta)
        their_file(tmp_path / "given.gguf", TINY, attention__sliding_window=77)
        assert read_args(tmp_path / "given.gguf")[0].sliding_window == 77
        their_file(tmp_path / "none.gguf", TINY, attention__sliding_window=0)
        assert read_args(tmp_path / "none.gguf")[0].sliding_window is None


def test_keys_missing_in_older_files_have_defaults(tmp_path: pathlib.Path) -> None:
    args = tiny_args(dim=60, sliding_window=None, rope_theta=1e6)  # 6 heads of width 10 = dim / heads
    left_out = dict.fromkeys(("attention__key_length", "attention__value_length", "vocab_size"))
    their_file(tmp_path / "x.gguf", args, **left_out)
    assert read_args(tmp_path / "x.gguf")[0] == args
    their_file(tmp_path / "y.gguf", args, arch="mistral", **left_out)
    assert read_args(tmp_path / "y.gguf")[0] == args
    their_file(
        tmp_path / "z.gguf", args,
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(5, dtype=np.float32)), **left_out,
    )  # fmt: skip
    assert read_args(tmp_path / "z.gguf")[0] == args


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"arch": "qwen2"}, "general.architecture"),
        ({"expert_count": 8}, "expert_count"),
        ({"rope__scaling__type": "longrope"}, "rope.scaling.type"),
        ({"rope__scaling__factor": -4.0}, "rope.scaling.factor"),
        ({"attention__head_count": [6, 6]}, "n_heads"),
        ({"attention__head_count_kv": 4}, "n_heads"),
        ({"embedding_length": None}, "embedding_length"),
        ({"embedding_length": "many"}, "dim"),
        ({"block_count": 3}, "blk.2.attn_norm.weight"),
        ({"block_count": 1}, "blk.1.attn_norm.weight"),
        ({"feed_forward_length": 57}, "blk.0.ffn_gate.weight"),
        ({"rope__dimension_count": 8}, None),
        ({"attention__value_length": 8}, None),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "norm_eps"),
        ({"attention__causal": False}, "attention.causal"),
    ],
)  # fmt: skip
def test_keys_of_other_models_are_refused_by_name(
    tmp_path: pathlib.Path, keys: dict[str, Any], field: str | None
) -> None:
    their_file(tmp_path / "x.gguf", TINY, **keys)
    for attempt in (read_args, opened, open_checkpoint):
        with refused(CheckpointError, field=field, place=tmp_path / "x.gguf"):
            attempt(tmp_path / "x.gguf")


def test_other_features_that_change_the_model_are_refused(tmp_path: pathlib.Path) -> None:
    for name, add in (
        ("bias", ("blk.0.attn_q.bias", np.ones(60, dtype=np.float32))),
        ("freqs", ("rope_freqs.weight", np.full(5, 8, dtype=np.float32))),
        ("moe", ("blk.0.ffn_gate_inp.weight", np.ones((8, 40), dtype=np.float32))),
    ):
        their_file(tmp_path / f"{name}.gguf", TINY, lambda w, add=add: w.add_tensor(*add), rope__freq_base=1e6)
        with refused(CheckpointError, field=add[0], place=tmp_path / f"{name}.gguf"):
            open_checkpoint(tmp_path / f"{name}.gguf")
    their_file(tmp_path / "part.gguf", TINY, lambda w: w.add_uint16("split.count", 3), rope__freq_base=1e6)
    with refused(CheckpointError, field="split.count", place=tmp_path / "part.gguf"):
        open_checkpoint(tmp_path / "part.gguf")
    their_file(tmp_path / "odd.gguf", TINY, rope__freq_base=1e6, new_idea=1)
    with pytest.warns(UserWarning, match="'new_idea' are unknown and ignored"):
        open_checkpoint(tmp_path / "odd.gguf")


def test_an_unsupported_tensor_type_is_named(tmp_path: pathlib.Path) -> None:
    def exotic(writer: gguf.GGUFWriter) -> None:
        kind = gguf.GGMLQuantizationType.IQ2_XXS
        writer.add_tensor("output2.weight", np.zeros((2, 66), dtype=np.uint8), raw_dtype=kind)

    their_file(tmp_path / "x.gguf", TINY, exotic)
    with refused(CheckpointError, field="output2.weight", place=tmp_path / "x.gguf"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("raw") / "x.gguf"
    tiny_model(NARROW, torch.bfloat16).save_pretrained(path, format="gguf", type="q8_0")
    return path.read_bytes()


@pytest.mark.parametrize("version", [1, 2, 3, 4, 0, 3 << 24])
def test_gguf_versions_2_and_3_are_read(tmp_path: pathlib.Path, raw: bytes, version: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw[:4] + struct.pack("<I", version) + raw[8:])
    if version in (2, 3):
        assert read_args(path)[0] == NARROW
    else:
        with refused(CheckpointError, place=path):
            read_args(path)


@pytest.mark.parametrize("keep", [0, 3, 4, 8, 23, 24, 30, 200, 900, -21, -53, -2000])
def test_a_file_truncated_anywhere_is_refused(tmp_path: pathlib.Path, raw: bytes, keep: int) -> None:
    (tmp_path / "x.gguf").write_bytes(raw[:keep])
    with refused(CheckpointError, place=tmp_path / "x.gguf"):
        open_checkpoint(tmp_path / "x.gguf")


HUGE = (1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@pytest.mark.parametrize("size", HUGE)
def test_lengths_beyond_the_file_raise_without_allocating(tmp_path: pathlib.Path, raw: bytes, size: int) -> None:
    huge = struct.pack("<Q", size)
    key = struct.pack("<Q", 1) + b"k"
    head = raw[:8] + struct.pack("<QQ", 0, 1)
    for name, content in {
        "tensors": raw[:8] + huge + raw[16:],
        "pairs": raw[:16] + huge + raw[24:],
        "key": head + huge + b"k",
        "string": head + key + struct.pack("<I", 8) + huge + b"x",
        "array": head + key + struct.pack("<II", 9, 0) + huge + bytes(50),
        "strings": head + key + struct.pack("<II", 9, 8) + huge + bytes(50),
        "shape": raw[:8] + struct.pack("<QQ", 1, 0) + key + struct.pack("<I", 2) + huge + huge + bytes(12),
        "offset": raw[:8] + struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 1, 1, 0, size & ~31),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content + bytes(64))
        with refused(CheckpointError, place=tmp_path / name):
            open_checkpoint(tmp_path / name)


@pytest.mark.wording
def test_counts_above_the_limits_are_refused(tmp_path: pathlib.Path, raw: bytes) -> None:
    """Limits are checked before parsing: Python objects are larger than the file."""
    head = raw[:8] + struct.pack("<QQ", 1, 1)
    for name, content in {
        "65536": raw[:8] + struct.pack("<QQ", (1 << 16) + 1, 0),
        "4096": raw[:16] + struct.pack("<Q", 4097),
        "1048576": head + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, (1 << 20) + 1),
        "64": raw[:8] + struct.pack("<QQQ", 1, 0, 65),
    }.items():
        (tmp_path / "x.gguf").write_bytes(content + bytes(2 << 20))
        with pytest.raises(CheckpointError, match=f"at most {name} "):
            open_checkpoint(tmp_path / "x.gguf")


def test_duplicate_or_overlapping_tensors_are_refused(tmp_path: pathlib.Path, raw: bytes) -> None:
    (tmp_path / "twice.gguf").write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with refused(CheckpointError, field="blk.0.ffn_up.weight", place=tmp_path / "twice.gguf"):
        open_checkpoint(tmp_path / "twice.gguf")
    at = raw.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8 + 4
    (tmp_path / "over.gguf").write_bytes(raw[:at] + bytes(8) + raw[at + 8 :])
    with refused(CheckpointError, place=tmp_path / "over.gguf"):
        open_checkpoint(tmp_path / "over.gguf")
    (tmp_path / "unaligned.gguf").write_bytes(raw[:at] + b"\1" + raw[at + 1 :])
    with refused(CheckpointError, place=tmp_path / "unaligned.gguf"):
        open_checkpoint(tmp_path / "unaligned.gguf")


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_rows_not_divisible_into_blocks_are_refused_without_remains(tmp_path: pathlib.Path, type: str) -> None:
    tiny_model(tiny_args(dim=64, hidden_dim=70)).save_pretrained(tmp_path / "in")
    with refused(CheckpointError, field="layers.0.attention.wo.weight"):
        convert(tmp_path / "in", tmp_path / "out" / "x.gguf", to="gguf", type=type)
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_values_out_of_a_types_range_are_refused(tmp_path: pathlib.Path) -> None:
    for type, bad in (("f16", 1e5), ("q8_0", float("nan"))):
        model = tiny_model(NARROW)
        model.layers[1].feed_forward.w2.weight[3, 5] = bad
        with refused(CheckpointError, field="layers.1.feed_forward.w2.weight"):
            model.save_pretrained(tmp_path / "x.gguf", format="gguf", type=type)
    tiny_model(NARROW).save_pretrained(tmp_path / "a")
    with refused(CheckpointError, field="type"):
        convert(tmp_path / "a", tmp_path / "x.gguf", to="gguf", type="q3")
    with refused(CheckpointError, field="type"):
        convert(tmp_path / "a", tmp_path / "b", to="mistral", type="q8_0")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    with refused(CheckpointError, place=tmp_path / "there.gguf"):
        convert(tmp_path / "a", tmp_path / "there.gguf", to="gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "there.gguf"}


def test_a_source_with_unwritable_keys_is_refused(tmp_path: pathlib.Path) -> None:
    their_file(tmp_path / "x.gguf", NARROW, lambda w: w.add_int64("tokenizer.ggml.odd", -1))
    with refused(CheckpointError, place=tmp_path / "y.gguf"):
        convert(tmp_path / "x.gguf", tmp_path / "y.gguf", to="gguf")
    their_file(tmp_path / "z.gguf", NARROW, lambda w: w.add_tokenizer_model("llama"))
    with refused(TokenizerError, field="tokenizer.ggml.tokens", place=tmp_path / "z.gguf"):
        convert(tmp_path / "z.gguf", tmp_path / "out", to="mistral")
    assert {p.name for p in tmp_path.iterdir()} == {"x.gguf", "z.gguf"}


def test_a_folder_with_one_gguf_file_opens_it(tmp_path: pathlib.Path) -> None:
    model = tiny_model(NARROW)
    model.save_pretrained(tmp_path / "x.gguf", format="gguf")
    assert same_bits(opened(tmp_path), model)
    assert read_args(tmp_path) == (NARROW, "gguf")
    shutil.copy(tmp_path / "x.gguf", tmp_path / "y.gguf")
    with refused(CheckpointError, place=tmp_path):
        opened(tmp_path)
    (tmp_path / "y.gguf").rename(tmp_path / "renamed.bin")  # told by content, not by name
    assert same_bits(opened(tmp_path / "renamed.bin"), model)


def test_other_formats_store_the_dequantized_values(tmp_path: pathlib.Path) -> None:
    tiny_model(NARROW).save_pretrained(tmp_path / "x.gguf", format="gguf", type="q4_0")
    convert(tmp_path / "x.gguf", tmp_path / "hf", to="huggingface")
    assert same_bits(opened(tmp_path / "hf"), opened(tmp_path / "x.gguf"))


def test_the_command_line_converts_to_gguf(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> str:
        assert main(list(argv)) == 0
        return capsys.readouterr().out

    path = str(tmp_path / "demo.gguf")
    run("convert", "demo", path, "--to", "gguf", "--type", "bf16")
    facts = json.loads(run("info", path, "--json"))
    assert (facts["format"], facts["args"]["sliding_window"]) == ("gguf", 256)
    said = [
        run("generate", m, "--prompt", "import", "--temperature", "0", "--max-tokens", "8") for m in ("demo", path)
    ]
    assert said[0] == said[1]
