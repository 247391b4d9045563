"""Write a quantized folder (quantized.py) and measure its distance from the original.

A checkpoint is processed one layer at a time. The original and the quantized block run on the same text, each
on the output of its own predecessor, so that the distance is that of the whole models while only one layer of
each is in memory. The calibration text, if any, passes through in the same loop.

R rows · T tokens · D width · V vocabulary
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Stateless
from ..errors import CheckpointError, QuantizationError
from ..model import Mistral7B, ModelArgs, RMSNorm, Rope, TransformerBlock, rope_phases
from ..quantization.calibration import calibrate_block
from ..quantization.distance import Comparison
from ..quantization.fused import fused
from ..quantization.gpu import GpuBlockLinear
from ..quantization.linear import Int8Embedding
from ..quantization.schemes import KINDS, Scheme, empty_model, scheme_of
from ..surgery import replace_linears
from . import hub, huggingface
from .names import EMBEDDING, OUTPUT
from .quantized import WEIGHTS, Record
from .reading import Checkpoint, open_checkpoint
from .tokenizer_files import TokenizerFiles
from .writing import ALIGNMENT, Progress, header_of, new_folder, write_json

WriteTensor = Callable[[str, Tensor], None]
ROWS = 256  # logits per chunk


def save_quantized(
    model: Mistral7B,
    path: str | os.PathLike[str],
    distance: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a quantized model, of a CPU or a GPU, to a new folder.

    Raises QuantizationError for other models, or without a measured distance.
    """
    scheme = scheme_of(model)
    if scheme is None:
        raise QuantizationError(
            f"not all modules of the model are quantized by one of {', '.join(KINDS)}",
            field="format",
            hint="quantize it, or save it unquantized",
        )
    if meta := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise CheckpointError(f"{meta[0]!r} is on the meta device and has no data to save", field=meta[0])
    dtype = model.norm.weight.dtype
    tensors = empty_model(model.args, scheme, dtype).state_dict()
    record = Record(scheme, distance or {}, sum(t.nbytes for t in tensors.values()), calibration)
    with new_folder(pathlib.Path(path), record.nbytes) as folder:
        with _open_tensor_file(folder / WEIGHTS, tensors, progress) as write_tensor:
            for name, keys in itertools.groupby(tensors, lambda key: key.rpartition(".")[0]):
                module = model.get_submodule(name)
                stored = module.tiled() if isinstance(module, GpuBlockLinear) else module
                for key in keys:
                    write_tensor(key, getattr(stored, key.rpartition(".")[2]))
        _write_other_files(folder, model.args, dtype, record, model.source)


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scheme: str | Scheme,
    tokens: Tensor,
    text: str,
    progress: Progress | None = None,
    *,
    calibration_tokens: Iterable[Sequence[int] | Tensor] | None = None,
    calibration_text: str = "",
) -> Record:
    """Quantize the checkpoint `source` (folder, file or hub id) into the folder `out`.

    tokens              (R, T) ids on which the distance is measured; rows are independent
    text                name of that text, for the record
    progress            called as progress(done, total, name) after each tensor, in bytes
    calibration_tokens  rows of ids, BOS first, for calibration; bit-identical to `quantization.calibrate`;
                        None rounds to nearest
    calibration_text    name of that text, for the record

    `out` must not exist or be an empty folder; it is created completely or not at all. Raises CheckpointError and
    QuantizationError as `load` does, and QuantizationError for empty calibration data or an id beyond the
    vocabulary.
    """
    scheme = Scheme.of(scheme)
    if not scheme.whole:
        raise QuantizationError(
            f"only {', '.join(KINDS)} can be saved; {scheme} is applied during loading: quantization='{scheme}'",
            field="scheme",
        )
    checkpoint = open_checkpoint(hub.resolve(source))
    calibration_rows = None if calibration_tokens is None else [torch.as_tensor(ids) for ids in calibration_tokens]
    _check_ids(checkpoint, tokens.flatten(), *(calibration_rows or ()))
    calibration_rows = None if calibration_rows is None else [ids for ids in calibration_rows if len(ids)]
    if calibration_rows == []:
        raise QuantizationError(
            "the calibration text is empty",
            field="calibration_tokens",
            hint="pass rows of token ids, or quantize without calibration",
        )
    held = checkpoint.tensors[EMBEDDING].dtype
    dtype = torch.bfloat16 if held.itemsize == 2 else torch.float32
    tensors = empty_model(checkpoint.args, scheme, dtype).state_dict()
    size = sum(t.nbytes for t in tensors.values())
    with new_folder(pathlib.Path(out), size) as folder:
        with _open_tensor_file(folder / WEIGHTS, tensors, progress) as write_tensor, torch.inference_mode():
            comparison = _Stream(checkpoint, scheme, dtype, tokens, write_tensor, calibration_rows).run()
        calibration = None
        if calibration_rows is not None:
            count = sum(map(len, calibration_rows))
            calibration = {"method": "feedback", "tokens": count, "text": calibration_text}
        record = Record(scheme, comparison.result(text), size, calibration)
        _write_other_files(folder, checkpoint.args, dtype, record, checkpoint.folder)
    return record


def _check_ids(checkpoint: Checkpoint, *rows: Tensor) -> None:
    """Raise QuantizationError for a token id beyond the vocabulary."""
    most = max((int(ids.max()) for ids in rows if len(ids)), default=0)
    if most >= checkpoint.args.vocab_size:
        raise QuantizationError(
            f"token {most} exceeds the vocabulary of {checkpoint.args.vocab_size} tokens: the tokenizer belongs "
            "to another model",
            field="tokens",
            place=checkpoint.folder,
        )


@dataclasses.dataclass
class _Stream:
    """Quantize a checkpoint layer by layer into `write_tensor`, running texts through both models."""

    checkpoint: Checkpoint
    scheme: Scheme
    dtype: torch.dtype
    tokens: Tensor  # (R, T)
    write_tensor: WriteTensor
    calibration_rows: list[Tensor] | None = None  # calibration rows (T,)

    def run(self) -> Comparison:
        args = self.checkpoint.args
        memory = Stateless(args.sliding_window)
        rope = rope_phases(memory.extend(self.tokens), args, self.dtype)
        weight = self.checkpoint.read(EMBEDDING, self.dtype)
        embedding = Int8Embedding.from_weight(weight)
        self._write_module("tok_embeddings", embedding)
        x, y = weight[self.tokens], embedding(self.tokens)  # (R, T, D), original and quantized
        # Inputs of the next block for each calibration row: (T, D)
        self.calibration = (
            None if self.calibration_rows is None else [embedding(ids) for ids in self.calibration_rows]
        )
        self.checkpoint.tensors[EMBEDDING].release()
        for layer in range(args.n_layers):
            x, y = self._block(layer, x, y, rope, memory)
        return self._head(x, y)

    def _block(self, layer: int, x: Tensor, y: Tensor, rope: Rope, memory: Stateless) -> tuple[Tensor, Tensor]:
        """Quantize a layer; return its original output for x and its quantized output for y."""
        name = f"layers.{layer}"
        block = TransformerBlock(self.checkpoint.args, dtype=self.dtype, device="meta")
        keys = list(block.state_dict())
        block.load_state_dict({k: self.checkpoint.read(f"{name}.{k}", self.dtype) for k in keys}, assign=True)
        x = block(x, rope, memory)
        if self.calibration is None:
            replace_linears(block, lambda linear, inner: self._round_linear(linear, f"{name}.{inner}"))
        else:
            self.calibration = calibrate_block(block, self.calibration, self.checkpoint.args, self.scheme, layer)
        block = fused(block)
        self._write_module(name, block)
        for key in keys:
            self.checkpoint.tensors[f"{name}.{key}"].release()
        return x, block(y, rope, memory)

    def _round_linear(self, linear: nn.Module, name: str) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        return self.scheme.linear(linear.weight, name, self.checkpoint.args.n_layers)

    def _head(self, x: Tensor, y: Tensor) -> Comparison:
        """Quantize the output layer and compare the logits of both models."""
        held = OUTPUT if OUTPUT in self.checkpoint.tensors else EMBEDDING  # tied embeddings
        weights = [self.checkpoint.read(name, self.dtype) for name in ("norm.weight", held)]
        norm, linear = self._output_modules(*weights)
        rounded, fused_norm = self._round_linear(linear, "output"), fused(norm)
        self._write_module("norm", norm)
        self._write_module("output", rounded)
        comparison = Comparison()
        last = x.shape[1] - 1  # the last token of a row has no target
        places = (t[:, :last].flatten(0, 1).split(ROWS) for t in (x, y, self.tokens[:, 1:, None]))
        for a, b, targets in zip(*places, strict=True):
            comparison.add(linear(norm(a)), rounded(fused_norm(b)), targets[:, 0])
        self.checkpoint.tensors[held].release()
        return comparison

    def _output_modules(self, norm: Tensor, output: Tensor) -> tuple[RMSNorm, nn.Linear]:
        """Return the final norm and the output layer with these weights."""
        args = self.checkpoint.args
        modules = (
            RMSNorm(args.dim, args.norm_eps, dtype=self.dtype, device="meta"),
            nn.Linear(args.dim, args.vocab_size, bias=False, dtype=self.dtype, device="meta"),
        )
        for module, weight in zip(modules, (norm, output), strict=True):
            module.load_state_dict({"weight": weight}, assign=True)
        return modules

    def _write_module(self, prefix: str, module: nn.Module) -> None:
        for name, value in module.state_dict().items():
            self.write_tensor(f"{prefix}.{name}", value)


@contextlib.contextmanager
def _open_tensor_file(
    path: pathlib.Path, tensors: Mapping[str, Tensor], progress: Progress | None
) -> Iterator[WriteTensor]:
    """Yield a function that writes tensors, in any order, at their offsets in a safetensors file.

    `tensors` gives types and shapes and may be on the meta device. Tensors whose size is a multiple of 64 bytes
    come first, so that all of them (in models of usual sizes: all tensors) are aligned to 64 bytes.
    """
    order = sorted(tensors, key=lambda n: (tensors[n].nbytes % ALIGNMENT != 0, -tensors[n].dtype.itemsize))
    header = header_of((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order)
    offsets, total = {}, len(header)
    for name in order:
        offsets[name] = total
        total += tensors[name].nbytes
    total -= len(header)
    remaining, done = dict(tensors), 0
    with path.open("wb") as f:
        f.write(header)

        def write_tensor(name: str, value: Tensor) -> None:
            nonlocal done
            like = remaining.pop(name)
            assert (value.shape, value.dtype) == (like.shape, like.dtype), name
            f.seek(offsets[name])
            f.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            done += value.nbytes
            if progress is not None:
                progress(done, total, name)

        yield write_tensor
    assert not remaining, f"{next(iter(remaining))} was not written"


def _write_other_files(
    folder: pathlib.Path, args: ModelArgs, dtype: torch.dtype, record: Record, source: pathlib.Path | None
) -> None:
    """Write all files except the weights; the configuration last, as no folder opens without it."""
    tokenizer = TokenizerFiles.of(source)
    tokenizer.write(folder, "quantized")
    config = huggingface.config(args, str(dtype).removeprefix("torch."), tokenizer.ids)
    write_json(folder / "config.json", {**config, "quantization_config": record.config()})
