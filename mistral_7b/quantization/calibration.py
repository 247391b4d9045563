"""Quantization that looks at what flows through the model, a block at a time.

Each block is rescaled (rescaling.py), then rounded with feedback (feedback.py), its Linears in the order in which
data passes them: so that each is fitted to inputs as the rounded ones before it make them. Both are measured
against inputs that become int8 as in use. experiments/results/2026-11-24-calibration.md says what each gives.

At 7B it holds at most, in bfloat16, for C = 16384 tokens of calibration in documents of 2048:

    0.44 GB   one block's weights
    0.12      the same quantized
    1.64      H of w2's inputs and its factor: 2 x 14336 x 14336 x 4 bytes
    0.41      1024 rows of w2 in float32, seven times
    0.40      the block's inputs, what wo is given or the block's outputs, and the stream between: 3 x C x 4096 x 2
    0.18      one document inside feed_forward: 3 x 2048 x 14336 x 2

which is 3.2 GB; a block of this size with C = 4096 peaked at 2.3 GiB, the interpreter and PyTorch included.

T tokens of one document · D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..cache import Stateless
from ..errors import QuantizationError
from ..model import Mistral7B, ModelArgs, RMSNorm, TransformerBlock, rope_phases
from .feedback import Feedback
from .fused import fuse
from .linear import Int4Linear, Int8Embedding, Int8Linear
from .rescaling import multiply, sample, search, set_weight
from .schemes import Scheme


@torch.no_grad()
def calibrate(
    model: Mistral7B,
    documents: Iterable[Sequence[int]],
    scheme: str | Scheme,
    progress: Callable[[str], None] | None = None,
) -> Mistral7B:
    """Quantize a model in place for what `documents` (token ids each, BOS first) make it compute; returns it.

    `progress` is called with the name of every part that is done. Some 16,000 tokens of what the model is used
    for are enough; more take time in proportion. QuantizationError if there are none, or for a scheme
    other than int8 and int4.
    """
    scheme = Scheme.of(scheme)
    ids = [torch.as_tensor(document, device=model.norm.weight.device) for document in documents]
    ids = [t for t in ids if len(t)]
    _check(ids, scheme)
    embedding = Int8Embedding.from_weight(model.tok_embeddings.weight.detach())
    model.set_submodule("tok_embeddings", embedding)
    inputs = [embedding(t) for t in ids]
    for i, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock)
        inputs = calibrate_block(block, inputs, model.args, scheme)
        if progress is not None:
            progress(f"layers.{i}")
    model.set_submodule("output", calibrate_output(model.norm, model.output, inputs, scheme))
    if progress is not None:
        progress("output")
    fuse(model)
    return model


@torch.no_grad()
def calibrate_block(
    block: TransformerBlock, inputs: list[Tensor], args: ModelArgs, scheme: Scheme
) -> list[Tensor]:
    """Quantize a block's Linears in place; returns what it then makes of `inputs`: those of the next block.

    `inputs` are one (T, D) for each document, whose first row stands at position 0, in the type of the block's
    weights. Norms change with the weights; the tensors that held them are not written to, so that they may be
    mapped from a file. QuantizationError as `calibrate`.
    """
    rescale_block(block, inputs, args, scheme)
    return round_block(block, inputs, args, scheme)


@torch.no_grad()
def round_block(block: TransformerBlock, inputs: list[Tensor], args: ModelArgs, scheme: Scheme) -> list[Tensor]:
    """The second half of `calibrate_block`: rounding with feedback."""
    _check(inputs, scheme)
    a, f = block.attention, block.feed_forward
    _round(a, ("wq", "wk", "wv"), (block.attention_norm(x) for x in inputs), scheme)
    heads = [_attended(block, x, args) for x in inputs]
    _round(a, ("wo",), heads, scheme)
    middle = [x + a.wo(h) for x, h in zip(inputs, heads, strict=True)]
    del heads
    _round(f, ("w1", "w3"), (block.ffn_norm(x) for x in middle), scheme)
    _round(f, ("w2",), (_gated(block, x) for x in middle), scheme)
    return [x + f(block.ffn_norm(x)) for x in middle]


@torch.no_grad()
def calibrate_output(norm: RMSNorm, output: nn.Module, inputs: list[Tensor], scheme: Scheme) -> nn.Module:
    """What takes the place of the projection onto the vocabulary, after the last block's outputs (T, D) each.

    `norm` and `output` may get rescaled weights, and others keep theirs: an embedding that was tied to the output.
    """
    assert isinstance(output, nn.Linear)
    s = search({"output": output}, norm(sample(inputs)), scheme)
    set_weight(norm, norm.weight / s)
    set_weight(output, output.weight * s)
    return scheme.linear(output.weight, "output")


@torch.no_grad()
def rescale_block(block: TransformerBlock, inputs: list[Tensor], args: ModelArgs, scheme: Scheme) -> None:
    """The first half of `calibrate_block`: norms and weights rescaled by powers of two.

    The block's function stays as it was.
    """
    _check(inputs, scheme)
    a, f, width = block.attention, block.feed_forward, args.head_dim

    def shared(size: Tensor) -> Tensor:  # heads that share values share what divides them: (H K,) to (H K,)
        grouped = size.view(args.n_kv_heads, -1, width)
        return grouped.amax(1, keepdim=True).expand_as(grouped).flatten()

    s = search(_pick(a, "wq", "wk", "wv"), block.attention_norm(sample(inputs)), scheme)
    multiply(_pick(a, "wq", "wk", "wv"), s)
    set_weight(block.attention_norm, block.attention_norm.weight / s)

    heads = [_attended(block, x, args) for x in inputs]
    s = search(_pick(a, "wo"), sample(heads), scheme, shared)
    middle = [x + a.wo(h) for x, h in zip(inputs, heads, strict=True)]
    del heads
    multiply(_pick(a, "wo"), s)
    set_weight(a.wv, a.wv.weight / s.view(args.n_kv_heads, -1, width)[:, 0].reshape(-1, 1))

    s = search(_pick(f, "w1", "w3"), block.ffn_norm(sample(middle)), scheme)
    multiply(_pick(f, "w1", "w3"), s)
    set_weight(block.ffn_norm, block.ffn_norm.weight / s)

    s = search(_pick(f, "w2"), _gated(block, sample(middle)), scheme)
    multiply(_pick(f, "w2"), s)
    set_weight(f.w3, f.w3.weight / s[:, None])


def _check(inputs: list[Tensor], scheme: Scheme) -> None:
    if not scheme.whole:
        raise QuantizationError(
            f"calibration is for int8 and int4, not for {scheme}", field="scheme", hint="quantize without"
        )
    if not inputs:
        raise QuantizationError(
            "no text to calibrate on", field="documents", hint="pass documents of token ids, or quantize without"
        )


def _round(parent: nn.Module, names: tuple[str, ...], inputs: Iterable[Tensor], scheme: Scheme) -> None:
    """Put quantized Linears in the place of those that share these inputs (T, K) each."""
    linears = _pick(parent, *names)
    feedback = Feedback(linears[names[0]].in_features)
    for x in inputs:
        feedback.add(x)
    feedback.factor()
    for name, linear in linears.items():
        made: nn.Module
        if scheme.name == "int8":
            made = Int8Linear.from_codes(feedback.round_int8(linear.weight))
        else:
            codes = feedback.round_int4(linear.weight, scheme.group_size, scheme.symmetric)
            made = Int4Linear.from_codes(codes, linear.in_features)
        setattr(parent, name, made)


def _pick(parent: nn.Module, *names: str) -> dict[str, nn.Linear]:
    linears = {name: parent.get_submodule(name) for name in names}
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise QuantizationError(
                f"{name} is no plain Linear but {linear}", field=name, hint="calibrate a model as it was loaded"
            )
    return linears  # type: ignore[return-value]


def _attended(block: TransformerBlock, x: Tensor, args: ModelArgs) -> Tensor:
    """What wo is given for the block's input x (T, D): (T, H K)."""
    memory = Stateless(args.sliding_window)
    rope = rope_phases(memory.extend(x[:, 0]), args.head_dim, args.rope_theta, x.dtype)
    return _given(block.attention.wo, lambda: block.attention(block.attention_norm(x), rope, memory))


def _gated(block: TransformerBlock, x: Tensor) -> Tensor:
    """What w2 is given for x (T, D), the stream after attention: (T, F)."""
    return _given(block.feed_forward.w2, lambda: block.feed_forward(block.ffn_norm(x)))


def _given(linear: nn.Module, run: Callable[[], object]) -> Tensor:
    """The input that `linear` gets while `run` runs."""
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run()
    finally:
        hook.remove()
    return seen[0]
