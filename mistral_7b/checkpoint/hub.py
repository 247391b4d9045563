"""Resolve a model name to a local path, downloading only the files needed. Imports no torch.

Downloads use huggingface_hub: HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply, files are stored in
its shared cache, and an interrupted download resumes.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import CheckpointError, HubError, WriteError, first_line
from ..files import ADVICE, write_error_in
from . import starter
from .gguf.splits import first_part, part_names

DEMO = pathlib.Path(__file__).parent.parent / "demo"
REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
FILE_ID = re.compile(rf"(?P<repo>{REPO_ID.pattern})/(?P<file>[\w.-]+(/[\w.-]+)*\.gguf)", re.ASCII)

TOKENIZER_FILES = re.compile(
    r"tokenizer\.model(\.v\w+)?|tokenizer\.json|tekken\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
)
TOKENIZER_NAMES = (  # the usual ones of these
    "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v2", "tokenizer.model.v3", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
SENTENCEPIECE = re.compile(r"tokenizer\.model(\.v(?P<version>\d+)(m\d+)?)?")
STEMS = (  # (stem, suffix) of weight files, in order of preference
    ("model", "safetensors"),
    ("consolidated", "safetensors"),
    ("pytorch_model", "bin"),
    ("quantized", "safetensors"),
)
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")  # of early AutoGPTQ and AutoAWQ
CONFIG_FILES = ("config.json", "params.json", "generation_config.json", *QUANTIZATION_FILES)
ADAPTER_FILES = ("adapter_model.safetensors", "lora.safetensors", "adapter_model.bin")  # in order of preference
ADAPTER_CONFIGS = ("adapter_config.json", "params.json")


class WeightGroup(NamedTuple):
    """A complete copy of the weights: the file to open (weights or shard index), and all files."""

    entry_file: str
    files: list[str]


def weight_groups(names: Iterable[str]) -> list[WeightGroup]:
    """Return the copies of the weights among these file names, in order of preference.

    As in transformers, safetensors precede pickles, and Hugging Face's layout precedes Mistral's.
    """
    names = sorted(names)
    groups = []
    for stem, suffix in STEMS:
        if stem == "pytorch_model" and "consolidated.00.pth" in names:
            groups.append(WeightGroup("consolidated.00.pth", ["consolidated.00.pth"]))
        if f"{stem}.{suffix}" in names:
            groups.append(WeightGroup(f"{stem}.{suffix}", [f"{stem}.{suffix}"]))
        if (index := f"{stem}.{suffix}.index.json") in names:
            shards = [n for n in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", n)]
            groups.append(WeightGroup(index, [index, *shards]))
    if not groups:  # a non-standard name is unambiguous if it is the only one
        alone = _models(n for n in names if n.endswith((".safetensors", ".pth", ".bin", ".gguf")))
        groups = alone if len(alone) == 1 else []
    return groups


def gguf_models(names: Iterable[str]) -> list[str]:
    """Return the GGUF models among these file names: files, and of split ones the first part."""
    return [group.entry_file for group in _models(sorted(n for n in names if n.endswith(".gguf")))]


def _models(names: Iterable[str]) -> list[WeightGroup]:
    """Group sorted file names by model: the parts of a split GGUF file are one."""
    models: dict[str, list[str]] = {}
    for name in names:
        models.setdefault((part_names(name) or [name])[0], []).append(name)
    return [WeightGroup(files[0], files) for files in models.values()]


def needed_files(names: Iterable[str]) -> list[str]:
    """Select the files to download: one copy of the weights, configurations, tokenizers."""
    names = list(names)
    groups = weight_groups(names)
    small = [n for n in names if n in CONFIG_FILES or TOKENIZER_FILES.fullmatch(n)]
    return sorted([*small, *groups[0].files]) if groups else []


def adapter_files(names: Iterable[str]) -> list[str]:
    """Select the files of a LoRA adapter: one copy of its factors, its configuration, its tokenizer."""
    names = list(names)
    groups = [[name] for name in ADAPTER_FILES if name in names]
    if not groups and not weight_groups(n for n in names if not n.endswith(".gguf")):
        alone = [n for n in names if n.endswith(".gguf")]
        groups = [alone] if len(alone) == 1 else []
    small = [n for n in names if n in ADAPTER_CONFIGS or TOKENIZER_FILES.fullmatch(n)]
    return sorted([*small, *groups[0]]) if groups else []


def is_complete(folder: pathlib.Path, group: WeightGroup) -> bool:
    """Return whether all files of a weight group are in the folder, including indexed shards."""
    if not group.entry_file.endswith(".json"):
        return (folder / group.entry_file).is_file()
    try:
        shards = set(json.loads((folder / group.entry_file).read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def sentencepiece_file(folder: pathlib.Path) -> pathlib.Path | None:
    """Return the SentencePiece file of a folder, that of the highest version if there are several."""
    files = [f for f in folder.iterdir() if SENTENCEPIECE.fullmatch(f.name)] if folder.is_dir() else []
    if not files:
        return None
    return max(files, key=lambda f: int(SENTENCEPIECE.fullmatch(f.name)["version"] or 0))  # type: ignore[index]


def resolve(source: str | os.PathLike[str] = "demo") -> pathlib.Path:
    """Return the local path of a model: "demo" (the bundled model), "starter", a path, or a hub id.

    A hub id is "owner/name", or "owner/name/FILE.gguf" for one file of a repository. It is downloaded unless
    it is in the cache, and so is the starter model (starter.py). A folder of the name of a known model is reached
    as ./demo or ./starter. For any part of a split GGUF file, the path is that of the first. Raises HubError if
    the download fails, CheckpointError if the name is none of these.
    """
    if source == "starter":
        return starter.resolve()
    if (path := find(source)) is not None:
        return path
    if named := FILE_ID.fullmatch(str(source)):
        return pull(named["repo"], file=named["file"])
    return pull(str(source))


def find(source: str | os.PathLike[str]) -> pathlib.Path | None:
    """Return the path of a model on this machine; None for one to download. CheckpointError for neither."""
    if source == "demo":
        return DEMO
    if source == "starter":
        return starter.cached()
    path = pathlib.Path(source).expanduser()
    if source != "" and path.exists():
        return first_part(path)
    if not isinstance(source, str) or not (REPO_ID.fullmatch(source) or FILE_ID.fullmatch(source)):
        raise CheckpointError("no such file or folder (a model on the hub is named owner/name)", place=source)
    return None


def resolve_adapter(source: str | os.PathLike[str]) -> pathlib.Path:
    """Return the local path of a LoRA adapter: a path, or a hub id as in `resolve`, which is downloaded.

    Raises HubError if the download fails, CheckpointError if the name is neither.
    """
    if (path := find_adapter(source)) is not None:
        return path
    if named := FILE_ID.fullmatch(str(source)):
        return pull(named["repo"], file=named["file"])
    return pull(str(source), adapter=True)


def find_adapter(source: str | os.PathLike[str]) -> pathlib.Path | None:
    """Return the path of an adapter on this machine; None for one to download. CheckpointError for neither."""
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and (REPO_ID.fullmatch(source) or FILE_ID.fullmatch(source)):
        return None
    raise CheckpointError(
        "no such file or folder (an adapter on the hub is named owner/name)",
        place=source,
        hint="name the folder or file of an adapter",
    )


def pull(repo_id: str, revision: str = "main", file: str | None = None, adapter: bool = False) -> pathlib.Path:
    """Download a model, or a LoRA `adapter`; return its folder in the cache, or the path of `file` if given.

    Downloads only the files in `needed_files` or `adapter_files`, and resumes partial downloads. Progress bars go
    to stderr unless HF_HUB_DISABLE_PROGRESS_BARS is set. Without a connection, a complete cached copy is returned.
    Raises HubError, with a hint, if the repository is gated, missing or unreachable.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise HubError(f"{repo_id!r} is not a name on the hub: use owner/name", field="repo_id")
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        listing = huggingface_hub.HfApi().model_info(repo_id, revision=revision).siblings or []
        names = [file.rfilename for file in listing]
        wanted = _wanted(repo_id, names, file, adapter)
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
        return first_part(pathlib.Path(folder, file)) if file else pathlib.Path(folder)
    except HubError:
        raise
    except errors.GatedRepoError as e:
        raise HubError(
            f"{repo_id} is gated",
            hint=f"accept its terms at {constants.ENDPOINT}/{repo_id}, then log in with `hf auth login` (or set "
            "HF_TOKEN) and try again",
        ) from e
    except errors.RevisionNotFoundError as e:
        raise HubError(f"{repo_id} has no revision {revision!r}", field="revision") from e
    except errors.RepositoryNotFoundError as e:
        raise HubError(
            f"{repo_id}: no such folder here, and no such model at {constants.ENDPOINT}",
            hint="if it is private, log in with `hf auth login` or set HF_TOKEN",
        ) from e
    # Every other error of the client library and its transport is treated as a failed connection.
    except Exception as e:
        if (refusal := write_error_in(e)) is not None and refusal.errno in ADVICE:
            raise WriteError(
                f"{repo_id} could not be written to {constants.HF_HUB_CACHE} ({refusal.strerror})",
                hint=f"{ADVICE[refusal.errno]} with HF_HOME; completed files are kept",
            ) from e
        if found := _cached(repo_id, revision, file, adapter):
            return found
        if isinstance(e, errors.OfflineModeIsEnabled):
            raise HubError(
                f"{repo_id} is not completely in the cache at {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set",
                hint=f"unset it and run `mistral-7b pull {repo_id}{' --adapter' if adapter else ''}`",
            ) from e
        raise HubError(
            f"{repo_id} could not be downloaded from {constants.ENDPOINT}: {first_line(e)}",
            hint="check the connection and run it again; completed files are kept",
        ) from e


def _wanted(repo_id: str, names: list[str], file: str | None, adapter: bool) -> list[str]:
    """Return the files to download: `file` if given, with all parts, else those of the one model or adapter."""
    if file is not None:
        if file not in names:
            raise HubError(f"{repo_id} has no file {file}; it has {', '.join(names[:20])}", field="file")
        return [part for part in part_names(file) or [file] if part in names]
    model, lora = needed_files(names), adapter_files(names)
    if wanted := lora if adapter else model:
        return wanted
    if adapter and model:
        raise HubError(f"{repo_id} is a model, not a LoRA adapter", hint="name it as the model")
    if lora and not adapter:
        raise HubError(
            f"{repo_id} is a LoRA adapter, not a model", hint="name its base model, and this with --adapter"
        )
    if found := gguf_models(names):
        raise HubError(f"{repo_id} has {len(found)} GGUF files", hint=f"name one, such as {repo_id}/{found[0]}")
    what = "adapter" if adapter else "weights"
    raise HubError(f"{repo_id} has no {what} in a supported format; it has {', '.join(names[:20])}")


def _cached(repo_id: str, revision: str, file: str | None, adapter: bool) -> pathlib.Path | None:
    """Return the cached folder of a model or an adapter, or `file` in it; None if it is incomplete."""
    import huggingface_hub

    for name in (file,) if file else ADAPTER_FILES if adapter else ("config.json", "params.json"):
        found = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            folder = pathlib.Path(found).parent
            if file:
                return first_part(pathlib.Path(found))
            if adapter and adapter_files(os.listdir(folder)):
                return folder
            if any(is_complete(folder, group) for group in weight_groups(os.listdir(folder))):
                return folder
    return None
