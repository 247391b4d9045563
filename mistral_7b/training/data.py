"""Text files -> rows of tokens, packed without padding; documents are isolated.

A row is `seq_len` tokens of a stream of documents, each framed by BOS and EOS. At a document boundary the
sequence id changes: it resets positions and masks attention (resetting positions alone would not isolate the
documents), and the last token of a document has no target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError
from ..text.tokenizer import Tokenizer

IGNORE = -100  # target without loss


class Rows(NamedTuple):
    """R rows of T tokens: inputs, targets (next token or IGNORE), document of each token."""

    tokens: Tensor  # (R, T)
    targets: Tensor  # (R, T)
    sequence_ids: Tensor  # (R, T)


def text_files(paths: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Return the text files in `paths`, searching folders recursively, sorted, each file once.

    Raises TrainingError for a missing path or a folder without text files.
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
    """Training files, held-out files, and how many files of `data` are held out."""

    training: list[Path]
    held_out: list[Path]
    left_out: int


def split_files(data: Sequence[str], held_out: Sequence[str], suffixes: Sequence[str]) -> Files:
    """Split files into training and held-out; a file in both (by resolved path) is held out.

    Raises TrainingError as `text_files` does, and if no training file remains.
    """
    found, measured = text_files(data, suffixes), text_files(held_out, suffixes)
    excluded = {path.resolve() for path in measured}
    training = [path for path in found if path.resolve() not in excluded]
    if not training:
        raise TrainingError(
            f"nothing remains to train on: all {len(found)} files of --data are held out as well",
            field="held_out",
            hint="name other files with --data, or fewer with --held-out",
        )
    return Files(training, measured, len(found) - len(training))


def read_text(path: Path) -> str:
    """Read a file's text. Raises TrainingError if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"not UTF-8 ({error.reason} at byte {error.start})", place=path) from None


class PackedDocuments:
    """A stream of documents, reshuffled every epoch and split into rows.

    The rows of an update depend on (seed, update) alone, so that a resumed run sees the same data.
    """

    def __init__(self, documents: Sequence[Sequence[int]], seq_len: int, seed: int) -> None:
        """Take token ids framed by BOS and EOS. TrainingError if they do not fill one row."""
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
        # A new offset each epoch, so that documents are not always split at the same token.
        offset = int(rng.integers(self.seq_len))
        self._stream = np.roll(np.concatenate([self.documents[i] for i in order]), -offset)
        ids = np.repeat(np.arange(len(order), dtype=np.int32), [len(self.documents[i]) for i in order])
        self._ids = np.roll(ids, -offset)
        if offset:  # the part rolled to the end does not continue the document before it
            self._ids[-offset:] += len(order)
        self._order = rng.permutation(self.rows_per_epoch)
        self._epoch = epoch

    def rows(self, first: int, count: int) -> Rows:
        """Return rows `first`..`first + count` of the endless sequence of epochs."""
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
    """Yield each file with its tokens (BOS first) and its size in bytes."""
    for path in files:
        text = read_text(path)
        yield path, tokenizer.encode(text, bos=True), len(text.encode())
