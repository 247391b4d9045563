"""Reading and writing every format: bit-identical round trips, and logits of transformers."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil

import pytest
import torch
import transformers
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import TINY, close, tiny_args, tiny_model, tokens_of

from mistral_7b import CheckpointError, Mistral7B, ModelArgs
from mistral_7b.checkpoint import convert, reading

# All sizes of a configuration differ, so that a transposed or wrong dimension fails.
CONFIGS = {
    "window": TINY,
    "no window, v0.3's theta": tiny_args(sliding_window=None, rope_theta=1e6, dim=44, n_heads=5, n_kv_heads=1),
    "deep": tiny_args(n_layers=5, n_heads=8, n_kv_heads=4, head_dim=6, dim=36, hidden_dim=70, sliding_window=3),
    "no grouping": tiny_args(n_heads=7, n_kv_heads=7, head_dim=12, dim=48, sliding_window=9, norm_eps=1e-4),
    "tied": tiny_args(tie_embeddings=True, vocab_size=83, n_heads=9, n_kv_heads=3, head_dim=4),
}


def same_bits(a: Mistral7B, b: Mistral7B) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one
    )


def opened(path: pathlib.Path, dtype: torch.dtype = torch.float32) -> Mistral7B:
    return Mistral7B.from_pretrained(path, dtype=dtype)


@pytest.mark.parametrize("args", CONFIGS.values(), ids=CONFIGS)
def test_trap_09_and_10_transformers_loads_our_checkpoints(
    tmp_path: pathlib.Path, args: ModelArgs, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    model = tiny_model(args)
    if args.tie_embeddings:
        model.tok_embeddings.weight.mul_(args.dim**-0.5)  # or the logits would be five times the usual size
    model.save_pretrained(tmp_path / "out", max_shard_size="15KB")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert type(theirs).__name__ == "MistralForCausalLM"
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert [w for w in recwarn if "transformers" in w.filename] == []
    tokens = tokens_of((2, 41), args)  # longer than two windows of every configuration
    close(theirs(tokens).logits.detach(), model(tokens)[0])
    assert theirs.config.max_position_embeddings == args.max_seq_len


@pytest.mark.parametrize("args", CONFIGS.values(), ids=CONFIGS)
def test_trap_09_and_10_we_load_transformers_checkpoints(tmp_path: pathlib.Path, args: ModelArgs) -> None:
    torch.manual_seed(3)
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
            num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
            head_dim=args.head_dim, rms_norm_eps=args.norm_eps, sliding_window=args.sliding_window,
            rope_parameters={"rope_theta": args.rope_theta, "rope_type": "default"},
            max_position_embeddings=args.max_seq_len, tie_word_embeddings=args.tie_embeddings,
            initializer_range=0.3, attn_implementation="eager",
        )
    )  # fmt: skip
    for name, p in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="15KB")
    model = opened(tmp_path / "theirs")
    assert model.args == args
    tokens = tokens_of((2, 41), args)
    wanted = theirs(tokens).logits.detach()
    scale = max(1.0, float(wanted.abs().max()) / 5)  # relative to the logits that the tolerance was chosen for
    close(model(tokens)[0] / scale, wanted / scale)


@pytest.mark.parametrize("tied", [False, True])
def test_we_load_transformers_llama_without_a_window(tmp_path: pathlib.Path, tied: bool) -> None:
    args = tiny_args(dim=60, sliding_window=None, rope_theta=1e5, tie_embeddings=tied)
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
            num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
            head_dim=args.head_dim, rms_norm_eps=args.norm_eps, max_position_embeddings=args.max_seq_len,
            rope_parameters={"rope_theta": args.rope_theta, "rope_type": "default"}, tie_word_embeddings=tied,
            initializer_range=0.15, attn_implementation="eager",
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    model = opened(tmp_path / "theirs")
    assert model.args == args
    tokens = tokens_of((2, 41), args)
    wanted = theirs(tokens).logits.detach()
    scale = max(1.0, float(wanted.abs().max()) / 5)
    close(model(tokens)[0] / scale, wanted / scale)
    model.save_pretrained(tmp_path / "ours")  # as a Mistral, which transformers opens with the same logits
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again).__name__ == "MistralForCausalLM"
    close(again(tokens).logits.detach() / scale, wanted / scale)


def test_trap_09_without_the_permutation_the_parity_would_fail(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "out")
    monkeypatch.setattr(reading, "interleaved", lambda w, heads: w.clone())
    tokens = tokens_of((1, 20))
    assert (opened(tmp_path / "out")(tokens)[0] - model(tokens)[0]).abs().max() > 0.1


@pytest.mark.parametrize("args", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trap_09_round_trips_are_bit_identical(
    tmp_path: pathlib.Path, args: ModelArgs, dtype: torch.dtype
) -> None:
    model = tiny_model(args, dtype)
    model.save_pretrained(tmp_path / "a", max_shard_size=20_000)
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    convert(tmp_path / "b", tmp_path / "c", to="huggingface", max_shard_size=20_000)
    model.save_pretrained(tmp_path / "d", format="mistral")
    for folder in "abcd":
        copy = opened(tmp_path / folder, dtype)
        assert copy.args == args
        assert same_bits(model, copy)
        assert (copy.output.weight is copy.tok_embeddings.weight) == args.tie_embeddings
    for one, two in (("a", "c"), ("b", "d")):
        assert {p.name: p.read_bytes() for p in (tmp_path / one).iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / two).iterdir()
        }


def test_the_mistral_format_is_one_file_with_mistrals_names(tmp_path: pathlib.Path) -> None:
    model = tiny_model(tiny_args(tie_embeddings=True))
    model.save_pretrained(tmp_path / "out", format="mistral", max_shard_size=1000)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["consolidated.safetensors", "params.json"]
    weights = load_file(tmp_path / "out" / "consolidated.safetensors")
    assert weights.keys() == model.state_dict().keys()  # includes the output, which is untied there
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert (params["rope_theta"], params["sliding_window"]) == (TINY.rope_theta, TINY.sliding_window)


def test_a_pickle_loads_like_safetensors(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "out", format="mistral")
    (tmp_path / "out" / "consolidated.safetensors").unlink()
    state = model.state_dict()
    state["layers.0.attention.wv.weight"] = state["layers.0.attention.wv.weight"].t().contiguous().t()
    state["norm.weight"] = torch.cat([torch.zeros(5), state["norm.weight"]])[5:]  # a view into a larger storage
    torch.save(state, tmp_path / "out" / "consolidated.00.pth")
    assert same_bits(model, opened(tmp_path / "out"))
    assert same_bits(model, opened(tmp_path / "out" / "consolidated.00.pth"))


def test_a_sharded_hugging_face_pickle_loads(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)  # stored by old converters
    index = {}
    for i, part in enumerate((list(state)[:9], list(state)[9:]), 1):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / "out" / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "out" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert same_bits(model, opened(tmp_path / "out"))


def test_a_single_weight_file_loads_under_any_name(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    for format, old in (("huggingface", "model.safetensors"), ("mistral", "consolidated.safetensors")):
        folder = tmp_path / format
        model.save_pretrained(folder, format=format)
        (folder / old).rename(folder / "mine.bin")
        for source in (folder / "mine.bin", folder):
            copy = opened(source)
            assert same_bits(model, copy)
            assert copy.source == folder


def test_layouts_are_detected_by_tensor_names(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "ms", format="mistral")
    shutil.copy(tmp_path / "ms" / "consolidated.safetensors", tmp_path / "hf" / "model.safetensors")
    assert same_bits(model, opened(tmp_path / "hf"))


def test_one_of_two_layouts_in_a_folder_is_loaded(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    model.save_pretrained(tmp_path / "ms", format="mistral")
    for path in (tmp_path / "ms").iterdir():
        shutil.copy(path, tmp_path / "hf")
    both = reading.open_checkpoint(tmp_path / "hf")
    assert both.format == "huggingface"
    assert both.nbytes() == sum(p.numel() * 4 for p in model.parameters())
    assert same_bits(model, opened(tmp_path / "hf"))
    next((tmp_path / "hf").glob("model-00002*")).unlink()  # one copy is incomplete, the other complete
    assert reading.open_checkpoint(tmp_path / "hf").format == "mistral"
    assert same_bits(model, opened(tmp_path / "hf"))


def test_load_returns_the_requested_dtype_and_device(tmp_path: pathlib.Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in Mistral7B.from_pretrained(tmp_path / "out").parameters()} == {torch.bfloat16}
    assert same_bits(opened(tmp_path / "out", torch.float64), model.to(torch.float64))
    assert all(p.is_meta for p in Mistral7B.from_pretrained(tmp_path / "out", device="meta").parameters())


def test_training_a_loaded_model_does_not_change_its_file(tmp_path: pathlib.Path) -> None:
    tiny_model().save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    model = opened(tmp_path / "out")
    assert all(p.requires_grad for p in model.parameters())
    model(tokens_of((1, 20)))[0].logsumexp(-1).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not same_bits(model, opened(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_saving_over_the_source_folder_is_refused(tmp_path: pathlib.Path) -> None:
    tiny_model().save_pretrained(tmp_path / "out")
    model = opened(tmp_path / "out")
    with refused(CheckpointError, place=tmp_path / "out"):
        model.save_pretrained(tmp_path / "out")
    assert same_bits(model, opened(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert same_bits(model, opened(tmp_path / "empty"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "out"]


def test_tokenizer_files_are_copied(tmp_path: pathlib.Path) -> None:
    tiny_model().save_pretrained(tmp_path / "a")
    for name in ("tokenizer.model", "tokenizer.model.v3", "tokenizer.json", "chat_template.jinja", "notes.txt"):
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 5}')
    opened(tmp_path / "a").save_pretrained(tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", to="mistral")
    tokenizers = {"tokenizer.model", "tokenizer.model.v3", "tokenizer.json", "chat_template.jinja"}
    tokenizers.add("generation_config.json")  # its ends are not Mistral's
    assert {p.name for p in (tmp_path / "c").iterdir()} == tokenizers | {"params.json", "consolidated.safetensors"}
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"eos_token_id": 5}


def test_shards_respect_their_limit_and_the_index_is_complete(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "out", max_shard_size="25KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 3
    assert {name: file for file, held in shards.items() for name in held} == index["weight_map"]
    sizes = [sum(t.nbytes for t in held.values()) for held in shards.values()]
    assert max(sizes) <= 25_000
    assert sum(sizes) == index["metadata"]["total_size"]


@pytest.mark.parametrize("size", ["5 apples", "GB", 0, -1, "0GB", "nan"])
def test_an_invalid_shard_size_is_refused(tmp_path: pathlib.Path, size: int | str) -> None:
    with refused(CheckpointError, field="max_shard_size"):
        tiny_model().save_pretrained(tmp_path / "out", max_shard_size=size)


def test_mixed_dtypes_are_preserved(tmp_path: pathlib.Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.norm.float()
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    weights = load_file(tmp_path / "b" / "consolidated.safetensors")
    assert weights["norm.weight"].dtype == torch.float32
    assert torch.equal(weights["norm.weight"], model.norm.weight)
    assert weights["output.weight"].dtype == torch.bfloat16


def test_an_unaligned_safetensors_header_is_read(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip() + b" "
    header += b" " * ((len(header) + 1) % 2)  # an odd length: every tensor is unaligned
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert same_bits(model, opened(tmp_path / "out"))


def test_weights_that_cannot_be_saved_are_named(tmp_path: pathlib.Path) -> None:
    with refused(CheckpointError, field="tok_embeddings.weight"):
        Mistral7B(TINY, device="meta").save_pretrained(tmp_path / "out")
    adapted = tiny_model()
    adapted.output = torch.nn.Linear(TINY.dim, TINY.vocab_size, bias=True)
    with refused(CheckpointError, field="output.bias"):
        adapted.save_pretrained(tmp_path / "out")
    quantized = tiny_model()
    quantized.layers[1].attention.wk = torch.nn.Identity()
    with refused(CheckpointError, field="layers.1.attention.wk.weight"):
        quantized.save_pretrained(tmp_path / "out")
    with refused(CheckpointError, field="format"):
        tiny_model().save_pretrained(tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_tied_model_with_a_different_output_is_refused(tmp_path: pathlib.Path) -> None:
    tiny_model(tiny_args(tie_embeddings=True)).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    opened(tmp_path / "out")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, path)
    with refused(CheckpointError, field="lm_head.weight", place=path):
        opened(tmp_path / "out")
