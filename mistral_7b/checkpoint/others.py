"""What a folder or file is that holds no checkpoint, and what to do: one sentence each. Imports no torch."""

from __future__ import annotations

import json
import os
import pathlib
import re
import zipfile
from collections.abc import Sequence

from ..errors import CheckpointError, Mistral7BError
from . import hub

CONFIGS = ("config.json", "params.json")
WEIGHT = re.compile(r".*\.(safetensors|pth|bin|gguf)")
STATE = re.compile(
    r"training_args\.bin|rng_state(_\d+)?\.pth|(optimizer|scheduler|scaler|sampler)\.bin"
)  # of a training
ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)|lora\.safetensors")
SHARD = re.compile(r"(?P<stem>model|consolidated|pytorch_model)-\d+-of-(?!0*1\.)\d+\.(?P<suffix>safetensors|bin)")
ARCHIVE = re.compile(r".*\.(zip|tar|tgz|tar\.\w+|7z)")
FORMATS = (  # name of a file or folder -> the format of its weights
    (re.compile(r".*\.onnx(_data)?|onnx"), "ONNX"),
    (re.compile(r".*\.mlpackage|.*\.mlmodelc"), "Core ML"),
    (re.compile(r"tf_model\.h5|.*\.keras"), "TensorFlow"),
    (re.compile(r"flax_model.*\.msgpack"), "Flax"),
    (re.compile(r".*\.tflite|.*\.engine|.*\.llamafile"), "another engine"),
)
INSTEAD = "take the model in safetensors or GGUF"
LFS = b"version https://git-lfs"
MAGICS = (  # first bytes -> what such a file is, and what to do
    (b"\x1f\x8b", "a gzip archive", "unpack it, and name the folder"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it, and name the folder"),
    (b"\xfd7zXZ", "an xz archive", "unpack it, and name the folder"),
    (b"\x89HDF", "an HDF5 file, as Keras writes", INSTEAD),
    (b"<!", "a web page", "fetch the file again, by its download link"),
    (b"<html", "a web page", "fetch the file again, by its download link"),
)
SEARCHED = 300  # folders that are looked into for the model meant


def check(source: str | os.PathLike[str]) -> pathlib.Path:
    """Return a path. CheckpointError if nothing is there, or what can be no checkpoint, saying what it is."""
    path = pathlib.Path(source)
    if not path.exists():
        raise CheckpointError("no such file or folder", place=path)
    if path.is_dir():
        _check_folder(path)
    elif ADAPTER.fullmatch(path.name):
        raise _adapter_error(path)
    elif path.name in CONFIGS:
        raise CheckpointError("a configuration, not weights", place=path, hint=f"name its folder, {path.parent}")
    elif path.suffix != ".json":  # an index of shards
        check_weight_file(path)
        if SHARD.fullmatch(path.name):
            raise CheckpointError("one shard of a model", place=path, hint=f"name its folder, {path.parent}")
    return path


def _check_folder(folder: pathlib.Path) -> None:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as e:
        raise CheckpointError(f"cannot be read ({e.strerror or e})", place=folder) from e
    if error := _known(folder, names):
        raise error
    groups = hub.weight_groups(names)
    for name in [*(groups[0].files if groups else ()), *filter(hub.TOKENIZER_FILES.fullmatch, names)]:
        check_pointer(folder / name)


def check_pointer(path: pathlib.Path, error: type[Mistral7BError] = CheckpointError) -> None:
    """Raise `error` if a file is a pointer of Git LFS, which a clone without LFS leaves in its place."""
    try:
        with path.open("rb") as f:
            pointer = f.read(len(LFS)) == LFS
    except OSError:
        return  # opening it says why
    if pointer:
        raise error(
            "a Git LFS pointer, not the file itself",
            place=path,
            hint="run `git lfs pull` in its folder, or download the model with `mistral-7b pull OWNER/NAME`",
        )


def check_weight_file(path: pathlib.Path) -> None:
    """Raise CheckpointError, saying what a file is, if it is not safetensors, a pickle of PyTorch or GGUF."""
    check_pointer(path)
    try:
        with path.open("rb") as f:
            head = f.read(16)
    except OSError as e:
        raise CheckpointError(f"cannot be read ({e.strerror or e})", place=path) from e
    if not head:
        raise CheckpointError("empty", place=path, hint="fetch the file again")
    for magic, what, hint in MAGICS:
        if head.startswith(magic):
            raise CheckpointError(f"{what}, not a file of weights", place=path, hint=hint)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
    elif not head.startswith((b"GGUF", b"FUGG", b"\x80")) and len(head) > 8 and head[8:9] != b"{":
        raise CheckpointError(
            "not a file of weights",
            place=path,
            hint="name a folder with config.json, a .safetensors file or a .gguf file",
        )


def _check_zip(path: pathlib.Path) -> None:
    try:
        names = zipfile.ZipFile(path).namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # opening it says why
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(
            "a zip archive, not a file of weights", place=path, hint="unpack it, and name the folder"
        )


def _known(folder: pathlib.Path, names: Sequence[str]) -> CheckpointError | None:
    """Return the error for a folder whose files are known not to be a checkpoint."""
    weights = _weights(names)
    if any(map(ADAPTER.fullmatch, names)) and all(map(ADAPTER.fullmatch, weights)):
        return _adapter_error(folder)
    if "state.pt" in names and "model" in names:
        return CheckpointError("a training folder", place=folder, hint=f"did you mean {folder / 'model'}?")
    shards = [found for n in names if (found := SHARD.fullmatch(n))]
    if shards and len(weights) == len(shards):
        index = f"{shards[0]['stem']}.{shards[0]['suffix']}.index.json"
        if index not in names:
            return CheckpointError(
                f"{len(shards)} shards without {index}",
                place=folder,
                hint=f"fetch {index} from where the shards come from",
            )
    if weights:
        return None
    for pattern, what in FORMATS:
        if any(map(pattern.fullmatch, names)):
            return CheckpointError(f"a model for {what}, which cannot be opened", place=folder, hint=INSTEAD)
    if archives := [n for n in names if ARCHIVE.fullmatch(n)]:
        return CheckpointError(
            f"contains the archive {archives[0]} but no weights",
            place=folder,
            hint="unpack it, and name its folder",
        )
    return None


def _weights(names: Sequence[str]) -> list[str]:
    """Return the names that weights may have; a training's states, which it writes beside them, are none."""
    return [name for name in names if WEIGHT.fullmatch(name) and not STATE.fullmatch(name)]


def _adapter_error(path: pathlib.Path) -> CheckpointError:
    """Return the error for an adapter given as a model; it names the base model, if the adapter does."""
    base = base_model(path if path.is_dir() else path.parent)
    return CheckpointError(
        f"a LoRA adapter for {base}, not a model" if base else "a LoRA adapter, not a model",
        place=path,
        hint=f"name {base or 'its base model'}, and this with --adapter",
    )


def folder_error(folder: pathlib.Path) -> CheckpointError:
    """Return the error for a folder without a configuration or weights: what it lacks and has, and what to do."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return CheckpointError("an empty folder", place=folder, hint="download the model into it again")
    configured, weights = any(c in names for c in CONFIGS), bool(_weights(names))
    if not configured and (inner := _models_below(folder)):
        meant = " or ".join(map(str, inner[:3]))
        return CheckpointError("contains no model itself", place=folder, hint=f"did you mean {meant}?")
    having = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    if weights:
        missing, hint = "config.json or params.json", "fetch it from where the weights come from"
    elif configured:
        missing, hint = (
            "weights (*.safetensors, *.gguf, pytorch_model.bin)",
            "fetch them from the model's repository",
        )
    else:
        missing = "model (config.json and *.safetensors, or *.gguf)"
        hint = "name a model's folder, or a .gguf file"
    return CheckpointError(f"contains no {missing}; it has {having}", place=folder, hint=hint)


def base_model(folder: pathlib.Path) -> str | None:
    """Return the base model that a folder's adapter_config.json names."""
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return base if isinstance(base, str) and base else None


def _models_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the folders one or two levels below that have weights and a configuration, or GGUF files."""
    found, level = [], [folder]
    for _ in range(2):
        level = [sub for above in level for sub in _folders(above)][:SEARCHED]
        for sub in level:
            try:
                names = [entry.name for entry in sub.iterdir()]
            except OSError:
                continue
            weights = _weights(names)
            gguf = [n for n in weights if n.endswith(".gguf")]
            if gguf or (weights and any(c in names for c in CONFIGS)):
                found.append(sub / gguf[0] if len(gguf) == 1 and len(weights) == 1 else sub)
        if found:
            return sorted(found)
    return []


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
