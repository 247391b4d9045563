"""A name -> a folder on this machine, downloading what is needed and no more. Imports no torch.

Everything goes through huggingface_hub, so HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold, files
land in its cache once for all programs, and a broken connection is resumed where it broke.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import CheckpointError, HubError, WriteError, first_line
from ..files import ADVICE, refusal_in

DEMO = pathlib.Path(__file__).parent.parent / "demo"
REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
FILE_ID = re.compile(rf"(?P<repo>{REPO_ID.pattern})/(?P<file>[\w.-]+(/[\w.-]+)*\.gguf)", re.ASCII)

TOKENIZER_FILES = re.compile(
    r"tokenizer\.model(\.v\w+)?|tokenizer\.json|tekken\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja"
)
SENTENCEPIECE = re.compile(r"tokenizer\.model(\.v(?P<version>\d+)(m\d+)?)?")
STEMS = (  # of weights, those that are preferred first
    ("model", "safetensors"),
    ("consolidated", "safetensors"),
    ("pytorch_model", "bin"),
    ("quantized", "safetensors"),
)
CONFIG_FILES = ("config.json", "params.json", "generation_config.json")


class WeightGroup(NamedTuple):
    """A whole copy of the weights: the file to open it by (itself, or its shards' index), and all its files."""

    door: str
    files: list[str]


def weight_groups(names: Iterable[str]) -> list[WeightGroup]:
    """The copies of the weights among these file names, the preferred one first.

    safetensors before pickles, and Hugging Face's before Mistral's own: the order of transformers.
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
    if not groups:  # a name of someone's own: open it if there is no choice to make
        alone = [n for n in names if n.endswith((".safetensors", ".pth", ".bin", ".gguf"))]
        groups = [WeightGroup(alone[0], alone)] if len(alone) == 1 else []
    return groups


def needed_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files those to download: one copy of the weights, configurations, tokenizers."""
    names = list(names)
    groups = weight_groups(names)
    small = [n for n in names if n in CONFIG_FILES or TOKENIZER_FILES.fullmatch(n)]
    return sorted([*small, *groups[0].files]) if groups else []


def is_whole(folder: pathlib.Path, group: WeightGroup) -> bool:
    """Whether every file of a copy of the weights is in the folder, by its index if it has one."""
    if not group.door.endswith(".json"):
        return (folder / group.door).is_file()
    try:
        shards = set(json.loads((folder / group.door).read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def sentencepiece_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer file of a folder: of several, the one whose name has the highest version."""
    files = [f for f in folder.iterdir() if SENTENCEPIECE.fullmatch(f.name)] if folder.is_dir() else []
    if not files:
        return None
    return max(files, key=lambda f: int(SENTENCEPIECE.fullmatch(f.name)["version"] or 0))  # type: ignore[index]


def resolve(source: str | os.PathLike[str] = "demo") -> pathlib.Path:
    """The folder or file that a name means: "demo" the bundled model, a path itself, else a hub id.

    A hub id ("owner/name", or "owner/name/FILE.gguf" for one file of it) is downloaded unless its files are
    here already. Raises HubError if that fails, CheckpointError if the name is neither.
    """
    if source == "demo":
        return DEMO
    path = pathlib.Path(source).expanduser()
    if source != "" and path.exists():
        return path
    if isinstance(source, str) and (named := FILE_ID.fullmatch(source)):
        return pull(named["repo"], file=named["file"])
    if not isinstance(source, str) or not REPO_ID.fullmatch(source):
        raise CheckpointError("no such file or folder (a model on the hub is named owner/name)", place=source)
    return pull(source)


def pull(repo_id: str, revision: str = "main", file: str | None = None) -> pathlib.Path:
    """Download a model from the hub, and return its folder in the cache, or that `file` of it if one is named.

    Only what is needed (see `needed_files`), resuming what was begun; progress bars go to stderr unless
    HF_HUB_DISABLE_PROGRESS_BARS is set. Without a connection, the copy in the cache is returned if it is
    whole. Raises HubError, saying what to do, if the model is gated, missing, or out of reach.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise HubError(f"{repo_id!r} is no name of a model on the hub: owner/name is wanted", field="repo_id")
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        listing = huggingface_hub.HfApi().model_info(repo_id, revision=revision).siblings or []
        names = [file.rfilename for file in listing]
        wanted = _wanted(repo_id, names, file)
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
        return pathlib.Path(folder, file or "")
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
    # Whatever else the client library and its transport raise is a connection that did not work.
    except Exception as e:
        if (refusal := refusal_in(e)) is not None and refusal.errno in ADVICE:
            raise WriteError(
                f"{repo_id} could not be written to {constants.HF_HUB_CACHE} ({refusal.strerror})",
                hint=f"{ADVICE[refusal.errno]} with HF_HOME; the files that have arrived are kept",
            ) from e
        if found := _cached(repo_id, revision, file):
            return found
        if isinstance(e, errors.OfflineModeIsEnabled):
            raise HubError(
                f"{repo_id} is not (wholly) in the cache at {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set",
                hint=f"unset it and run `mistral-7b pull {repo_id}`",
            ) from e
        raise HubError(
            f"{repo_id} could not be downloaded from {constants.ENDPOINT}: {first_line(e)}",
            hint="check the connection and run it again; the files that have arrived are kept",
        ) from e


def _wanted(repo_id: str, names: list[str], file: str | None) -> list[str]:
    """Of a repository's files those to download: that which was named, or what its one model needs."""
    if file is not None:
        if file not in names:
            raise HubError(f"{repo_id} holds no {file}; it holds {', '.join(names[:20])}", field="file")
        return [file]
    if wanted := needed_files(names):
        return wanted
    if found := [name for name in names if name.endswith(".gguf")]:
        raise HubError(f"{repo_id} holds {len(found)} GGUF files", hint=f"name one, such as {repo_id}/{found[0]}")
    raise HubError(f"{repo_id} holds no weights that can be opened here; it holds {', '.join(names[:20])}")


def _cached(repo_id: str, revision: str, file: str | None) -> pathlib.Path | None:
    """The folder of a model in the cache, if its weights are all there, or that file of it."""
    import huggingface_hub

    for name in (file,) if file else ("config.json", "params.json"):
        found = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            folder = pathlib.Path(found).parent
            if file:
                return pathlib.Path(found)
            if any(is_whole(folder, group) for group in weight_groups(os.listdir(folder))):
                return folder
    return None
