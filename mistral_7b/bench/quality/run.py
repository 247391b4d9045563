"""Measure each format on the same rows of a text: this package's models here, llama.cpp in its own process.

R rows · T tokens · V vocabulary
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import machine
from ...checkpoint import convert, read_args
from ...checkpoint.gguf.file import read as read_gguf
from ...checkpoint.names import EMBEDDING, OUTPUT, rename
from ...checkpoint.reading import Checkpoint, open_checkpoint
from ...errors import BenchmarkError
from ...kernels import threads
from ...quantization.distance import Comparison
from ...quantization.schemes import NAMES, Scheme
from ...text.tokenizer import Tokenizer
from ..jobs import LLAMA, OURS
from ..peers.ours import environment
from ..run import SPARE, call, need
from . import ours
from .records import FLOAT32, PEER_TYPES, Circumstances, QualityRecord

ROW = 512  # tokens of a row, or the window or context if that is shorter
CHUNK = 128  # logits compared at a time, in float64


@dataclasses.dataclass(frozen=True)
class QualityPlan:
    """What to measure. `model` is the name in the records, `source` its folder or file.

    schemes  names of integer schemes, and paths of quantized folders or GGUF files of this model
    text     what is measured on; `text_name` is its name in the records
    """

    model: str
    source: str
    schemes: tuple[str | pathlib.Path, ...]
    text: str
    text_name: str
    rows: int
    threads: int | None = None
    peers: bool = False
    peer_python: str = sys.executable
    command: str = ""

    def __post_init__(self) -> None:
        threads.check(self.threads)


def integer_schemes() -> tuple[str, ...]:
    """Return the names of all schemes that quantize weights to integers."""
    return tuple(name for name in NAMES if Scheme(name).whole)


def run(plan: QualityPlan, tell: Callable[[str], None] = lambda text: None) -> list[QualityRecord]:
    """Run the plan. Raises BenchmarkError, before anything is measured, for what cannot run here."""
    if plan.peers:
        need(plan.peer_python, "llama_cpp")
    checkpoint = open_checkpoint(plan.source)
    for path in (scheme for scheme in plan.schemes if isinstance(scheme, pathlib.Path)):
        check_same_model(checkpoint, path)
    tokens = rows_of(plan, checkpoint)
    check_memory(checkpoint, tokens)
    threads.use(plan.threads)
    tell("float32")
    original = list(ours.logits(ours.float_model(checkpoint), tokens))
    here = circumstances(plan, checkpoint, tokens)

    def record(found: dict[str, Any], logits: Iterable[Tensor]) -> QualityRecord:
        return QualityRecord(**dataclasses.asdict(here), **found, **distance(original, logits, tokens))

    records = []
    kernels, versions = environment()
    for scheme in plan.schemes:
        found = {"engine": OURS, **ours.described(scheme), "path": kernels, "versions": versions}
        tell(found["scheme"] + (f" ({found['file']})" if "file" in found else ""))
        model = ours.quantized_model(plan.source, scheme)
        found["bits_per_weight"] = ours.bits_per_weight(model)
        records.append(record(found, ours.logits(model, tokens)))
        del model  # before the next is loaded
    if plan.peers:
        records += [record(found, logits) for found, logits in peer_formats(plan, here, tokens, tell)]
    return records


def rows_of(plan: QualityPlan, checkpoint: Checkpoint) -> Tensor:
    """Return the first rows of the text, (R, T) ids; each begins with BOS if the model's texts do.

    Raises BenchmarkError if the text is too short, or its ids exceed the vocabulary.
    """
    args, tokenizer = checkpoint.args, Tokenizer.from_pretrained(plan.source)
    length = min(ROW, args.max_seq_len, args.sliding_window or ROW)
    start = tokenizer.encode("")  # BOS, or nothing
    ids = tokenizer.encode(plan.text, bos=False)[: plan.rows * (length - len(start))]
    if len(ids) < plan.rows * (length - len(start)):
        raise BenchmarkError(
            f"{plan.text_name} has {len(ids)} tokens, which are fewer than {plan.rows} rows of {length}",
            field="--text",
            hint="use a longer text, or fewer --rows",
        )
    if max(ids) >= args.vocab_size:
        raise BenchmarkError(
            f"token {max(ids)} exceeds the vocabulary of {args.vocab_size}: the tokenizer is of another model",
            place=plan.source,
        )
    rows = torch.tensor(ids).view(plan.rows, -1)
    return torch.cat([torch.tensor(start, dtype=rows.dtype).expand(plan.rows, -1), rows], 1)


def check_same_model(checkpoint: Checkpoint, path: pathlib.Path) -> None:
    """Raise BenchmarkError if the folder or file has another shape than the model."""
    args = dataclasses.replace(read_args(path)[0], tie_embeddings=checkpoint.args.tie_embeddings)
    for field in dataclasses.fields(args):
        own, other = (getattr(a, field.name) for a in (checkpoint.args, args))
        if own != other:
            raise BenchmarkError(
                f"{field.name} is {other}, but {own} in the model: it is not the same model",
                field="--scheme",
                place=path,
            )


def check_memory(checkpoint: Checkpoint, tokens: Tensor) -> None:
    """Raise BenchmarkError if the float32 weights and the logits do not fit in free memory."""
    weights = sum(torch.Size(t.shape).numel() for t in checkpoint.tensors.values())
    size, free = 4 * (weights + tokens.numel() * checkpoint.args.vocab_size) + SPARE, machine.memory()[1]
    if free and size > free:
        raise BenchmarkError(
            f"the model in float32 and its logits take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            hint="close other programs, or use a smaller model or fewer --rows",
        )


def circumstances(plan: QualityPlan, checkpoint: Checkpoint, tokens: Tensor) -> Circumstances:
    return Circumstances(
        model=plan.model, own_type=ours.own_type(checkpoint), text=plan.text_name,
        text_sha256=hashlib.sha256(plan.text.encode()).hexdigest(), rows=len(tokens), row_tokens=tokens.shape[1],
        threads=torch.get_num_threads(), cpu=machine.cpu_name(), date=datetime.date.today().isoformat(),
        commit=machine.commit(), command=plan.command,
    )  # fmt: skip


def distance(original: Iterable[Tensor], logits: Iterable[Tensor], tokens: Tensor) -> dict[str, Any]:
    """Return the record's fields of the distance, from both models' logits (T, V) of each row."""
    comparison = Comparison()
    for a, b, ids in zip(original, logits, tokens, strict=True):
        parts = (t.split(CHUNK) for t in (a[:-1], b[:-1], ids[1:]))  # the last token of a row has no target
        for part in zip(*parts, strict=True):
            comparison.add(*part)
    return {name: value for name, value in comparison.result("").items() if name != "text"}


def peer_formats(
    plan: QualityPlan, here: Circumstances, tokens: Tensor, tell: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield fields of the record, and logits (R, T, V), for llama.cpp in float32 and in each of its formats."""
    with tempfile.TemporaryDirectory(prefix="mistral-7b-bench-") as folder:
        names = ("F32.gguf", "tokens.npy", "logits")
        source, tokens_file, logits_file = (str(pathlib.Path(folder) / name) for name in names)
        tell("writing a GGUF file in float32")
        convert(plan.source, source, "gguf", type="f32")
        np.save(tokens_file, tokens.to(torch.int32).numpy())
        for kind in (FLOAT32, *(kind for kind in PEER_TYPES if kind != here.own_type)):
            tell(f"{LLAMA} {kind}")
            file = source if kind == FLOAT32 else str(pathlib.Path(folder) / "quantized.gguf")
            job = {
                "kind": None if kind == FLOAT32 else kind, "source": source, "file": file, "tokens": tokens_file,
                "logits": logits_file, "threads": here.threads,
            }  # fmt: skip
            found = call(plan.peer_python, "quality", json.dumps(job))
            logits = torch.from_numpy(np.fromfile(logits_file, np.float32)).view(*tokens.shape, -1)
            bits = file_bits_per_weight(pathlib.Path(file))
            yield {"engine": LLAMA, "scheme": kind, "bits_per_weight": bits, **found}, logits


def file_bits_per_weight(path: pathlib.Path) -> float:
    """Return the bits of a weight of the layers and the output in a GGUF file, counted as `ours` does."""
    entries = {name: entry for name, entry in read_gguf(path).entries.items() if len(entry.shape) == 2}
    if rename(OUTPUT, "mistral", "gguf") in entries:
        del entries[str(rename(EMBEDDING, "mistral", "gguf"))]
    weights = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    return 8 * sum(entry.nbytes for entry in entries.values()) / weights
