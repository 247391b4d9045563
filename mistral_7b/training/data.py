"""Text files to rows of tokens, packed without padding and without documents seeing each other.

A row is `seq_len` tokens of a stream of documents, each framed by BOS and EOS. Where a document ends,
the sequence id changes: attention and positions begin anew (a reset of positions alone would not isolate
them), and the last token of one document is not asked for the first of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError
from ..tokenizer import Tokenizer

IGNORE = -100  # a target that costs nothing


class Rows(NamedTuple):
    """R rows of T tokens: inputs, next tokens (or IGNORE), and which document each token is of."""

    tokens: Tensor  # (R, T)
    targets: Tensor  # (R, T)
    sequence_ids: Tensor  # (R, T)


def text_files(paths: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The text files that `paths` name, folders searched through, in a fixed order, each file once.

    Raises TrainingError for a path that is not there or a folder with nothing to read.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
            if not inside:
                raise TrainingError(f"no file ending in {', '.join(suffixes)} below this folder", place=path)
            found.extend(inside)
        else:
            raise TrainingError("no such file or folder", place=path)
    once: dict[Path, Path] = {}
    for path in found:
        once.setdefault(path.resolve(), path)
    return list(once.values())


class Files(NamedTuple):
    """What a run reads, and how many files of its data were left out of training because they are held out."""

    training: list[Path]
    held_out: list[Path]
    left_out: int


def split_files(data: Sequence[str], held_out: Sequence[str], suffixes: Sequence[str]) -> Files:
    """The files to train on and those to measure on: one that is both, by its resolved path, is only measured on.

    Raises TrainingError as `text_files` does, and if nothing remains to train on.
    """
    found, measured = text_files(data, suffixes), text_files(held_out, suffixes)
    hidden = {path.resolve() for path in measured}
    training = [path for path in found if path.resolve() not in hidden]
    if not training:
        raise TrainingError(
            f"nothing remains to train on: all {len(found)} files of --data are held out as well",
            field="held_out",
            hint="name other files with --data, or fewer with --held-out",
        )
    return Files(training, measured, len(found) - len(training))


def read_text(path: Path) -> str:
    """The file's text. TrainingError if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"not UTF-8 ({error.reason} at byte {error.start})", place=path) from None


class PackedDocuments:
    """Documents as a stream of tokens, shuffled anew each epoch and cut into rows.

    What an update sees is a function of (seed, update) alone, so that a resumed run sees the same.
    """

    def __init__(self, documents: Sequence[Sequence[int]], seq_len: int, seed: int) -> None:
        """`documents` are token ids, framed by BOS and EOS. TrainingError if they do not fill a row."""
        self.documents = [np.asarray(d, dtype=np.int32) for d in documents if len(d)]
        self.seq_len, self.seed = seq_len, seed
        self.total = sum(len(d) for d in self.documents)
        self.rows_per_epoch = (self.total - 1) // seq_len
        if self.rows_per_epoch < 1:
            raise TrainingError(
                f"{self.total} tokens of data do not fill one row of {seq_len}",
                field="seq_len",
                hint="lower seq_len",
            )
        self._epoch = -1
        self._stream = self._ids = np.empty(0, np.int32)
        self._order = np.empty(0, np.int64)

    @classmethod
    def from_files(cls, files: Sequence[Path], tokenizer: Tokenizer, seq_len: int, seed: int) -> PackedDocuments:
        """Read and encode each file as one document."""
        documents = [tokenizer.encode(read_text(f), bos=True, eos=True) for f in files]
        return cls(documents, seq_len, seed)

    def _begin(self, epoch: int) -> None:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.documents))
        # Cut at another place each epoch, so that no document is always torn at the same token.
        offset = int(rng.integers(self.seq_len))
        self._stream = np.roll(np.concatenate([self.documents[i] for i in order]), -offset)
        ids = np.repeat(np.arange(len(order), dtype=np.int32), [len(self.documents[i]) for i in order])
        self._ids = np.roll(ids, -offset)
        if offset:  # the part rolled to the end is no continuation of what comes before it
            self._ids[-offset:] += len(order)
        self._order = rng.permutation(self.rows_per_epoch)
        self._epoch = epoch

    def rows(self, first: int, count: int) -> Rows:
        """Rows number `first`..`first + count` of the endless sequence of epochs."""
        T = self.seq_len
        tokens, targets, ids = (np.empty((count, T), np.int64) for _ in range(3))
        for r in range(count):
            epoch, place = divmod(first + r, self.rows_per_epoch)
            if epoch != self._epoch:
                self._begin(epoch)
            start = int(self._order[place]) * T
            stream, run = self._stream[start : start + T + 1], self._ids[start : start + T + 1]
            tokens[r], ids[r] = stream[:-1], run[:-1]
            targets[r] = np.where(run[1:] == run[:-1], stream[1:], IGNORE)
        return Rows(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(ids))


def held_out_documents(files: Sequence[Path], tokenizer: Tokenizer) -> Iterator[tuple[Path, list[int], int]]:
    """Each file with its tokens (BOS first) and its size in bytes."""
    for path in files:
        text = read_text(path)
        yield path, tokenizer.encode(text, bos=True), len(text.encode())
