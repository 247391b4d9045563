"""Rows of whole documents: best fit, epochs, copies."""

from __future__ import annotations

from collections import Counter

import numpy as np
from refusals import refused

from mistral_7b import TrainingError
from mistral_7b.training.packing import PackedRows, best_fit

LENGTHS = [5, 3, 9, 1, 7, 2, 2, 8, 4, 4, 6, 10]


def test_each_item_goes_to_the_fullest_bin_with_room_for_it() -> None:
    assert best_fit([6, 3, 5, 4, 1], 10) == [[0, 1, 4], [2, 3]]
    assert best_fit([6, 5, 4], 10) == [[0, 2], [1]], "room 4 is a better fit than room 5"
    assert best_fit([], 10) == []
    with refused(TrainingError, field="seq_len"):
        best_fit([3, 11], 10)


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 5000).tolist()
    bins = best_fit(lengths, 1024)
    assert all(sum(lengths[i] for i in row) <= 1024 for row in bins)
    assert sorted(i for row in bins for i in row) == list(range(5000))
    assert sum(lengths) / (1024 * len(bins)) > 0.98


def test_an_epoch_has_every_document_once_and_each_epoch_another_order() -> None:
    packed = PackedRows(LENGTHS, 10, seed=3)
    first, second = packed.rows_of(1), packed.rows_of(2)
    epochs = [[packed.row(r) for r in range(first)], [packed.row(r) for r in range(first, second)]]
    for rows in epochs:
        assert sorted(i for row in rows for i in row) == list(range(len(LENGTHS)))
        assert all(sum(LENGTHS[i] for i in row) <= 10 for row in rows)
    assert epochs[0] != epochs[1]


def test_a_row_depends_on_its_number_and_the_seed_alone() -> None:
    asked = [40, 3, 17, 4, 0, 41]
    one, other = PackedRows(LENGTHS, 10, seed=3), PackedRows(LENGTHS, 10, seed=3)
    wanted = {r: one.row(r) for r in range(50)}
    assert [other.row(r) for r in asked] == [wanted[r] for r in asked]
    assert [PackedRows(LENGTHS, 10, seed=4).row(r) for r in asked] != [wanted[r] for r in asked]


def test_copies_are_how_often_a_document_is_taken_in_an_epoch() -> None:
    packed = PackedRows([1] * 400, 10, seed=0, copies=[2.0] * 100 + [0.5] * 200 + [0.0] * 100)
    taken = Counter(i for r in range(packed.rows_of(1)) for i in packed.row(r))
    assert {taken[i] for i in range(100)} == {2}
    assert {taken[i] for i in range(100, 300)} == {0, 1}
    assert 70 < sum(taken[i] for i in range(100, 300)) < 130
    assert not any(taken[i] for i in range(300, 400))
    with refused(TrainingError, field="data"):
        PackedRows([1, 1], 10, seed=0, copies=[0.0, 0.0])
