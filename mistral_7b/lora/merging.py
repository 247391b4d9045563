"""Merge an adapter into a checkpoint: W' = W + scale * B A, written one tensor at a time.

Two passes. The first runs a text through the base model with the adapter as it is applied at run time, and
through the merged model, and measures their distance layer by layer: one layer of each is in memory. It also
finds a merge that would change nothing. The second writes the merged weights with the converters of every format.

    merged      W + scale * B A in float32, times m / |row| with DoRA, rounded once to the type of W
    distance    KL(adapter at run time || merged), in nats per token, and top-1 agreement

R rows · T tokens · D width · V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Stateless
from ..checkpoint import hub, writing
from ..checkpoint.gguf.reading import StoredBlocks
from ..checkpoint.names import EMBEDDING, OUTPUT
from ..checkpoint.reading import Checkpoint, open_checkpoint
from ..checkpoint.tokenizer_files import TokenizerFiles
from ..checkpoint.writing import Outgoing, Progress, write_json
from ..errors import AdapterError, CheckpointError
from ..kernels.low_rank import Mixture
from ..model import ModelArgs, RMSNorm, Rope, TransformerBlock, rope_phases
from ..quantization.distance import Comparison
from ..surgery import replace_linears
from .applied import AdaptedEmbedding, linear, updated
from .files import Adapter, read_adapter

RECORD = "merge.json"  # beside the merged weights: what was merged, and its distance
ROWS = 256  # logits per chunk


@dataclasses.dataclass(frozen=True)
class Merge:
    """What was merged, and how far the merged model is from the adapter at run time."""

    base: str  # without the folders that it lies in, as is the adapter's
    adapter: str
    dtype: str  # of most merged weights
    weights: int  # that the adapter has a part in
    changed: int  # of these, after rounding
    dequantized: int  # tensors of the base that were quantized and are stored unquantized
    distance: dict[str, Any]  # as Comparison.result


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Adapter,
    out: str | os.PathLike[str],
    tokens: Tensor,
    text: str = "",
    to: str = "huggingface",
    *,
    type: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Merge:
    """Merge an adapter into the checkpoint `base` (folder, file or hub id), and write it to `out`.

    tokens    (R, T) ids on which the distance is measured; rows are independent
    text      name of that text, for the record
    to, type  format "huggingface", "mistral" or "gguf", and GGUF's type of the matrices

    Tokenizer files are the adapter's if it has any, else the base's. The distance is returned, and stored in
    merge.json in a folder. Raises AdapterError if the merge would change nothing or has no form in a checkpoint (a
    bias), CheckpointError for what cannot be opened, such as a folder of `quantize`, or written.
    """
    checkpoint = open_checkpoint(hub.resolve(base))
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, checkpoint.args)
    merging = _Merging(checkpoint, adapter)
    merging.check(tokens)
    outgoing = merging.outgoing()
    writing.check_format(to, type)
    writing.check_target(pathlib.Path(out), 0, file=to == "gguf")  # before minutes of work
    if to == "gguf" and type is None and merging.dequantized:
        raise CheckpointError(
            "the base is quantized, and the merged weights are not",
            field="type",
            place=checkpoint.folder,
            hint="choose a type, such as 'q8_0' or 'bf16'",
        )
    with torch.inference_mode():
        distance = merging.measure(tokens).result(text)
        merging.check_changed()
    largest = max((t for t in outgoing if t.name in merging.touched), key=lambda t: t.nbytes)
    dtype = str(largest.dtype).removeprefix("torch.")
    record = Merge(
        _shared_name(base), "/".join(pathlib.Path(adapter.source).parts[-2:]), dtype, len(merging.touched),
        len(merging.changed), merging.dequantized, distance,
    )  # fmt: skip
    words = adapter.tokenizer

    def beside(folder: pathlib.Path) -> None:
        if words is not None:
            for file in folder.iterdir():
                if hub.TOKENIZER_FILES.fullmatch(file.name):
                    file.unlink()
            TokenizerFiles.of(words).copy_to(folder)
        write_json(folder / RECORD, dataclasses.asdict(record))

    source = words if words is not None and to == "gguf" else checkpoint.folder
    with torch.inference_mode():
        writing.write(
            pathlib.Path(out), merging.args, to, outgoing, max_shard_size, source, progress, type, beside
        )  # fmt: skip
    return record


def _shared_name(source: str | os.PathLike[str]) -> str:
    """A model's name for a record that is shared: a hub id, or the last part of a path."""
    path = pathlib.Path(source)
    return path.absolute().name if path.exists() else os.fspath(source)


class _Merging:
    """A checkpoint and an adapter: the merged weights, and both models layer by layer."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.args: ModelArgs = adapter.args(checkpoint.args)
        self.plain = {t.name: t for t in writing.outgoing_of(checkpoint)}  # the base's own
        self.touched = {*adapter.weights, *(f"{target}.weight" for target in adapter.targets)}
        self.changed: set[str] = set()
        self.dequantized = sum(isinstance(t.stored, StoredBlocks) for t in self.plain.values())
        bfloat16 = self.plain[EMBEDDING].dtype == torch.bfloat16
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32  # of the models that are compared
        self.like, self.mixture = torch.empty(0, dtype=self.dtype), Mixture()

    def check(self, tokens: Tensor) -> None:
        """Raise AdapterError for what no merge can do, before anything is computed."""
        if biased := [name for name, bias in self.adapter.biases.items() if bias.any()]:
            raise AdapterError(
                f"the adapter has a bias for {biased[0]!r}, and the Linears of Mistral 7B have none",
                field=biased[0],
                place=self.adapter.source or None,
                hint="use it with --adapter",
            )
        factors = self.adapter.targets.values()
        if not self.adapter.weights and not self.adapter.magnitudes and not any(f.b.any() for f in factors):
            raise AdapterError(
                "every B of the adapter is zero: it was not trained, and the merge would change nothing",
                field="adapter",
                place=self.adapter.source or None,
                hint="check that this is the adapter that training saved",
            )
        most = int(tokens.max()) if tokens.numel() else 0
        if tokens.shape[-1] < 2 or most >= self.args.vocab_size:
            raise AdapterError(
                f"the text for the distance has {tokens.shape[-1]} tokens a row and ids up to {most}; it takes "
                f"two, below the vocabulary of {self.args.vocab_size}",
                field="tokens",
                hint="use the tokenizer of this model",
            )

    def outgoing(self) -> list[Outgoing]:
        """All tensors of the merged model, each computed when it is written."""
        return [
            dataclasses.replace(t, shape=self._shape(t), fetch=functools.partial(self.merged, name), stored=None)
            if name in self.touched or self._shape(t) != t.shape
            else t
            for name, t in self.plain.items()
        ]

    def _shape(self, t: Outgoing) -> tuple[int, ...]:
        rows = self.args.vocab_size if t.name in (EMBEDDING, OUTPUT) else t.shape[0]
        return (rows, *t.shape[1:])

    def base(self, name: str) -> Tensor:
        """A weight before LoRA: the base's or the adapter's own, in the type of the base's."""
        own = self.adapter.weights.get(name)
        return self.plain[name].fetch() if own is None else own.to(self.plain[name].dtype)

    def merged(self, name: str, before: Tensor | None = None) -> Tensor:
        """A merged weight in the type of the base's, from `before` LoRA. AdapterError if it is not finite."""
        weight, target = self.base(name) if before is None else before, name.removesuffix(".weight")
        if (factors := self.adapter.targets.get(target)) is None:
            return weight
        wide = updated(weight, factors)
        if (magnitude := self.adapter.magnitudes.get(target)) is not None:
            wide = wide * (magnitude.to(wide) / wide.norm(dim=1))[:, None]
        out = wide.to(weight.dtype)
        if not out.isfinite().all():
            raise AdapterError(
                f"the merged {name!r} is not finite in {weight.dtype}", field=name, place=self.adapter.source
            )
        return out

    def _both(self, name: str) -> tuple[Tensor, Tensor]:
        """A weight before LoRA and merged, in the type of the comparison; notes whether the merge changes it."""
        before = self.base(name)
        after = self.merged(name, before)
        if name in self.touched:
            plain = self.plain[name].fetch() if name in self.adapter.weights else before
            if plain.shape != after.shape or not torch.equal(plain, after):
                self.changed.add(name)
        return before.to(self.dtype), after.to(self.dtype)

    def check_changed(self) -> None:
        """Raise AdapterError if the measurement found no weight that the merge changes."""
        if not self.changed:
            raise AdapterError(
                f"the merge would change nothing: rounding to {self.plain[EMBEDDING].dtype} loses every update",
                field="adapter",
                place=self.adapter.source or None,
                hint="use it with --adapter, or merge into a float32 copy of the base",
            )

    def measure(self, tokens: Tensor) -> Comparison:
        """Compare the base model with the adapter at run time with the merged model, layer by layer."""
        args, memory = self.args, Stateless(self.args.sliding_window)
        rope = rope_phases(memory.extend(tokens), args, self.dtype)
        before, after = self._both(EMBEDDING)
        embedding: nn.Module = nn.Embedding.from_pretrained(before)
        if (factors := self.adapter.targets.get("tok_embeddings")) is not None:
            embedding = AdaptedEmbedding(embedding, factors, self.like)
        x, y = embedding(tokens), F.embedding(tokens, after)  # (R, T, D)
        del before, after, embedding
        self.plain[EMBEDDING].release()
        for layer in range(args.n_layers):
            x, y = self._layer(f"layers.{layer}", x, y, rope, memory)
        return self._compare(x, y, tokens)

    def _layer(self, path: str, x: Tensor, y: Tensor, rope: Rope, memory: Stateless) -> tuple[Tensor, Tensor]:
        """Return the outputs of a layer: with the adapter at run time for x, merged for y."""
        blocks = [TransformerBlock(self.args, dtype=self.dtype, device="meta") for _ in range(2)]
        pairs = {key: self._both(f"{path}.{key}") for key in blocks[0].state_dict()}
        for i, block in enumerate(blocks):
            block.load_state_dict({key: pair[i] for key, pair in pairs.items()}, assign=True)
        replace_linears(blocks[0], lambda base, name: self._adapted(base, f"{path}.{name}"))
        x, y = blocks[0](x, rope, memory), blocks[1](y, rope, memory)
        for key in pairs:
            self.plain[f"{path}.{key}"].release()
        return x, y

    def _adapted(self, base: nn.Module, name: str) -> nn.Module:
        """A Linear with the adapter as it is applied at run time."""
        return linear(base, name, self.adapter, self.like, self.mixture) if name in self.adapter.targets else base

    def _compare(self, x: Tensor, y: Tensor, tokens: Tensor) -> Comparison:
        """Compare the logits of both models from their last hidden states (R, T, D)."""
        args = self.args
        heads = []
        for norm, output in zip(self._both("norm.weight"), self._both(OUTPUT), strict=True):
            scaled = RMSNorm(args.dim, args.norm_eps, device="meta")
            scaled.load_state_dict({"weight": norm}, assign=True)
            projection = nn.Linear(args.dim, args.vocab_size, bias=False, device="meta")
            projection.load_state_dict({"weight": output}, assign=True)
            heads.append((scaled, projection))
        (norm_x, output_x), (norm_y, output_y) = heads
        adapted_x = self._adapted(output_x, "output")
        comparison, last = Comparison(), tokens.shape[1] - 1  # the last token of a row has no target
        places = (t[:, :last].flatten(0, 1).split(ROWS) for t in (x, y, tokens[:, 1:, None]))
        for a, b, targets in zip(*places, strict=True):
            comparison.add(adapted_x(norm_x(a)), output_y(norm_y(b)), targets[:, 0])
        self.plain[OUTPUT].release()
        return comparison
