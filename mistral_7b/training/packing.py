"""Documents packed into rows of at most `seq_len` tokens, whole and isolated from each other.

    epoch e:  an order drawn from (seed, e)  ->  rows by best fit  ->  their order drawn too
    row r of the run, counted over all epochs  ->  (epoch, place in it)

A document's last token is never an input, since nothing is predicted from it: one of n tokens takes n - 1 places.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from ..errors import TrainingError


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items, in their order, to bins: each to the fullest bin that has room for it, else to a new one.

    Returns the items of each bin. Raises TrainingError for an item longer than `capacity`.
    """
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    bins: list[list[int]] = []
    for item, length in enumerate(lengths):
        if length > capacity:
            raise TrainingError(
                f"document {item} has {length} tokens and a row {capacity}", field="seq_len", hint="raise seq_len"
            )
        found = bisect.bisect_left(rooms, (length, -1))
        room, place = rooms.pop(found) if found < len(rooms) else (capacity, len(bins))
        if place == len(bins):
            bins.append([])
        bins[place].append(item)
        if room > length:
            bisect.insort(rooms, (room - length, place))
    return bins


class PackedRows:
    """The endless rows of a data set, as indices of its documents; reshuffled and repacked every epoch.

    `lengths` are the places that documents take, `copies` how often each is taken in an epoch: its whole part
    always, and its fraction by chance, so that 0.5 takes another half of the documents in every epoch.
    """

    def __init__(self, lengths: Sequence[int], seq_len: int, seed: int, copies: Sequence[float] = ()) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.copies = np.asarray(copies or np.ones(len(lengths)))
        self.seq_len, self.seed = seq_len, seed
        self.first = [0]  # the first row of each epoch, as far as known
        self._epoch, self._rows = -1, self._packed(0)

    def _packed(self, epoch: int) -> list[list[int]]:
        """Return the rows of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        times = np.floor(self.copies + rng.random(len(self.copies))).astype(np.int64)
        order = rng.permutation(np.repeat(np.arange(len(self.lengths)), times))
        rows = [[int(order[i]) for i in row] for row in best_fit(self.lengths[order].tolist(), self.seq_len)]
        if not rows:
            raise TrainingError("no document remains with these weights of the sources", field="data")
        return [rows[i] for i in rng.permutation(len(rows))]

    def _begin(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._packed(epoch)
        if len(self.first) == epoch + 1:
            self.first.append(self.first[epoch] + len(self._rows))

    def rows_of(self, epochs: int) -> int:
        """Return the number of rows of the first `epochs` epochs."""
        while len(self.first) <= epochs:
            self._begin(len(self.first) - 1)
        return self.first[epochs]

    def row(self, number: int) -> list[int]:
        """Return the documents of row `number` of the run."""
        while self.first[-1] <= number:
            self._begin(len(self.first) - 1)
        epoch = bisect.bisect_right(self.first, number) - 1
        self._begin(epoch)
        return self._rows[number - self.first[epoch]]

    def parts(self, step: int, rows: int, accumulate: int) -> list[list[int]]:
        """Return the documents of update `step`, of `rows` rows, in `accumulate` parts of equally many rows."""
        first, size = step * rows, rows // accumulate
        starts = range(first, first + rows, size)
        return [[i for row in range(start, start + size) for i in self.row(row)] for start in starts]
