"""Merge an adapter into a checkpoint: W' = W + scale * B A, written one tensor at a time.

Two passes. The first runs a text through the base model with the adapter as it is applied at run time, and
through the merged model, and measures their distance layer by layer: one layer of each is in memory. It also
finds a merge that would change nothing. The second writes the merged weights with the converters of every format.

    merged      W + scale * B A in float32, times m / |row| with DoRA, rounded once to the type of W
    distance    KL(adapter at run time || merged), in nats per token, and top-1 agreement

W is the base's weight, or what it is after quantization (bases.py). In the latter case a third model is compared:
the adapter over the unquantized base.

R rows · T tokens · D width · V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Stateless
from ..checkpoint import hub, writing
from ..checkpoint.names import EMBEDDING, OUTPUT
from ..checkpoint.tokenizer_files import TokenizerFiles
from ..checkpoint.writing import Outgoing, Progress, write_json
from ..errors import AdapterError, CheckpointError
from ..kernels.low_rank import Mixture
from ..model import ModelArgs, RMSNorm, Rope, TransformerBlock, rope_phases
from ..quantization.distance import Comparison
from ..surgery import replace_linears
from .applied import AdaptedEmbedding, linear, updated
from .bases import Base, open_base
from .files import Adapter, read_adapter

RECORD = "merge.json"  # beside the merged weights: what was merged, and its distance
ROWS = 256  # logits per chunk
MERGED = 1  # the place of the merged model among those that are compared


@dataclasses.dataclass(frozen=True)
class Merge:
    """What was merged, and how far the merged model is from the adapter at run time."""

    base: str  # without the folders that it lies in, as is the adapter's
    into: str | None  # the scheme of the base's weights; None: unquantized
    adapter: str
    dtype: str  # of most merged weights
    weights: int  # that the adapter has a part in
    changed: int  # of these, after rounding
    dequantized: int  # tensors of the base that were quantized and are stored unquantized
    distance: dict[str, Any]  # as Comparison.result, of the adapter over this base
    unquantized_distance: dict[str, Any] | None = None  # of the adapter over the base before quantization


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Adapter,
    out: str | os.PathLike[str],
    tokens: Tensor,
    text: str = "",
    to: str = "huggingface",
    *,
    into: str | None = None,
    type: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Merge:
    """Merge an adapter into the checkpoint `base` (folder, file or hub id), and write it to `out`.

    tokens    (R, T) ids on which the distance is measured; rows are independent
    text      name of that text, for the record
    into      scheme by which the base is quantized before the adapter is added; None: as it is
    to, type  format "huggingface", "mistral" or "gguf", and GGUF's type of the matrices

    Tokenizer files are the adapter's if it has any, else the base's. The distance is returned, and stored in
    merge.json in a folder. Raises AdapterError if the merge would change nothing or has no form in a checkpoint (a
    bias), CheckpointError for what cannot be opened or written.
    """
    opened = open_base(base, into)
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, opened.args)
    merging = _Merging(opened, adapter)
    merging.check(tokens)
    outgoing = merging.outgoing()
    writing.check_format(to, type)
    writing.check_target(pathlib.Path(out), 0, file=to == "gguf")  # before minutes of work
    if to == "gguf" and type is None and opened.dequantized:
        raise CheckpointError(
            "the base is quantized, and the merged weights are not",
            field="type",
            place=opened.folder,
            hint="choose a type, such as 'q8_0' or 'bf16'",
        )
    with torch.inference_mode():
        distance, *others = (comparison.result(text) for comparison in merging.measure(tokens))
        merging.check_changed()
    largest = max((t for t in outgoing if t.name in merging.touched), key=lambda t: t.nbytes)
    dtype = str(largest.dtype).removeprefix("torch.")
    record = Merge(
        _shared_name(base), opened.scheme.name if opened.scheme else None,
        "/".join(pathlib.Path(adapter.source).parts[-2:]), dtype, len(merging.touched), len(merging.changed),
        opened.dequantized, distance, *others,
    )  # fmt: skip
    words = adapter.tokenizer

    def beside(folder: pathlib.Path) -> None:
        if words is not None:
            for file in folder.iterdir():
                if hub.TOKENIZER_FILES.fullmatch(file.name):
                    file.unlink()
            TokenizerFiles.of(words).copy_to(folder)
        write_json(folder / RECORD, dataclasses.asdict(record))

    source = words if words is not None and to == "gguf" else opened.folder
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
    """A base and an adapter: the merged weights, and the models that are compared, layer by layer."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self.adapter, self.scheme, self.original = adapter, base.scheme, base.original
        self.args: ModelArgs = adapter.args(base.args)
        self.plain = base.weights  # the base's own
        self.touched = {*adapter.weights, *(f"{target}.weight" for target in adapter.targets)}
        self.changed: set[str] = set()
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
            if name in self.touched or self._shape(t) != t.shape or self.scheme is not None
            else t
            for name, t in self.plain.items()
        ]

    def _shape(self, t: Outgoing) -> tuple[int, ...]:
        rows = self.args.vocab_size if t.name in (EMBEDDING, OUTPUT) else t.shape[0]
        return (rows, *t.shape[1:])

    def base(self, name: str) -> Tensor:
        """A weight before LoRA: the base's or the adapter's own, in the type of the base's or wider."""
        own = self.adapter.weights.get(name)
        return self.plain[name].fetch() if own is None else own.to(self.plain[name].dtype)

    def merged(self, name: str, before: Tensor | None = None) -> Tensor:
        """A merged weight in the type of the base's, from `before` LoRA. AdapterError if it is not finite."""
        weight, target = self.base(name) if before is None else before, name.removesuffix(".weight")
        dtype = self.plain[name].dtype
        if (factors := self.adapter.targets.get(target)) is None:
            return weight.to(dtype)
        wide = updated(weight, factors)
        if (magnitude := self.adapter.magnitudes.get(target)) is not None:
            wide = wide * (magnitude.to(wide) / wide.norm(dim=1))[:, None]
        out = wide.to(dtype)
        if not out.isfinite().all():
            raise AdapterError(
                f"the merged {name!r} is not finite in {dtype}", field=name, place=self.adapter.source
            )
        return out

    def _variants(self, name: str) -> list[Tensor]:
        """A weight of all models that are compared, in their type; notes whether the merge changes it.

        Before LoRA, merged, and, if the base was quantized just now, before LoRA and quantization.
        """
        before = self.base(name)
        after = self.merged(name, before)
        if name in self.touched:
            plain = self.plain[name].fetch() if name in self.adapter.weights else before
            if plain.shape != after.shape or not torch.equal(plain.to(after.dtype), after):
                self.changed.add(name)
        variants = [before, after]
        if self.original is not None:
            variants.append(before if name in self.adapter.weights else self.original[name]())
        return [weight.to(self.dtype) for weight in variants]

    def check_changed(self) -> None:
        """Raise AdapterError if the measurement found no weight that the merge changes."""
        if not self.changed:
            raise AdapterError(
                f"the merge would change nothing: rounding to {self.plain[EMBEDDING].dtype} loses every update",
                field="adapter",
                place=self.adapter.source or None,
                hint="use it with --adapter, or merge into a float32 copy of the base",
            )

    def measure(self, tokens: Tensor) -> list[Comparison]:
        """Compare the base with the adapter at run time with the merged model, layer by layer.

        A second comparison is that with the unquantized base, if it was quantized just now.
        """
        args, memory = self.args, Stateless(self.args.sliding_window)
        rope = rope_phases(memory.extend(tokens), args, self.dtype)
        states = []
        for i, weight in enumerate(self._variants(EMBEDDING)):
            embedding: nn.Module = nn.Embedding.from_pretrained(weight)
            factors = self.adapter.targets.get("tok_embeddings")
            if i != MERGED and factors is not None:
                embedding = AdaptedEmbedding(embedding, factors, self.like)
            states.append(embedding(tokens))  # (R, T, D)
            del embedding, weight
        self.plain[EMBEDDING].release()
        for layer in range(args.n_layers):
            states = self._layer(f"layers.{layer}", states, rope, memory)
        return self._compare(states, tokens)

    def _layer(self, path: str, states: list[Tensor], rope: Rope, memory: Stateless) -> list[Tensor]:
        """Return the output of a layer of each model for its own input."""
        blocks = [TransformerBlock(self.args, dtype=self.dtype, device="meta") for _ in states]
        weights = {key: self._variants(f"{path}.{key}") for key in blocks[0].state_dict()}
        for i, block in enumerate(blocks):
            block.load_state_dict({key: variants[i] for key, variants in weights.items()}, assign=True)
            if i != MERGED:
                replace_linears(block, lambda base, name: self._adapted(base, f"{path}.{name}"))
        states = [block(x, rope, memory) for block, x in zip(blocks, states, strict=True)]
        for key in weights:
            self.plain[f"{path}.{key}"].release()
        return states

    def _adapted(self, base: nn.Module, name: str) -> nn.Module:
        """A Linear with the adapter as it is applied at run time."""
        return linear(base, name, self.adapter, self.like, self.mixture) if name in self.adapter.targets else base

    def _compare(self, states: list[Tensor], tokens: Tensor) -> list[Comparison]:
        """Compare the logits of the models with those of the merged one, from last hidden states (R, T, D)."""
        args = self.args
        heads = []
        for i, (norm, output) in enumerate(
            zip(self._variants("norm.weight"), self._variants(OUTPUT), strict=True)
        ):
            scaled = RMSNorm(args.dim, args.norm_eps, device="meta")
            scaled.load_state_dict({"weight": norm}, assign=True)
            projection = nn.Linear(args.dim, args.vocab_size, bias=False, device="meta")
            projection.load_state_dict({"weight": output}, assign=True)
            heads.append(nn.Sequential(scaled, projection if i == MERGED else self._adapted(projection, "output")))
        merged, adapted = heads.pop(MERGED), heads
        comparisons, last = [Comparison() for _ in adapted], tokens.shape[1] - 1  # the last of a row has no target
        rows = [t[:, :last].flatten(0, 1).split(ROWS) for t in states]
        targets = tokens[:, 1:].flatten().split(ROWS)
        for y, wanted, *inputs in zip(rows.pop(MERGED), targets, *rows, strict=True):
            logits = merged(y)
            for comparison, head, x in zip(comparisons, adapted, inputs, strict=True):
                comparison.add(head(x), logits, wanted)
        self.plain[OUTPUT].release()
        return comparisons
