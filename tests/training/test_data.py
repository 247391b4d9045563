"""Packing: no loss, no padding, no attention across documents, rows determined by the update."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from mistral_7b import TrainingError
from mistral_7b.training.data import IGNORE, PackedDocuments, read_text, split_files, text_files


def documents(count: int = 9, seed: int = 0) -> list[list[int]]:
    """Documents with unique tokens, so that the origin of each token is known."""
    lengths = np.random.default_rng(seed).integers(3, 40, count)
    ends = np.cumsum(lengths)
    return [list(range(end - n, end)) for end, n in zip(ends, lengths, strict=True)]


def test_an_epoch_holds_every_token_at_most_once_and_nearly_all() -> None:
    docs = documents()
    data = PackedDocuments(docs, seq_len=16, seed=1)
    rows = data.rows(0, data.rows_per_epoch)
    seen = rows.tokens.flatten().tolist()
    assert len(seen) == len(set(seen))
    assert sum(map(len, docs)) - len(seen) <= 16


def test_targets_are_the_next_token_of_the_same_document() -> None:
    docs = documents()
    following = {a: b for d in docs for a, b in itertools.pairwise(d)}
    data = PackedDocuments(docs, seq_len=16, seed=2)
    rows = data.rows(0, 3 * data.rows_per_epoch)
    pairs = list(zip(rows.tokens.flatten().tolist(), rows.targets.flatten().tolist(), strict=True))
    for token, target in pairs:
        assert target in (following.get(token), IGNORE)
    ignored = [token for token, target in pairs if target == IGNORE]
    ends = {d[-1] for d in docs}
    assert ends & set(ignored), "the last token of a document has no next token"
    # Otherwise a target is missing only where the stream was rolled: at most once per epoch.
    assert sum(token not in ends for token in ignored) <= 3


def test_trap_20_a_document_is_told_from_its_neighbours() -> None:
    docs = documents()
    owner = {t: i for i, d in enumerate(docs) for t in d}
    data = PackedDocuments(docs, seq_len=24, seed=3)
    rows = data.rows(0, data.rows_per_epoch)
    for tokens, ids in zip(rows.tokens.tolist(), rows.sequence_ids.tolist(), strict=True):
        for (a, i), (b, j) in zip(
            zip(tokens, ids, strict=True), zip(tokens[1:], ids[1:], strict=True), strict=False
        ):
            assert (i == j) == (owner[a] == owner[b] and b == a + 1)
        assert len(set(ids)) == 1 + sum(i != j for i, j in itertools.pairwise(ids)), "ids lie in runs"


def test_rows_are_a_function_of_their_number() -> None:
    whole = PackedDocuments(documents(), seq_len=8, seed=4)
    late = PackedDocuments(documents(), seq_len=8, seed=4)
    n = whole.rows_per_epoch
    everything = whole.rows(0, 2 * n + 3)
    part = late.rows(n - 2, 5)  # across the end of an epoch
    for a, b in zip(everything, part, strict=True):
        assert a[n - 2 : n + 3].equal(b)
    assert not everything.tokens[:n].equal(everything.tokens[n : 2 * n]), "epochs are shuffled anew"
    other = PackedDocuments(documents(), seq_len=8, seed=5)
    assert not everything.tokens[:n].equal(other.rows(0, n).tokens)


def test_too_little_text_is_refused() -> None:
    with refused(TrainingError, field="seq_len"):
        PackedDocuments([[1, 2, 3]], seq_len=8, seed=0)


def test_files_are_found_and_bad_ones_named(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("x = 1\n")
    (tmp_path / "a" / "y.bin").write_bytes(b"\xff")
    (tmp_path / "b").mkdir()
    assert text_files([str(tmp_path / "a")], (".py",)) == [tmp_path / "a" / "x.py"]
    with refused(TrainingError, place=tmp_path / "nowhere"):
        text_files([str(tmp_path / "nowhere")], (".py",))
    with refused(TrainingError, place=tmp_path / "b"):
        text_files([str(tmp_path / "b")], (".py",))
    with refused(TrainingError, place=tmp_path / "a" / "y.bin"):
        read_text(tmp_path / "a" / "y.bin")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """corpus/{a,b}.py, corpus/kept/{c,d}.py, and links to files in kept; the working folder is beside it."""
    (tmp_path / "corpus" / "kept").mkdir(parents=True)
    for name in ("a", "b", "kept/c", "kept/d"):
        (tmp_path / "corpus" / f"{name}.py").write_text(f"name = {name!r}\n")
    (tmp_path / "alias").symlink_to(tmp_path / "corpus" / "kept")
    (tmp_path / "corpus" / "link.py").symlink_to(tmp_path / "corpus" / "kept" / "c.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "corpus"


@pytest.mark.parametrize(
    ("data", "held_out", "training", "left_out"),
    [
        (["corpus"], ["corpus/kept"], ["a", "b"], 2),  # which the link leads to as well
        (["{tmp}/corpus"], ["corpus/kept"], ["a", "b"], 2),
        (["corpus"], ["{tmp}/corpus/kept/"], ["a", "b"], 2),
        (["corpus"], ["alias"], ["a", "b"], 2),
        (["corpus"], ["./corpus/../corpus/kept/c.py"], ["a", "b", "d"], 1),
        (["corpus", "corpus", "corpus/a.py"], ["corpus/kept"], ["a", "b"], 2),
        (["corpus"], ["corpus/kept", "alias", "corpus/kept/c.py"], ["a", "b"], 2),
        (["corpus/kept/c.py", "corpus/a.py"], ["corpus/kept"], ["a"], 1),  # data in the held-out set
        (["corpus/a.py"], ["corpus/kept"], ["a"], 0),
        (["corpus/kept", "alias"], [], ["c", "d"], 0),
    ],
)
def test_what_is_held_out_is_not_trained_on(
    corpus: Path, data: list[str], held_out: list[str], training: list[str], left_out: int
) -> None:
    named = ([word.format(tmp=corpus.parent) for word in words] for words in (data, held_out))
    files = split_files(*named, (".py",))
    assert ([p.resolve().stem for p in files.training], files.left_out) == (training, left_out)
    both = [os.path.realpath(p) for p in (*files.training, *files.held_out)]
    assert len(both) == len(set(both))


@pytest.mark.parametrize("data", ["corpus/kept", "alias", "corpus/link.py", "corpus"])
def test_nothing_but_held_out_files_is_an_error(corpus: Path, data: str) -> None:
    with refused(TrainingError, field="held_out"):
        split_files([data], ["corpus"], (".py",))
