"""Hundreds of malicious GGUF files give an error or a model. Run `tests/fuzz_gguf.py` for a million."""

from __future__ import annotations

import pathlib
import random
import time
import tracemalloc

import pytest
from example_counts import MANY
from gguf_inputs import BLOCKS, built, grown, mutated, pairs_of, seeds, survives, tensors_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused
from waiting import soon

from mistral_7b import CheckpointError
from mistral_7b.checkpoint.gguf.file import KINDS
from mistral_7b.checkpoint.gguf.reading import StoredBlocks
from mistral_7b.checkpoint.reading import open_checkpoint

SEEDS = seeds()
QUICK = settings(MANY, suppress_health_check=[HealthCheck.function_scoped_fixture])


def endured(path: pathlib.Path, raw: bytes) -> bool:
    path.write_bytes(raw)
    return soon(2, lambda: survives(path), clock=time.perf_counter)


def test_the_fuzzing_seeds_open(tmp_path: pathlib.Path) -> None:
    """Some of the files made from them load and some do not, so that the tests below are meaningful."""
    assert all(endured(tmp_path / "x.gguf", raw) for raw in SEEDS)
    draw = random.Random(1)
    for make in (lambda: mutated(draw.choice(SEEDS), draw), lambda: grown(draw)):
        assert 3 < sum(endured(tmp_path / "x.gguf", make()) for _ in range(100)) < 97


def test_a_quantized_vector_is_read_dequantized(tmp_path: pathlib.Path) -> None:
    """Found by fuzzing: a norm was kept as a matrix of shape (1, K)."""
    tensors = tensors_of(BLOCKS, random.Random(0), ["Q8_0"])
    name, sizes, _, offset, _ = tensors[-2]
    tensors[-2] = (name, sizes, KINDS["Q8_0"].code, offset, bytes(KINDS["Q8_0"].size))
    assert endured(tmp_path / "x.gguf", built(pairs_of(BLOCKS), tensors))
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert tuple(checkpoint.read("norm.weight").shape) == (32,)
    stored = [checkpoint.tensors[name] for name in ("norm.weight", "output.weight")]
    assert [isinstance(t, StoredBlocks) and t.kernel_ready for t in stored] == [False, True]


def test_rows_of_partial_blocks_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = tensors_of(BLOCKS, random.Random(0), ["Q8_0"])
    name, (width, *rest), kind, offset, data = tensors[-1]
    for wrong in (width + 1, width + 16, 1):
        (tmp_path / "x.gguf").write_bytes(
            built(pairs_of(BLOCKS), [*tensors[:-1], (name, (wrong, *rest), kind, offset, data)])
        )
        with refused(CheckpointError, field=name, place=tmp_path / "x.gguf"):
            open_checkpoint(tmp_path / "x.gguf")


def test_an_empty_tensor_is_refused(tmp_path: pathlib.Path) -> None:
    """Also for the tensor that is read before shapes are checked."""
    tensors = tensors_of(BLOCKS, random.Random(0), ["F32"])
    for sizes in ((0,), (0, 4), (4, 0)):
        (tmp_path / "x.gguf").write_bytes(
            built(pairs_of(BLOCKS), [*tensors, ("rope_freqs.weight", sizes, 0, 1 << 16, b"")])
        )
        with refused(CheckpointError, field="rope_freqs.weight", place=tmp_path / "x.gguf"):
            open_checkpoint(tmp_path / "x.gguf")


@QUICK
@given(seed=st.integers(0, 2**63), which=st.integers(0, len(SEEDS) - 1))
def test_damaged_files_raise_or_open(tmp_path: pathlib.Path, seed: int, which: int) -> None:
    endured(tmp_path / "x.gguf", mutated(SEEDS[which], random.Random(seed)))


@QUICK
@given(seed=st.integers(0, 2**63))
def test_well_formed_files_with_random_values_raise_or_open(tmp_path: pathlib.Path, seed: int) -> None:
    endured(tmp_path / "x.gguf", grown(random.Random(seed)))


@QUICK
@given(raw=st.binary(max_size=400), version=st.sampled_from([2, 3]))
def test_random_bytes_raise(tmp_path: pathlib.Path, raw: bytes, version: int) -> None:
    assert not endured(tmp_path / "x.gguf", b"GGUF" + bytes([version, 0, 0, 0]) + raw)


@pytest.mark.parametrize("make", [grown, lambda draw: mutated(draw.choice(SEEDS), draw)], ids=["grown", "damaged"])
def test_small_files_do_not_allocate_megabytes(tmp_path: pathlib.Path, make) -> None:  # type: ignore[no-untyped-def]
    draw = random.Random(2)
    inputs = [make(draw) for _ in range(100)]
    survives(_written(tmp_path, SEEDS[0]))  # warmup: imports and caches
    tracemalloc.start()
    try:
        for raw in inputs:
            survives(_written(tmp_path, raw), load=False)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def _written(folder: pathlib.Path, raw: bytes) -> pathlib.Path:
    path = folder / "x.gguf"
    path.write_bytes(raw)
    return path
