"""Calibrated rounding against published GPTQ and round-to-nearest, and its quality limits."""

from __future__ import annotations

import copy
import json
import sysconfig
from pathlib import Path

import pytest
import torch
from refusals import refused
from tiny import TINY, tiny_model, tokens_of
from torch import Tensor

import mistral_7b
from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.cache import Stateless
from mistral_7b.errors import QuantizationError
from mistral_7b.evaluation import distance
from mistral_7b.kernels.linear import quantize_rows
from mistral_7b.model import TransformerBlock, rope_phases
from mistral_7b.quantization import Scheme, quantize
from mistral_7b.quantization.calibration import calibrate, calibrate_block, calibrate_output, rescale_block
from mistral_7b.quantization.feedback import DAMPING, Feedback
from mistral_7b.quantization.linear import Int8Embedding
from mistral_7b.quantization.rounding import Int4Codes, round_int4, round_int8

INT4 = tuple(Scheme("int4", group, symmetric) for group in (128, 32) for symmetric in (True, False))
DOCUMENTS = [tokens_of((30,), seed=s).tolist() for s in range(8)]


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs with few principal components, of unequal energy."""
    few = torch.randn(rows, columns // 8) @ torch.randn(columns // 8, columns)
    return (few + 0.3 * torch.randn(rows, columns)) * torch.linspace(0.2, 3, columns)


def feedback_of(x: Tensor) -> Feedback:
    feedback = Feedback(x.shape[1])
    for part in x.split(100):
        feedback.add(part)
    feedback.factor()
    return feedback


def weight_of(q: Int4Codes, columns: int) -> Tensor:
    return q.integers()[:, :columns] * q.scale[:, None]


def output_error(x: Tensor, weight: Tensor, rounded: Tensor) -> float:
    q, scale = quantize_rows(x)
    return (q * scale @ (rounded - weight).T).square().sum().item()


def gptq_as_published(weight: Tensor, x: Tensor, q: Int4Codes, group_size: int) -> Tensor:
    """arXiv:2210.17323, equations 2 and 3, one column at a time with the inverse: integers (N, K), in float64."""
    ints, sx = quantize_rows(x)
    xq = (ints * sx).double()
    gram = xq.T @ xq
    inverse = (gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))).inverse()
    w, out = weight.double().clone(), torch.empty_like(weight)
    left = torch.ones(len(gram), dtype=torch.bool)
    for k in gram.diagonal().argsort(descending=True).tolist():
        m, z = q.m[:, k // group_size].double(), q.z[:, k // group_size].double()
        code = (w[:, k] / (m * q.scale) + z).round().clamp(0, 15)
        out[:, k] = m * (code - z)
        wrong = (w[:, k] - out[:, k] * q.scale.double()) / inverse[k, k]
        left[k] = False
        w[:, left] -= wrong[:, None] * inverse[k, left]
        inverse = inverse - inverse[:, k : k + 1] @ inverse[k : k + 1] / inverse[k, k]
    return out


@pytest.mark.parametrize("scheme", INT4, ids=str)
def test_feedback_is_equivalent_to_gptq(scheme: Scheme) -> None:
    x, weight = correlated(600, 200), torch.randn(19, 200)
    found = feedback_of(x).round_int4(weight, scheme.group_size, scheme.symmetric)
    wanted = gptq_as_published(weight, x, found, scheme.group_size)
    # A small difference in sums may change a rounding, and then the following ones of its row.
    assert (found.integers()[:, :200] == wanted).all(1).float().mean() > 0.8
    assert (round_int4(weight, scheme.group_size, scheme.symmetric).integers()[:, :200] != wanted).any(1).all()


@pytest.mark.parametrize("scheme", INT4, ids=str)
def test_feedback_beats_rounding_to_nearest_on_the_same_grid(scheme: Scheme) -> None:
    x, weight = correlated(2000, 320), torch.randn(1030, 320)  # more rows than are processed at a time
    nearest = round_int4(weight, scheme.group_size, scheme.symmetric)
    found = feedback_of(x).round_int4(weight, scheme.group_size, scheme.symmetric)
    for a, b in zip(found[1:], nearest[1:], strict=True):
        assert a.equal(b)
    assert found.q.max() <= 15
    assert not found.integers()[:, 320:].any()
    errors = [output_error(x, weight, weight_of(q, 320)) for q in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_int8_feedback_beats_rounding_to_nearest() -> None:
    x, weight = correlated(2000, 320), torch.randn(40, 320)
    found, nearest = feedback_of(x).round_int8(weight), round_int8(weight)
    assert found.scale.equal(nearest.scale)
    errors = [output_error(x, weight, q.integers() * q.scale[:, None]) for q in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("scheme", INT4, ids=str)
def test_without_correlation_feedback_is_rounding_to_nearest(scheme: Scheme) -> None:
    weight = torch.randn(33, 160)
    found = feedback_of(torch.eye(160)).round_int4(weight, scheme.group_size, scheme.symmetric)
    for a, b in zip(found, round_int4(weight, scheme.group_size, scheme.symmetric), strict=True):
        assert a[:, :160].equal(b[:, :160]) if a.dim() > 1 else a.equal(b)


def test_inputs_that_are_always_zero() -> None:
    x = correlated(300, 64)
    x[:, ::3] = 0
    assert feedback_of(x).round_int4(torch.randn(5, 64), 32, True).scale.isfinite().all()
    assert feedback_of(torch.zeros(9, 64)).round_int4(torch.randn(5, 64), 32, True).scale.isfinite().all()


def with_outliers(model: Mistral7B) -> Mistral7B:
    """Scales channels up by 10 to 40 and the weights they multiply down, where rescaling can undo it; in place."""
    args = model.args
    for block in model.layers:
        a, f = block.attention, block.feed_forward
        factor = torch.ones(args.dim, dtype=a.wq.weight.dtype)
        factor[[3, 11, 29]] = torch.tensor([10.0, 20, 40]).to(factor)
        for norm, linears in ((block.attention_norm, (a.wq, a.wk, a.wv)), (block.ffn_norm, (f.w1, f.w3))):
            norm.weight.mul_(factor)
            for linear in linears:
                linear.weight.div_(factor)
        values = torch.ones(args.n_kv_heads, args.head_dim).to(factor)
        values[0, 2] = values[-1, 5] = 30
        a.wv.weight.mul_(values.view(-1, 1))
        a.wo.weight.div_(values.repeat_interleave(args.n_heads // args.n_kv_heads, 0).flatten())
        f.w3.weight[7] *= 25
        f.w2.weight[:, 7] /= 25
    return model


def run(block: TransformerBlock, inputs: list[Tensor]) -> list[Tensor]:
    out = []
    for x in inputs:
        memory = Stateless(TINY.sliding_window)
        rope = rope_phases(memory.extend(x[:, 0]), TINY, x.dtype)
        out.append(block(x, rope, memory))
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rescaling_keeps_the_function(dtype: torch.dtype) -> None:
    """Bit-identical, since the factors are powers of two. All rescalable tensors must have changed."""
    model = with_outliers(tiny_model(dtype=dtype))
    block = model.layers[0]
    before = copy.deepcopy(block)
    inputs = [torch.randn(25, TINY.dim, dtype=dtype) for _ in range(3)]
    wanted, held = run(block, inputs), list(block.parameters())
    rescale_block(block, inputs, TINY, Scheme("int4", 32))
    for a, b in zip(run(block, inputs), wanted, strict=True):
        assert a.equal(b)
    assert all(
        p.equal(q) for p, q in zip(held, before.parameters(), strict=True)
    )  # memory-mapped tensors are not modified
    changed = {n for n, p in block.named_parameters() if not p.equal(before.get_parameter(n))}
    assert {"attention_norm.weight", "ffn_norm.weight"} < changed
    assert {f"attention.{n}.weight" for n in ("wq", "wk", "wv", "wo")} < changed
    assert {f"feed_forward.{n}.weight" for n in ("w1", "w2", "w3")} < changed


def test_rescaling_helps_with_outliers_and_feedback_always() -> None:
    original = with_outliers(tiny_model())
    block, inputs = original.layers[0], [torch.randn(60, TINY.dim) for _ in range(10)]
    wanted = torch.cat(run(block, inputs))

    def error(scheme: Scheme, calibrated: bool) -> float:
        made = copy.deepcopy(block)
        if calibrated:
            out = calibrate_block(made, inputs, TINY, scheme)
            assert torch.cat(out).equal(torch.cat(run(made, inputs)))  # it returns the block's outputs
        else:
            for parent in (made.attention, made.feed_forward):
                for name, linear in list(parent.named_children()):
                    setattr(parent, name, scheme.linear(linear.weight, name))
            out = run(made, inputs)
        return (torch.cat(out) - wanted).square().sum().item()

    for scheme in (*INT4, Scheme("int8")):
        assert error(scheme, True) < 0.5 * error(scheme, False), scheme


def test_calibrating_block_by_block_equals_calibrating_the_model() -> None:
    scheme, names = Scheme("int4", 32), []
    whole = calibrate(with_outliers(tiny_model()), DOCUMENTS, scheme, names.append)
    assert names == ["layers.0", "layers.1", "output"]
    source = with_outliers(tiny_model())
    embedding = Int8Embedding.from_weight(source.tok_embeddings.weight)
    inputs = [embedding(torch.tensor(ids)) for ids in DOCUMENTS]
    for block in source.layers:
        inputs = calibrate_block(block, inputs, TINY, scheme)
    source.output = calibrate_output(source.norm, source.output, inputs, scheme)
    source.tok_embeddings = embedding
    left, right = whole.state_dict(), source.state_dict()
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


def test_tied_embeddings_are_untied_by_quantization() -> None:
    args = mistral_7b.ModelArgs(**{**vars(TINY), "tie_embeddings": True})
    model = calibrate(tiny_model(args), DOCUMENTS, "int4")
    nearest = Int8Embedding.from_weight(tiny_model(args).tok_embeddings.weight)
    assert model.tok_embeddings.codes.equal(nearest.codes)


def test_invalid_calibration_is_refused_and_leaves_the_model_unchanged() -> None:
    model = tiny_model()
    with refused(QuantizationError, field="documents"):
        calibrate(model, [[]], "int4")
    with refused(QuantizationError, field="scheme"):
        calibrate(model, DOCUMENTS, "bf16")
    assert isinstance(model.tok_embeddings, torch.nn.Embedding)
    with refused(QuantizationError, field="wq"):
        calibrate_block(quantize(tiny_model(), "int8").layers[0], [torch.randn(5, TINY.dim)], TINY, Scheme("int8"))
    model.layers[0].attention_norm.weight[0] = torch.nan
    with pytest.raises(QuantizationError):
        calibrate(model, DOCUMENTS, "int8")


def demo_documents(fate: str, tokens: int, every: int) -> list[list[int]]:
    """Tokens from the middle of every n-th file with this `fate` in the bundled model's manifest."""
    manifest = json.loads((Path(mistral_7b.__file__).parent / "demo/manifest.json").read_text())
    tokenizer, root = Tokenizer.from_pretrained("demo"), Path(sysconfig.get_paths()["stdlib"])
    files = [root / f["file"] for f in manifest["files"] if f["fate"] == fate]
    texts = [p.read_text(encoding="utf-8") for p in files[::every] if p.exists()]
    encoded = [tokenizer.encode(text) for text in texts]
    return [[1, *ids[len(ids) // 3 :][: tokens - 1]] for ids in encoded]


@pytest.mark.slow
def test_the_bundled_model_is_within_its_limits() -> None:
    """int4 loses at most 1% of perplexity, int8 0.1%; with outliers, rounding to nearest would lose far more."""
    original = Mistral7B.from_pretrained("demo", dtype=torch.float32).requires_grad_(False)
    train, held_out = demo_documents("train", 1024, every=180), demo_documents("held_out", 385, every=1)
    int4, int8 = (calibrate(copy.deepcopy(original), train, name) for name in ("int4", "int8"))
    found = distance(original, int4, held_out)
    assert found.ratio < 1.01
    assert found.kl < 0.009
    found = distance(original, int8, held_out)
    assert found.ratio < 1.001
    assert found.kl < 0.0008
    nearest, calibrated = with_outliers(copy.deepcopy(original)), with_outliers(copy.deepcopy(original))
    assert distance(original, quantize(nearest, "int8"), held_out[::8]).kl > 0.01
    assert distance(original, calibrate(calibrated, train, "int8"), held_out[::8]).kl < 0.0012
