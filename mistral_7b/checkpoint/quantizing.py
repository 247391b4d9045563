"""Write a quantized folder (quantized.py) and measure its distance from the original.

A checkpoint is processed one layer at a time. The original and the quantized block run on the same text, each
on the output of its own predecessor, so that the distance is that of the whole models while only one layer of
each is in memory. The calibration text, if any, passes through in the same loop. After each layer the state is
saved, so that an interrupted run continues (unfinished.py). The original is computed in float32, in which all
CPUs are fast.

R rows · T tokens · D width · V vocabulary
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
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
from .unfinished import Unfinished, resumable_folder
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
    resumed: Callable[[int, int], None] | None = None,
) -> Record:
    """Quantize the checkpoint `source` (folder, file or hub id) into the folder `out`.

    tokens              (R, T) ids on which the distance is measured; rows are independent
    text                name of that text, for the record
    progress            called as progress(done, total, name) after each tensor, in bytes
    calibration_tokens  rows of ids, BOS first, for calibration; bit-identical to `quantization.calibrate`;
                        None rounds to nearest
    calibration_text    name of that text, for the record
    resumed             called with the number of complete layers and of all, if an interrupted run of the same
                        arguments is continued; the result is bit-identical to that of an uninterrupted one

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
    calibration = None
    if calibration_rows is not None:
        count = sum(map(len, calibration_rows))
        calibration = {"method": "feedback", "tokens": count, "text": calibration_text}
    rows = [tokens, *(calibration_rows or ())]
    job = {"scheme": scheme.name, "text": text, "calibration": calibration, **_fingerprint(checkpoint, rows)}
    with resumable_folder(pathlib.Path(out), size, job) as unfinished:
        if unfinished.done and resumed is not None:
            resumed(unfinished.done, checkpoint.args.n_layers)
        written = [name for name in tensors if unfinished.done and _layer(name) < unfinished.done]
        file = _open_tensor_file(unfinished.folder / WEIGHTS, tensors, progress, written)
        with file as write_tensor, torch.inference_mode():
            stream = _Stream(checkpoint, scheme, dtype, tokens, write_tensor, unfinished, calibration_rows)
            comparison = stream.run()
        record = Record(scheme, comparison.result(text), size, calibration)
        _write_other_files(unfinished.folder, checkpoint.args, dtype, record, checkpoint.folder)
    return record


def _layer(name: str) -> float:
    """The layer of a tensor of the quantized model; those before and after all layers -1 and infinity."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else -1 if parts[0] == "tok_embeddings" else math.inf


def _fingerprint(checkpoint: Checkpoint, rows: list[Tensor]) -> dict[str, Any]:
    """What else the result depends on: the source's files by size and time, the texts, this package's version."""
    files = {stored.path for stored in checkpoint.tensors.values()}
    stats = {str(path.absolute()): path.stat() for path in sorted(files)}
    digest = hashlib.sha256(repr([ids.tolist() for ids in rows]).encode()).hexdigest()
    return {
        "source": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
        "tokens": digest,
        "version": __version__,
    }


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
    unfinished: Unfinished
    calibration_rows: list[Tensor] | None = None  # calibration rows (T,)

    def run(self) -> Comparison:
        args = self.checkpoint.args
        memory = Stateless(args.sliding_window)
        rope = rope_phases(memory.extend(self.tokens), args, self.dtype)
        x, y = self._resume() if self.unfinished.done else self._embed()
        for layer in range(self.unfinished.done, args.n_layers):
            x, y = self._block(layer, x, y, rope, memory)
            rows = {f"calibration.{i}": row for i, row in enumerate(self.calibration or ())}
            self.unfinished.save(layer + 1, {"x": x, "y": y, **rows})
        return self._head(x, y)

    def _embed(self) -> tuple[Tensor, Tensor]:
        """Quantize the embedding; return the original's and the quantized model's first inputs, (R, T, D)."""
        weight = self.checkpoint.read(EMBEDDING, self.dtype)
        embedding = Int8Embedding.from_weight(weight)
        self._write_module("tok_embeddings", embedding)
        # Inputs of the next block for each calibration row: (T, D)
        self.calibration = (
            None if self.calibration_rows is None else [embedding(ids) for ids in self.calibration_rows]
        )
        x, y = weight[self.tokens].float(), embedding(self.tokens)
        self.checkpoint.tensors[EMBEDDING].release()
        return x, y

    def _resume(self) -> tuple[Tensor, Tensor]:
        """The inputs of the first layer that an interrupted run has not completed, as `_embed` returns them."""
        state = self.unfinished.load()
        rows = None if self.calibration_rows is None else range(len(self.calibration_rows))
        self.calibration = None if rows is None else [state[f"calibration.{i}"] for i in rows]
        return state["x"], state["y"]

    def _block(self, layer: int, x: Tensor, y: Tensor, rope: Rope, memory: Stateless) -> tuple[Tensor, Tensor]:
        """Quantize a layer; return its original output for x and its quantized output for y."""
        name = f"layers.{layer}"
        block = TransformerBlock(self.checkpoint.args, dtype=torch.float32, device="meta")
        keys = list(block.state_dict())
        block.load_state_dict({k: self.checkpoint.read(f"{name}.{k}", torch.float32) for k in keys}, assign=True)
        x = block(x, rope, memory)
        block.attention_norm.to(self.dtype)
        block.ffn_norm.to(self.dtype)
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
        weights = [self.checkpoint.read(name, torch.float32) for name in ("norm.weight", held)]
        norm, linear = self._output_modules(*weights)
        rounded, fused_norm = self._round_linear(linear, "output"), fused(copy.deepcopy(norm).to(self.dtype))
        self._write_module("norm", fused_norm)
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
            RMSNorm(args.dim, args.norm_eps, dtype=torch.float32, device="meta"),
            nn.Linear(args.dim, args.vocab_size, bias=False, dtype=torch.float32, device="meta"),
        )
        for module, weight in zip(modules, (norm, output), strict=True):
            module.load_state_dict({"weight": weight}, assign=True)
        return modules

    def _write_module(self, prefix: str, module: nn.Module) -> None:
        for name, value in module.state_dict().items():
            self.write_tensor(f"{prefix}.{name}", value)


@contextlib.contextmanager
def _open_tensor_file(
    path: pathlib.Path, tensors: Mapping[str, Tensor], progress: Progress | None, written: Iterable[str] = ()
) -> Iterator[WriteTensor]:
    """Yield a function that writes tensors, in any order, at their offsets in a safetensors file.

    `written` names those that the file already holds, if an interrupted run is continued.

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
    remaining = dict(tensors)
    done = sum(remaining.pop(name).nbytes for name in written)
    with path.open("rb+" if done else "wb") as f:
        f.write(header)

        def write_tensor(name: str, value: Tensor) -> None:
            nonlocal done
            like = remaining.pop(name)
            assert (value.shape, value.dtype) == (like.shape, like.dtype), name
            f.seek(offsets[name])
            f.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            f.flush()
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
