"""Hidden states of many documents in one safetensors file, for probes and dictionaries learnt elsewhere.

    residual.3   (N, D)           the residual stream after layer 3, for the tokens of all documents in order
    tokens       (N,) int64       the tokens
    offsets      (M + 1,) int64   document i has the rows offsets[i] to offsets[i + 1]

M documents · N tokens in all · D width
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..activations.points import places_of
from ..checkpoint.writing import header_of
from ..errors import InterpretError
from ..files import atomic_write
from ..model import Mistral7B
from ..text.tokenizer import Tokenizer
from .contexts import record

CHUNK = 512  # tokens per forward pass


@torch.inference_mode()
def save_hidden_states(
    model: Mistral7B,
    documents: Iterable[str | Sequence[int]],
    path: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> int:
    """Write the residual stream after these layers (None: all), in the model's type; returns the number of tokens.

    Documents are texts, which need the model's `tokenizer` and begin with BOS, or token ids, used as they are. The
    states are written as they are computed, so that memory does not grow with the documents; the tokens are kept.
    InterpretError for documents without tokens or longer than the context, WriteError if the file cannot be
    written; then there is no file.
    """
    encoded = [_encode(i, document, model, tokenizer) for i, document in enumerate(documents)]
    offsets = torch.tensor([0, *itertools.accumulate(map(len, encoded))])
    if not encoded:
        raise InterpretError("there are no documents", field="documents")
    tokens, places = torch.cat(encoded), places_of(["residual"], layers, model.args.n_layers)
    names, weight = [f"{point}.{layer}" for point, layer in places], model.norm.weight
    shapes = [("offsets", offsets), ("tokens", tokens)]
    header = header_of(
        [(name, t.dtype, tuple(t.shape)) for name, t in shapes]
        + [(name, weight.dtype, (len(tokens), model.args.dim)) for name in names]
    )
    row = model.args.dim * weight.dtype.itemsize
    with atomic_write(path) as beside, beside.open("wb") as f:
        f.write(header + _bytes(offsets) + _bytes(tokens))
        start = f.tell()
        done = 0
        for ids in encoded:
            cache = model.rolling_cache(max_seq_len=len(ids))
            for part in ids.split(CHUNK):
                with record(model, "residual", layers=[n for _, n in places if n is not None]) as tape:
                    model.hidden(part[None].to(weight.device), cache)
                for i, place in enumerate(places):
                    f.seek(start + (i * len(tokens) + done) * row)
                    f.write(_bytes(tape[place][0]))
                done += len(part)
    return done


def _encode(i: int, document: str | Sequence[int], model: Mistral7B, tokenizer: Tokenizer | None) -> Tensor:
    """The tokens (T,) of document number i."""
    if isinstance(document, str) and tokenizer is None:
        raise InterpretError("a text needs the model's tokenizer", field="tokenizer", hint="or pass token ids")
    ids = tokenizer.encode(document) if isinstance(document, str) and tokenizer else list(document)
    args, field = model.args, f"documents[{i}]"
    if not ids or any(type(t) is not int or not 0 <= t < args.vocab_size for t in ids):
        raise InterpretError(f"document {i} is not token ids of the vocabulary, at least one", field=field)
    if args.sliding_window is None and len(ids) > args.max_seq_len:
        raise InterpretError(
            f"document {i} has {len(ids)} tokens, and the context {args.max_seq_len}", field=field, hint="split it"
        )
    return torch.tensor(ids)


def _bytes(t: Tensor) -> bytes:
    return t.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
