"""Quantization calibrated on activations, one block at a time.

The Linears of a block are rounded with error feedback (feedback.py) in the order of the forward pass, so that each
is fitted to the outputs of the rounded ones before it. Activations are quantized as at inference.

Memory at 7B, for C = 4096 calibration tokens in documents of 512:

    0.87 GB   one block's weights in float32
    0.12      the same quantized
    0.21      H of w2's inputs, 4 chunks: 4 x 3584 x 3584 x 4 bytes; in place of each its factor
    0.35      1024 rows of w2 in float32, six times
    0.19      the residual stream and w2's inputs: C x (2 x 4096 + 14336) x 2

T tokens of one document · D width
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..cache import Stateless
from ..errors import QuantizationError
from ..kernels.block_formats import FORMATS
from ..model import Mistral7B, ModelArgs, TransformerBlock, rope_phases
from .feedback import Feedback
from .fused import fuse
from .linear import BlockLinear, Int8Embedding
from .schemes import Scheme


@torch.no_grad()
def calibrate(
    model: Mistral7B,
    documents: Iterable[Sequence[int]],
    scheme: str | Scheme,
    progress: Callable[[str], None] | None = None,
) -> Mistral7B:
    """Quantize a model in place, calibrated on `documents` (token ids, BOS first); returns the model.

    `progress` is called with the name of each finished part. Some 16,000 tokens of typical input are enough; the
    time is proportional to their number. Raises QuantizationError if there are none, or if the scheme is not int8
    or int4.
    """
    scheme = Scheme.of(scheme)
    ids = [torch.as_tensor(document, device=model.norm.weight.device) for document in documents]
    ids = [t for t in ids if len(t)]
    _check_inputs(ids, scheme)
    embedding = Int8Embedding.from_weight(model.tok_embeddings.weight.detach())
    model.set_submodule("tok_embeddings", embedding)
    inputs = [embedding(t) for t in ids]
    for i, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock)
        inputs = calibrate_block(block, inputs, model.args, scheme, i)
        if progress is not None:
            progress(f"layers.{i}")
    assert isinstance(model.output, nn.Linear)
    model.set_submodule("output", scheme.linear(model.output.weight, "output", model.args.n_layers))
    if progress is not None:
        progress("output")
    fuse(model)
    return model


@torch.no_grad()
def calibrate_block(
    block: TransformerBlock, inputs: list[Tensor], args: ModelArgs, scheme: Scheme, layer: int
) -> list[Tensor]:
    """Quantize a block's Linears in place; returns the quantized block's outputs, the inputs of the next block.

    `inputs` has a tensor (T, D) per document, from position 0, in the type of the block's norms. Original tensors
    are not modified, so they may be memory-mapped. Raises QuantizationError as `calibrate` does.
    """
    _check_inputs(inputs, scheme)
    a, f = block.attention, block.feed_forward

    def replace(parent: nn.Module, names: tuple[str, ...], xs: Iterable[Tensor]) -> None:
        kinds = {name: scheme.kind(f"layers.{layer}.{name}", args.n_layers) for name in names}
        _replace_rounded(parent, kinds, xs)

    def attended(x: Tensor) -> Tensor:
        memory = Stateless(args.sliding_window)
        return a(block.attention_norm(x), rope_phases(memory.extend(x[:, 0]), args, x.dtype), memory)

    replace(a, ("wq", "wk", "wv"), (block.attention_norm(x) for x in inputs))
    with _passed(a, "wo"):
        hidden = [attended(x) for x in inputs]
    replace(a, ("wo",), hidden)
    inputs = [x + a.wo(h) for x, h in zip(inputs, hidden, strict=True)]
    replace(f, ("w1", "w3"), (block.ffn_norm(x) for x in inputs))
    with _passed(f, "w2"):
        hidden = [f(block.ffn_norm(x)) for x in inputs]
    replace(f, ("w2",), hidden)
    return [x + f.w2(h) for x, h in zip(inputs, hidden, strict=True)]


@contextlib.contextmanager
def _passed(parent: nn.Module, name: str) -> Iterator[None]:
    """Let a Linear return its input."""
    linear = parent.get_submodule(name)
    setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        setattr(parent, name, linear)


def _check_inputs(inputs: list[Tensor], scheme: Scheme) -> None:
    if not scheme.whole:
        raise QuantizationError(
            f"calibration supports int8 and int4, not {scheme}",
            field="scheme",
            hint="quantize without calibration",
        )
    if not inputs:
        raise QuantizationError(
            "no text to calibrate on",
            field="documents",
            hint="pass documents of token ids, or quantize without calibration",
        )


def _replace_rounded(parent: nn.Module, kinds: dict[str, str], inputs: Iterable[Tensor]) -> None:
    """Replace Linears that share these inputs, (T, K) per document, by quantized ones of these formats."""
    linears = _linears(parent, *kinds)
    block = FORMATS[next(iter(kinds.values()))].block  # the same for all
    feedback = Feedback(next(iter(linears.values())).in_features, block)
    for x in inputs:
        feedback.add(x)
    feedback.factor()
    for name, linear in linears.items():
        blocks = feedback.round_blocks(linear.weight, kinds[name])
        setattr(parent, name, BlockLinear.of_blocks(kinds[name], blocks, linear.in_features))


def _linears(parent: nn.Module, *names: str) -> dict[str, nn.Linear]:
    linears = {name: parent.get_submodule(name) for name in names}
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise QuantizationError(
                f"{name} is not a plain Linear but {linear}",
                field=name,
                hint="calibrate an unquantized model without adapters",
            )
    return linears  # type: ignore[return-value]
