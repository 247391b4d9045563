"""Files of K types: which tensors are Q6_K in a Q4_K_M file, and the model of one."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch
from tiny import tiny_args, tiny_model, tokens_of
from torch import nn

from mistral_7b import Mistral7B, ModelArgs
from mistral_7b.checkpoint import convert
from mistral_7b.checkpoint.gguf.file import read
from mistral_7b.checkpoint.gguf.modules import BlockEmbedding
from mistral_7b.checkpoint.names import rename
from mistral_7b.checkpoint.reading import open_checkpoint
from mistral_7b.kernels.cpu.compiler import library
from mistral_7b.kernels.linear import quantize_rows
from mistral_7b.quantization.linear import BlockLinear
from mistral_7b.surgery import replace_linears

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer.model")
WIDE = tiny_args(
    dim=256, n_layers=10, head_dim=32, hidden_dim=512, n_heads=8, n_kv_heads=2, vocab_size=83, rope_theta=1e6,
    sliding_window=None,
)  # fmt: skip


def written(folder: pathlib.Path, args: ModelArgs, type: str) -> pathlib.Path:
    path = folder / f"{type}.gguf"
    tiny_model(args, torch.bfloat16).save_pretrained(path, format="gguf", type=type)
    return path


def kinds_of(path: pathlib.Path) -> dict[str, str]:
    """The types of the matrices by Mistral's names."""
    entries = read(path).entries.items()
    return {
        (rename(name, "gguf", "mistral") or "").removesuffix(".weight"): entry.kind.name
        for name, entry in entries
        if len(entry.shape) == 2
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return written(tmp_path_factory.mktemp("k"), WIDE, "q4_k_m")


def test_q4_k_m_has_llama_cpps_mixture(mixed: pathlib.Path) -> None:
    """Of 10 layers: the first eighth, from seven eighths on, and every third between."""
    kinds = kinds_of(mixed)
    layers = [0, 3, 6, 8, 9]
    wanted = {f"layers.{i}.{name}" for i in layers for name in ("attention.wv", "feed_forward.w2")}
    assert {name for name, kind in kinds.items() if kind == "Q6_K"} == {*wanted, "output"}
    assert {kind for name, kind in kinds.items() if kind != "Q6_K"} == {"Q4_K"}
    assert kinds["tok_embeddings"] == "Q4_K"
    assert read(mixed).metadata["general.file_type"] == 15


def test_q6_k_has_one_type(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, WIDE, "q6_k")
    assert set(kinds_of(path).values()) == {"Q6_K"}
    assert read(path).metadata["general.file_type"] == 18


def test_a_tied_embedding_is_an_output(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, dataclasses.replace(WIDE, tie_embeddings=True, n_layers=1), "q4_k_m")
    assert kinds_of(path)["tok_embeddings"] == "Q6_K"
    model = Mistral7B.from_pretrained(path)
    assert isinstance(model.tok_embeddings, BlockEmbedding)
    assert isinstance(model.output, BlockLinear)
    assert torch.equal(model.output.dequantized(), model.tok_embeddings.dequantized())


def test_narrow_rows_have_llama_cpps_other_types(tmp_path: pathlib.Path) -> None:
    """Rows of 64 and 96 values: Q5_0 in place of Q4_K, Q8_0 in place of Q6_K."""
    args = tiny_args(dim=64, head_dim=32, n_heads=4, n_kv_heads=2, hidden_dim=96)
    kinds = kinds_of(written(tmp_path, args, "q4_k_m"))
    assert kinds["output"] == kinds["layers.1.attention.wv"] == "Q8_0"
    assert kinds["layers.1.attention.wo"] == kinds["tok_embeddings"] == "Q5_0"
    assert set(kinds_of(written(tmp_path, args, "q6_k")).values()) == {"Q8_0"}


def test_the_model_takes_the_room_of_the_file(mixed: pathlib.Path) -> None:
    """Only the output's rows are padded, to a multiple of 16."""
    model = Mistral7B.from_pretrained(mixed)
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    entries = {
        name: read(mixed).entries[rename(f"{name}.weight", "mistral", "gguf") or ""] for name in kinds_of(mixed)
    }
    for name, module in model.named_modules():
        if isinstance(module, (BlockLinear, BlockEmbedding)):
            size = sum(t.nbytes for n, t in tensors.items() if n.startswith(f"{name}."))
            rows = entries[name].shape[0]
            padded = rows if isinstance(module, BlockEmbedding) else -(-rows // 16) * 16
            assert size == entries[name].nbytes // rows * padded
            entries.pop(name)
    assert not entries


def test_decode_is_bit_identical_to_prefill(mixed: pathlib.Path) -> None:
    """With v of another type than q and k, and down of another than gate and up, in the fused blocks."""
    model, tokens = Mistral7B.from_pretrained(mixed), tokens_of((1, 21))
    with torch.no_grad():
        cache = model.rolling_cache(1, 32)
        whole, _ = model(tokens, cache)
        cache = model.rolling_cache(1, 32)
        steps = [model(tokens[:, i : i + 1], cache)[0] for i in range(21)]
    assert torch.equal(torch.cat(steps, 1), whole)


class Rounded(nn.Module):
    """A Linear whose activations are rounded to 1 in 127 of the largest of 256."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, (self.out_features, self.in_features) = linear.weight, linear.weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale = quantize_rows(x.unflatten(-1, (-1, 256)))
        return nn.functional.linear((q * scale).flatten(-2), self.weight)


def test_only_activations_are_rounded(tmp_path: pathlib.Path) -> None:
    """Of some tokens: a difference in the last bits can change a rounding, and random attention amplifies it."""
    args = dataclasses.replace(WIDE, n_layers=2)
    path, tokens = written(tmp_path, args, "q4_k_m"), tokens_of((1, 40))
    model, checkpoint = Mistral7B.from_pretrained(path, dtype=torch.float32), open_checkpoint(path)
    plain = Mistral7B(args, dtype=torch.float32)
    plain.load_state_dict({name: checkpoint.read(name, torch.float32) for name in checkpoint.tensors})
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear):
            assert torch.equal(module.dequantized(), plain.get_parameter(f"{name}.weight"))
    with torch.no_grad():
        ours, exact = model(tokens)[0][0], plain(tokens)[0][0]
        replace_linears(plain, lambda linear, name: Rounded(linear))  # type: ignore[arg-type]
        rounded = plain(tokens)[0][0]
    by_rounding = (ours - exact).norm(dim=-1)  # of each token
    others = (ours - rounded).norm(dim=-1) / by_rounding
    print(f"difference {(by_rounding / exact.norm(dim=-1)).median():.1e}, of it other than rounding {others}")
    assert (others < 0.01).sum() >= 8
    assert 1e-3 < (by_rounding / exact.norm(dim=-1)).median() < 0.1


def test_converting_keeps_blocks_and_dequantizes_for_other_formats(
    mixed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    convert(mixed, tmp_path / "copy.gguf", to="gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == mixed.read_bytes()
    convert(mixed, tmp_path / "plain", to="mistral")
    plain, ours = Mistral7B.from_pretrained(tmp_path / "plain", dtype=torch.float32), open_checkpoint(mixed)
    assert torch.equal(plain.layers[0].attention.wv.weight, ours.read("layers.0.attention.wv.weight"))


@pytest.mark.skipif(library() is None, reason="without the kernels no engine is deterministic")
def test_a_deterministic_engine_accepts_blocks(mixed: pathlib.Path) -> None:
    from mistral_7b.engine.llm import make_deterministic

    model = Mistral7B.from_pretrained(mixed)
    make_deterministic(model)
    assert isinstance(model.output, BlockLinear)
    mixed_types = Mistral7B.from_pretrained(mixed)
    mixed_types.layers[0].attention.wq = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    make_deterministic(mixed_types)
    assert not any(isinstance(m, nn.Linear) for m in mixed_types.modules())
