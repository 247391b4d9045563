"""Open a folder or file as a Checkpoint (validated, not loaded) and build the model.

Formats are detected by content: a configuration by its fields, weights by their tensor names. File names
only set the search order, which is that of transformers.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, QuantizationError
from ..kernels.backend import weight_layout
from ..model import Mistral7B, ModelArgs
from ..quantization.fused import fuse
from ..quantization.gpu import to_gpu
from ..quantization.linear import Int8Embedding, unpacked_tensors
from ..quantization.schemes import Scheme
from ..surgery import replace_linears
from . import config, hub, huggingface, mistral, others, packed, packing, quantized
from .gguf import reading as gguf
from .gguf.file import is_gguf
from .gguf.modules import keep_blocks
from .gguf.splits import first_part
from .names import DERIVED, EMBEDDING, OUTPUT, expected, interleaved, layout_of, rename, rotated_heads
from .stored import StoredTensor, dtype_of, read_file

CONFIGS = {"huggingface": "config.json", "mistral": "params.json"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights on disk, validated against their configuration; data is not loaded."""

    folder: pathlib.Path  # also holds the tokenizer; for GGUF, the file itself
    args: ModelArgs
    format: str  # the layout of the weights: "huggingface", "mistral" or "gguf"
    tensors: Mapping[str, StoredTensor]  # keyed by Mistral's names

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Load one tensor in Mistral's layout: a view of the mapped file if possible, else a copy.

        After a copy, the source pages are released.
        """
        stored = self.tensors[name]
        if isinstance(stored, gguf.StoredBlocks):
            return stored.values(dtype or stored.dtype).to(device)
        view = stored.view()
        heads = rotated_heads(name, self.args) if self.format == "huggingface" else None
        tensor = (view if heads is None else interleaved(view, heads)).to(device=device, dtype=dtype)
        if tensor is not view:
            stored.release()
        return tensor

    def nbytes(self) -> int:
        """Return the size of all weights, in bytes."""
        return sum(t.nbytes for t in self.tensors.values())


def load(
    source: str | os.PathLike[str] = "demo",
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str = "cpu",
    quantization: str | Scheme | None = None,
    mmap: bool = True,
) -> Mistral7B:
    """Load the model from a folder, a file or a hub id, with weights of `dtype` on `device`.

    `quantization` ("int8", "int4", "bf16", "fp8") quantizes the weights during loading; schemes.py describes
    the schemes and the devices they support. A folder written by `mistral-7b quantize` is loaded with its own
    scheme, on CPU or GPU; `dtype` is then the compute type.

    `mmap=False` copies quantized weights into huge pages (kernels/cpu/huge_pages.py). A CPU reads those faster,
    but loading takes seconds and the memory is not shared between processes.

    On a CPU, weights stored with the requested type and layout stay memory-mapped: they are loaded on first use
    and shared between processes. The file may be replaced while in use, but not modified in place. All other
    weights are copied one at a time, so that loading never holds the model twice. Raises CheckpointError for
    invalid files, HubError for a failed download, QuantizationError for an unsupported scheme; a partial model
    is never returned.
    """
    dtype, path = dtype_of(dtype), hub.resolve(source)
    if (record := quantized.read_record(path)) is not None:
        quantized.check_scheme(path, record, quantization)
        record.scheme.check_device(device)
        return _open_quantized(path, record, dtype, device, mmap)
    checkpoint = open_checkpoint(path)
    if quantization is not None:
        return _quantize(checkpoint, Scheme.of(quantization), dtype, device)
    model = Mistral7B(checkpoint.args, dtype=dtype, device="meta")
    kept = keep_blocks(model, checkpoint.tensors, dtype, device) if weight_layout(device) else set()
    weights = {name: checkpoint.read(name, dtype, device) for name in checkpoint.tensors if name not in kept}
    if checkpoint.args.tie_embeddings and OUTPUT not in kept:
        weights[OUTPUT] = weights[EMBEDDING]
    model.load_state_dict(weights, strict=not kept, assign=True)
    if kept:
        fuse(model)
    else:
        model.tie()
    model.source = checkpoint.folder
    return model


def _open_quantized(
    path: pathlib.Path, record: quantized.Record, dtype: torch.dtype, device: torch.device | str, mmap: bool
) -> Mistral7B:
    """Load a quantized folder, or the weight file of one."""
    folder = path if path.is_dir() else path.parent
    args, _ = _read_config(folder)
    raw = _find_weights(folder) if path.is_dir() else _read_weights(path)
    tiles = weight_layout(device) == "tiles"
    model = quantized.build(path, args, record.scheme, raw, dtype, mmap or not tiles)
    if not tiles:
        to_gpu(model, device)
    model.source = folder
    return model


def _quantize(checkpoint: Checkpoint, scheme: Scheme, dtype: torch.dtype, device: torch.device | str) -> Mistral7B:
    """Load a checkpoint, quantizing one weight at a time."""
    scheme.check_device(device)
    if scheme.name == "bf16" and dtype != torch.bfloat16:
        raise QuantizationError(f"quantization 'bf16' computes in bfloat16, not in {dtype}", field="dtype")
    model = Mistral7B(checkpoint.args, dtype=dtype, device="meta")

    def build(linear: nn.Module, name: str) -> nn.Module:
        held = f"{name}.weight" if f"{name}.weight" in checkpoint.tensors else EMBEDDING  # a tied output
        out = scheme.linear(checkpoint.read(held), name, checkpoint.args.n_layers, device)
        checkpoint.tensors[held].release()
        return out

    made = {f"{name}.weight" for name in replace_linears(model, build)}
    if scheme.whole:
        embedding = Int8Embedding.from_weight(checkpoint.read(EMBEDDING, dtype))
        model.set_submodule("tok_embeddings", embedding.to(device))
        checkpoint.tensors[EMBEDDING].release()
    # The norms, and the embedding unless it is quantized
    left = [name for name in unpacked_tensors(model) if name in checkpoint.tensors and name not in made]
    weights = {name: checkpoint.read(name, dtype, device) for name in left}
    model.load_state_dict(weights, strict=False, assign=True)
    fuse(model)
    model.source = checkpoint.folder
    return model


def read_args(path: str | os.PathLike[str]) -> tuple[ModelArgs, str]:
    """Return the configuration and format of a folder or file, without loading weights.

    The format is "huggingface", "mistral", "gguf", "quantized" (quantized.py) or a method of packing.py.
    """
    path = others.check(path)
    if file := _gguf_of(path):
        checkpoint = _open_gguf(file)
        return checkpoint.args, checkpoint.format
    folder = path if path.is_dir() else path.parent
    args, format = _read_config(folder)
    if quantized.read_record(path) is not None:
        return args, "quantized"
    scheme = packing.of_folder(folder)
    return args, format if scheme is None else scheme.method


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Find and validate the weights and configuration of a folder or file."""
    path = others.check(path)
    if file := _gguf_of(path):
        return _open_gguf(file)
    if (record := quantized.read_record(path)) is not None:
        raise CheckpointError(
            f"is quantized, as {record.scheme}",
            field="quantization_config",
            place=path,
            hint="use the original checkpoint, which is unquantized",
        )
    folder = path if path.is_dir() else path.parent
    raw = _find_weights(folder) if path.is_dir() else _read_weights(path)
    if (scheme := packing.of_folder(folder)) is not None:
        raw = packed.combine(raw, scheme)
    layout = layout_of(raw)
    if layout not in CONFIGS:
        name = next(iter(raw), None)
        raise CheckpointError(f"no tensor has a name of Mistral 7B (the first is {name!r})", place=path)
    args, _ = _read_config(folder, prefer=layout)
    return Checkpoint(folder, args, layout, _validated(path, raw, layout, args))


def _gguf_of(path: pathlib.Path) -> pathlib.Path | None:
    """Return `path` if it is a GGUF file, or a folder's GGUF file if it has no other weights.

    Of a split file, the first part is returned. Raises CheckpointError if a folder has several GGUF models.
    """
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        if groups := hub.weight_groups(names):
            path = path / groups[0].entry_file
        elif models := hub.gguf_models(names):
            raise CheckpointError(
                f"contains {len(models)} GGUF models", place=path, hint=f"name one: {', '.join(models[:20])}"
            )
    return first_part(path) if path.is_file() and is_gguf(path) else None


def _open_gguf(path: pathlib.Path) -> Checkpoint:
    args, raw = gguf.read(path)
    return Checkpoint(path, args, "gguf", _validated(path, raw, "gguf", args))


def _read_config(folder: pathlib.Path, prefer: str = "huggingface") -> tuple[ModelArgs, str]:
    """Return the configuration of a folder and its format; `prefer` decides between two."""
    found = [folder / name for name in CONFIGS.values() if (folder / name).is_file()]
    if not found:
        raise others.folder_error(folder)
    configs = {}
    for path in found:
        data = config.read_json(path)
        if mistral.recognize(data):
            configs["mistral"] = (path, data)
        elif huggingface.recognize(data):
            configs["huggingface"] = (path, data)
        else:
            raise CheckpointError("neither a config.json of Hugging Face nor a params.json of Mistral", place=path)
    format = prefer if prefer in configs else next(iter(configs))
    reader = mistral if format == "mistral" else huggingface
    return reader.read(*configs[format]), format


def _find_weights(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder: those of the first complete weight group."""
    groups = hub.weight_groups(entry.name for entry in folder.iterdir())
    if not groups:
        raise others.folder_error(folder)
    # If no group is complete, opening the first raises the error that names the missing file.
    group = next((g for g in groups if hub.is_complete(folder, g)), groups[0])
    return _read_weights(folder / group.entry_file)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Return the `weight_map` of an index: tensor name -> file name in the same folder."""
    table = config.read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointError("no 'weight_map' of tensors to files", place=path)
    for tensor, file in table.items():
        if file != os.path.basename(file) or file in ("", ".", "..") or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"maps tensor {tensor!r} to {file!r}, outside the folder", field=tensor, place=path
            )
    return table


def _read_weights(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file, or of all shards in an index."""
    if not path.name.endswith(".json"):
        return read_file(path)
    index = _read_index(path)
    out: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(index.values()):
        if not (path.parent / shard).is_file():
            first = next(tensor for tensor, file in index.items() if file == shard)
            raise CheckpointError(
                f"missing, though {path.name} maps tensor {first!r} to it",
                field=first,
                place=path.parent / shard,
                hint="fetch it from the model's repository, such as with `mistral-7b pull`",
            )
        for name, stored in read_file(path.parent / shard).items():
            if (place := index.get(name)) != shard:  # in two shards, or not in the index
                raise CheckpointError(
                    f"contains tensor {name!r}, which {path.name} maps to {place!r}", field=name, place=stored.path
                )
            out[name] = stored
    for name, shard in index.items():
        if name not in out:
            raise CheckpointError(
                f"lacks tensor {name!r}, which {path.name} maps to it", field=name, place=path.parent / shard
            )
    return out


def _validated(
    path: pathlib.Path, raw: dict[str, StoredTensor], layout: str, args: ModelArgs
) -> dict[str, StoredTensor]:
    """Return the tensors by Mistral's names in forward order, after checking names and shapes."""
    have = {}
    for name, stored in raw.items():
        if DERIVED.fullmatch(name):
            continue
        ours = rename(name, layout, "mistral")
        if ours is None:
            raise stored.fault("is unknown: this is not a Mistral 7B without additions")
        have[ours] = stored
    out = {}
    for ours, shape in expected(args):
        if ours not in have:
            if ours == OUTPUT and args.tie_embeddings:
                continue
            theirs = rename(ours, "mistral", layout)
            raise CheckpointError(f"tensor {theirs!r} is missing", field=theirs, place=path)
        stored = have.pop(ours)
        if not stored.dtype.is_floating_point:
            raise stored.fault(f"has type {stored.dtype}, not a floating-point type")
        if stored.shape != shape:
            raise stored.fault(f"has shape {stored.shape}; the configuration requires {shape}")
        out[ours] = stored
    if have:
        stored = next(iter(have.values()))
        raise stored.fault(f"exceeds the {args.n_layers} layers of the configuration")
    if args.tie_embeddings and OUTPUT in out:
        extra = out.pop(OUTPUT)
        if not torch.equal(extra.view(), out[EMBEDDING].view()):
            raise extra.fault("differs from the embedding, to which it should be tied")
        extra.release()
        out[EMBEDDING].release()
    return out
