"""One model in several GGUF files: any part, or the folder, names the whole."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import gguf
import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model

from mistral_7b import CheckpointError, Mistral7B, Tokenizer
from mistral_7b.checkpoint import hub, read_args
from mistral_7b.checkpoint.gguf.splits import first_part, part_names
from mistral_7b.checkpoint.names import rename
from mistral_7b.checkpoint.reading import open_checkpoint

ARGS = tiny_args(sliding_window=None, rope_theta=1e6, vocab_size=4096)
NAMES = [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
Change = Callable[[gguf.GGUFWriter, int], None]


def split(folder: pathlib.Path, change: Change = lambda writer, i: None, total: int | None = None) -> Mistral7B:
    """A model in three parts, the tensors dealt one after another; the first has the metadata and a tokenizer."""
    folder.mkdir(exist_ok=True)
    model = tiny_model(ARGS)
    model.source = hub.DEMO
    model.save_pretrained(folder / "whole.gguf", format="gguf", type="f32")
    whole = gguf.GGUFReader(folder / "whole.gguf")
    for i, name in enumerate(NAMES):
        writer = gguf.GGUFWriter(folder / name, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(whole.tensors) if total is None else total)
        for key, field in whole.fields.items() if i == 0 else ():
            if not key.startswith(("GGUF.", "general.architecture")):
                kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], kind)
        for tensor in whole.tensors[i::3]:
            writer.add_tensor(tensor.name, tensor.data)
        change(writer, i)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (folder / "whole.gguf").unlink()
    return model


def test_any_part_or_the_folder_opens_the_whole(tmp_path: pathlib.Path) -> None:
    model = split(tmp_path / "x")
    for path in (tmp_path / "x", *(tmp_path / "x" / name for name in NAMES)):
        assert read_args(path) == (ARGS, "gguf")
        found = Mistral7B.from_pretrained(path, dtype=torch.float32)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())
        assert found.source == tmp_path / "x" / NAMES[0]
        assert Tokenizer.from_pretrained(path).encode("x = 1") == Tokenizer.from_pretrained().encode("x = 1")


@pytest.mark.parametrize("missing", NAMES)
def test_a_missing_part_is_named(tmp_path: pathlib.Path, missing: str) -> None:
    split(tmp_path / "x")
    (tmp_path / "x" / missing).unlink()
    left = [name for name in NAMES if name != missing]
    for path in (tmp_path / "x", *(tmp_path / "x" / name for name in left)):
        for attempt in (read_args, open_checkpoint):
            with refused(CheckpointError, place=tmp_path / "x" / missing):
                attempt(path)


def test_parts_of_different_files_are_refused(tmp_path: pathlib.Path) -> None:
    split(tmp_path / "x")
    os.replace(tmp_path / "x" / NAMES[2], tmp_path / "x" / NAMES[1])
    (tmp_path / "x" / NAMES[2]).write_bytes((tmp_path / "x" / NAMES[1]).read_bytes())
    with refused(CheckpointError, field="split.no", place=tmp_path / "x" / NAMES[1]):
        open_checkpoint(tmp_path / "x")
    (tmp_path / "x" / NAMES[0]).rename(tmp_path / "x.gguf")
    with refused(CheckpointError, field="split.count", place=tmp_path / "x.gguf"):
        open_checkpoint(tmp_path / "x.gguf")


def test_tensors_are_in_one_part_and_counted(tmp_path: pathlib.Path) -> None:
    def twice(writer: gguf.GGUFWriter, i: int) -> None:
        if i == 1:
            name = rename("tok_embeddings.weight", "mistral", "gguf") or ""
            writer.add_tensor(name, torch.zeros(4096, ARGS.dim).numpy())

    split(tmp_path / "x", twice)
    with refused(CheckpointError, field="token_embd.weight", place=tmp_path / "x" / NAMES[1]):
        open_checkpoint(tmp_path / "x")
    split(tmp_path / "y", total=5)
    with refused(CheckpointError, field="split.tensors.count", place=tmp_path / "y" / NAMES[0]):
        open_checkpoint(tmp_path / "y")


def test_a_folder_of_several_models_lists_them(tmp_path: pathlib.Path) -> None:
    split(tmp_path / "x")
    tiny_model(ARGS).save_pretrained(tmp_path / "x" / "y.gguf", format="gguf")
    with refused(CheckpointError, place=tmp_path / "x") as caught:
        open_checkpoint(tmp_path / "x")
    assert "2 GGUF models" in str(caught.value)
    assert f"{NAMES[0]}, y.gguf" in str(caught.value)
    assert open_checkpoint(tmp_path / "x" / "y.gguf").args == ARGS


def test_names_of_parts() -> None:
    assert part_names(NAMES[1]) == NAMES
    assert part_names("deep/" + NAMES[1]) == ["deep/" + name for name in NAMES]
    for other in ("x.gguf", "x-00004-of-00003.gguf", "x-00000-of-00003.gguf", "x-1-of-3.gguf", NAMES[0] + "x"):
        assert part_names(other) is None
    assert first_part(pathlib.Path("nowhere", NAMES[2])) == pathlib.Path("nowhere", NAMES[2])
    assert hub.needed_files([*NAMES, "README.md", "config.json"]) == ["config.json", *NAMES]
    assert hub.needed_files([*NAMES, "y.gguf"]) == []
    assert hub.gguf_models([*NAMES, "y.gguf", "model.safetensors"]) == [NAMES[0], "y.gguf"]
    assert hub._wanted("some/repo", [*NAMES, "y.gguf"], NAMES[2], adapter=False) == NAMES
