"""Damaged, inconsistent and malicious files raise a CheckpointError naming file and tensor."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_counts import MANY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import TINY, tiny_model

from mistral_7b import CheckpointError, Mistral7B, Mistral7BError
from mistral_7b.checkpoint import convert

INDEX = "model.safetensors.index.json"
Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A valid checkpoint in each layout: one (single file), many (shards), mistral."""
    folder = tmp_path_factory.mktemp("originals")
    model = tiny_model()
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="30KB")
    model.save_pretrained(folder / "mistral", format="mistral")
    return folder


@pytest.fixture
def copies(originals: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(originals, tmp_path / "copies")
    return tmp_path / "copies"


def rejected(path: pathlib.Path, place: pathlib.Path, field: str | None = None) -> None:
    """Check that loading and converting raise an error about this file or folder, and leave nothing."""
    out = path.parent / "converted"
    before = set(path.parent.iterdir())
    for attempt in (lambda: Mistral7B.from_pretrained(path), lambda: convert(path, out, to="mistral")):
        with refused(CheckpointError, field=field) as error:
            attempt()
        assert pathlib.Path(str(error.value.place)).is_relative_to(place)
    assert set(path.parent.iterdir()) == before


def rewrite(path: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Modify the tensors of a safetensors file, or the object of a JSON file, in place."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    else:
        tensors = dict(load_file(path))
        change(tensors)
        save_file({name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, path)


def shard_of(folder: pathlib.Path, tensor: str) -> pathlib.Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated_safetensors_are_refused(copies: pathlib.Path, keep: float) -> None:
    for path in (copies / "one" / "model.safetensors", shard_of(copies / "many", Q1)):
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * keep) if keep == 0.5 else int(keep)])
        rejected(path.parent, path)


def test_safetensors_longer_than_its_header_are_refused(copies: pathlib.Path) -> None:
    path = copies / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    rejected(copies / "one", path)


def test_a_missing_shard_is_refused(copies: pathlib.Path) -> None:
    shard = shard_of(copies / "many", Q1)
    first = next(
        t for t, f in json.loads((copies / "many" / INDEX).read_text())["weight_map"].items() if f == shard.name
    )
    shard.unlink()
    rejected(copies / "many", shard, first)


def test_a_tensor_in_two_shards_is_refused(copies: pathlib.Path) -> None:
    folder = copies / "many"
    other = shard_of(folder, "lm_head.weight")
    rewrite(other, lambda t: t.update({Q1: load_file(shard_of(folder, Q1))[Q1]}))
    rejected(folder, other, Q1)


def test_an_index_with_a_duplicate_tensor_is_refused(copies: pathlib.Path) -> None:
    path = copies / "many" / INDEX
    text = path.read_text().replace(
        '"weight_map": {', f'"weight_map": {{"{Q1}": "model-00001-of-00005.safetensors",', 1
    )
    path.write_text(text)
    rejected(copies / "many", path, Q1)


def test_a_header_with_a_duplicate_tensor_is_refused(copies: pathlib.Path) -> None:
    path = copies / "one" / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + length].rstrip().replace(b'"model.norm.weight"', b'"lm_head.weight"')
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    rejected(copies / "one", path)


def test_an_index_that_disagrees_with_its_shards_is_refused(copies: pathlib.Path) -> None:
    folder = copies / "many"
    other = shard_of(folder, "lm_head.weight").name
    rewrite(folder / INDEX, lambda d: d["weight_map"].update({Q1: other}))
    rejected(folder, folder, Q1)
    rewrite(folder / INDEX, lambda d: d["weight_map"].pop(Q1))
    rejected(folder, folder, Q1)
    rewrite(folder / INDEX, lambda d: d["weight_map"].update({Q1: other, "model.extra.weight": other}))
    rejected(folder, folder)


@pytest.mark.parametrize("place", ["../one/model.safetensors", "/etc/passwd", "..", "", 7])
def test_an_index_with_a_path_outside_its_folder_is_refused(copies: pathlib.Path, place: Any) -> None:
    rewrite(copies / "many" / INDEX, lambda d: d["weight_map"].update({Q1: place}))
    rejected(copies / "many", copies / "many" / INDEX)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str | None]] = {
    "wrong shape": (lambda t: t.update({Q1: t[Q1][:-1]}), Q1),
    "transposed": (lambda t: t.update({Q1: t[Q1].t()}), Q1),
    "scalar": (lambda t: t.update({Q1: t[Q1][0, 0]}), Q1),
    "unknown tensor": (
        lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": t[Q1][0]}),
        "model.layers.1.self_attn.q_proj.bias",
    ),
    "missing tensor": (lambda t: t.pop(Q1), Q1),
    "one layer too many": (lambda t: t.update({Q1.replace("1", "2"): t[Q1]}), Q1.replace("1", "2")),
    "whole numbers": (lambda t: t.update({Q1: t[Q1].to(torch.int8)}), Q1),
    "another model": (
        lambda t: (t.clear(), t.update({"transformer.wte.weight": torch.ones(2)})),
        None,
    ),
    "empty": (lambda t: t.clear(), None),
}


@pytest.mark.parametrize(("change", "field"), CHANGES.values(), ids=CHANGES)
def test_missing_extra_or_misshapen_tensors_are_refused(
    copies: pathlib.Path, change: Callable[[dict[str, Any]], Any], field: str | None
) -> None:
    rewrite(copies / "one" / "model.safetensors", change)
    rejected(copies / "one", copies / "one", field)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 41), ("num_hidden_layers", 3), ("num_hidden_layers", 10**9), ("num_attention_heads", 3),
     ("vocab_size", 10**15), ("head_dim", 12), ("intermediate_size", 55), ("rms_norm_eps", float("nan")),
     ("rope_theta", 5.0), ("quantization_config", {"bits": 4}), ("architectures", ["MixtralForCausalLM"])],
)  # fmt: skip
def test_a_config_that_disagrees_with_the_weights_is_refused(copies: pathlib.Path, field: str, value: Any) -> None:
    rewrite(copies / "one" / "config.json", lambda d: d.update({field: value}))
    rejected(copies / "one", copies / "one")


def test_folders_without_a_checkpoint_are_refused(tmp_path: pathlib.Path, copies: pathlib.Path) -> None:
    empty = tmp_path / "empty" / "folder"
    empty.mkdir(parents=True)
    rejected(empty, empty)
    rejected(empty / "nothing", empty / "nothing")
    (copies / "one" / "config.json").unlink()
    rejected(copies / "one", copies / "one")
    (copies / "many" / "notes.txt").write_text("hello")
    rejected(copies / "many" / "notes.txt", copies / "many" / "notes.txt")


class Trap:
    """Its pickle creates a file when it is loaded unsafely."""

    def __init__(self, evidence: pathlib.Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.evidence),)


@pytest.mark.parametrize("bare", [True, False])
def test_trap_23_a_malicious_pickle_is_refused_and_not_run(copies: pathlib.Path, bare: bool) -> None:
    evidence = copies.parent / "evidence"
    folder = copies / "mistral"
    (folder / "consolidated.safetensors").unlink()
    state = {**tiny_model().state_dict(), "norm.weight": Trap(evidence)}
    path = folder / "consolidated.00.pth"
    if bare:
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path)
    rejected(folder, path)
    assert not evidence.exists()
    torch.load(path, weights_only=False) if not bare else pickle.loads(path.read_bytes())
    assert evidence.exists()  # the pickle is indeed malicious


@pytest.mark.parametrize("content", [[torch.ones(2)], {"norm.weight": "text"}, {3: torch.ones(2)}, torch.ones(2)])
def test_a_pickle_of_other_objects_is_refused(copies: pathlib.Path, content: Any) -> None:
    folder = copies / "mistral"
    (folder / "consolidated.safetensors").unlink()
    torch.save(content, folder / "consolidated.00.pth")
    rejected(folder, folder / "consolidated.00.pth")


def test_a_truncated_compressed_or_old_pickle_is_refused(copies: pathlib.Path) -> None:
    folder = copies / "mistral"
    (folder / "consolidated.safetensors").unlink()
    path = folder / "consolidated.00.pth"
    state = tiny_model().state_dict()
    torch.save(state, path)
    assert Mistral7B.from_pretrained(folder).args == TINY
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    rejected(folder, path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    (folder / "new").replace(path)
    rejected(folder, path)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    rejected(folder, path)


FUZZ = settings(
    MANY, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def opens_or_says_why(folder: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = Mistral7B.from_pretrained(folder)
        except Mistral7BError as error:
            said = str(error)
        else:
            said = "tensor" if all(not p.is_meta for p in model.parameters()) else ""
    assert re.search(r"\.(json|safetensors|pth)|tensor", said)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=4))
def test_fuzzed_safetensors_headers_raise_checkpoint_errors(
    originals: pathlib.Path, copies: pathlib.Path, edits: list[tuple[int, int]]
) -> None:
    raw = bytearray((originals / "one" / "model.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for place, value in edits:
        raw[place % end if place % 3 else place % 16] = value
    (copies / "one" / "model.safetensors").write_bytes(raw)
    opens_or_says_why(copies / "one")


@FUZZ
@given(
    st.sampled_from([("one", "config.json"), ("mistral", "params.json"), ("many", INDEX)]),
    st.lists(st.tuples(st.integers(0, 2**31), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3),
)
def test_fuzzed_json_bytes_raise_checkpoint_errors(
    originals: pathlib.Path, copies: pathlib.Path, which: tuple[str, str], edits: list[tuple[int, bytes, int]]
) -> None:
    raw = bytearray((originals / which[0] / which[1]).read_bytes())
    for place, new, cut in edits:
        begin = place % len(raw) if raw else 0
        raw[begin : begin + cut] = new
    (copies / which[0] / which[1]).write_bytes(raw)
    opens_or_says_why(copies / which[0])


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "x"]), st.floats()),
)  # fmt: skip


@FUZZ
@given(st.data())
def test_fuzzed_config_values_raise_checkpoint_errors(
    originals: pathlib.Path, copies: pathlib.Path, data: st.DataObject
) -> None:
    folder, file = data.draw(st.sampled_from([("one", "config.json"), ("mistral", "params.json")]))
    config = json.loads((originals / folder / file).read_text())
    more = ["layer_types", "rope_scaling", "dtype", "_sliding_window", "partial_rotary_factor", "moe"]
    field = data.draw(st.sampled_from([*config, *more]))
    config[field] = data.draw(VALUES)
    (copies / folder / file).write_text(json.dumps(config))
    opens_or_says_why(copies / folder)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=4))
def test_fuzzed_pickles_raise_checkpoint_errors(
    originals: pathlib.Path, copies: pathlib.Path, edits: list[tuple[int, int]]
) -> None:
    folder = copies / "mistral"
    (folder / "consolidated.safetensors").unlink(missing_ok=True)
    whole = copies / "whole.pth"
    if not whole.exists():
        torch.save(tiny_model().state_dict(), whole)
    raw = bytearray(whole.read_bytes())
    for place, value in edits:
        # In the pickle at the start, or in the zip directory at the end.
        raw[place % 4000 if place % 2 else -1 - place % 2000] = value
    (folder / "consolidated.00.pth").write_bytes(raw)
    opens_or_says_why(folder)
