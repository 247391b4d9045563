"""The examples of a run: those to train on, and those that are only evaluated. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import TrainingError
from ..text.tokenizer import Tokenizer
from .examples import Source, read_data
from .finetune_args import FinetuneArgs


class Examples(NamedTuple):
    """Items to train on, how often each is taken in an epoch, those held out, and what each source held."""

    items: Sequence[Any]
    copies: Sequence[float] = ()
    held_out: Sequence[Any] = ()
    report: Sequence[Source] = ()

    def fingerprint(self) -> str:
        """Return a hash of what is trained on: a run cannot resume on other items."""
        digest = hashlib.sha256()
        for part in _parts([self.items, self.copies]):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """Yield the bytes of arrays and of all else in nested sequences."""
    if isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _parts(each)
    else:
        yield json.dumps(value).encode()


def read_examples(args: FinetuneArgs, tokenizer: Tokenizer) -> Examples:
    """Read the files of data, and hold out a file or a share of the items. TrainingError as `read_data`."""
    if not args.data:
        raise TrainingError("no training data", field="data", hint="name files of examples with --data")
    read = functools.partial(
        read_data, tokenizer=tokenizer, method=args.method, seq_len=args.seq_len, skip_bad=args.skip_bad
    )
    data = read(args.data)
    copies = [data.weights[source] for source in data.source_of]
    if args.held_out is None:
        return Examples(data.items, copies, (), data.report)
    if (share := args.held_out_share) is None:
        if Path(args.held_out).resolve() in {Path(source.path).resolve() for source in data.report}:
            raise TrainingError(
                f"{args.held_out} is trained on as well, so that it would measure nothing",
                field="held_out",
                hint="name another file, or a share of the data, such as 0.05",
            )
        return Examples(data.items, copies, read([args.held_out]).items, data.report)
    order = np.random.default_rng(args.seed).permutation(len(data.items))
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise TrainingError(
            f"nothing remains to train on: {count} of {len(order)} rows are held out", field="held_out"
        )
    held, kept = sorted(order[:count]), sorted(order[count:])
    return Examples(
        [data.items[i] for i in kept], [copies[i] for i in kept], [data.items[i] for i in held], data.report
    )
