"""The tokenizer files beside weights: which there are, and how they are copied to another checkpoint.

Everything that a model's tokenizer, chat template and ends consist of is carried from one layout to another
unchanged: a folder's files as they are, those of a GGUF file as gguf/tokenizer.py writes them. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import TokenizerError
from . import hub
from .gguf import tokenizer as gguf_tokenizer
from .gguf.file import is_gguf
from .gguf.file import read as read_gguf
from .gguf.vocabulary import KINDS, MODEL
from .json_files import object_in, read_object

GENERATION = "generation_config.json"
IDS = {"bos_token_id": 1, "eos_token_id": 2}  # Mistral's, where a source does not say otherwise


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """Files by name, and `bos_token_id` and `eos_token_id` (a number, a list or None) of config.json."""

    files: Mapping[str, bytes]
    ids: Mapping[str, Any]

    @classmethod
    def of(cls, source: pathlib.Path | None) -> TokenizerFiles:
        """Return those of a folder or a GGUF file; none for None."""
        if source is not None and is_gguf(source):
            metadata = read_gguf(source).metadata
            files = _extracted(source, metadata)
            return cls(files, _ids(files, gguf_tokenizer.config_ids(metadata)))
        if source is None or not source.is_dir():
            return cls({}, IDS)
        inside = [*source.iterdir(), *(source / "additional_chat_templates").glob("*.jinja")]
        files = {
            name: _content(entry)
            for entry in sorted(inside)
            if (name := entry.relative_to(source).as_posix()) == GENERATION or hub.TOKENIZER_FILES.fullmatch(name)
            if entry.is_file()
        }
        return cls(files, _ids(files, read_object(source / "config.json")))

    def write(self, folder: pathlib.Path, format: str) -> None:
        """Write the files to a new checkpoint.

        transformers knows the SentencePiece file as tokenizer.model, without the version that mistral-common
        needs; as in Mistral's repositories of v0.3 there are then both. Every layout of Hugging Face has a
        generation_config.json. Mistral's has no other place for ids that differ from Mistral's own, so that it
        then has one too, with all ends.
        """
        files = dict(self.files)
        if format == "huggingface" and not files.keys() & {"tokenizer.model", "tokenizer.json"}:
            pieces = [content for name, content in files.items() if hub.SENTENCEPIECE.fullmatch(name)]
            files |= {"tokenizer.model": pieces[-1]} if pieces else {}
        usual = _json({"_from_model_config": True, **IDS})
        if format != "mistral":
            files.setdefault(GENERATION, _json({"_from_model_config": True, **self.ids}))
        elif files.get(GENERATION, usual) == usual and dict(self.ids) == IDS:
            files.pop(GENERATION, None)
        else:
            generation = object_in(files.get(GENERATION, b"{}")) or {"_from_model_config": True}
            ends = [i for d in (generation, self.ids) for i in _list(d.get("eos_token_id"))]
            if set(ends) - set(_list(generation.get("eos_token_id"))):
                generation["eos_token_id"] = ends[0] if len(set(ends)) == 1 else list(dict.fromkeys(ends))
                generation.setdefault("bos_token_id", self.ids.get("bos_token_id"))
                files[GENERATION] = _json(generation)
        TokenizerFiles(files, self.ids).copy_to(folder)

    def copy_to(self, folder: pathlib.Path) -> None:
        """Write the files as they are."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def _content(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise TokenizerError(f"cannot be read ({e.strerror})", place=path) from e


def _extracted(source: pathlib.Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the tokenizer files of a GGUF file; none, with a warning, if it is of an unknown kind."""
    kind = metadata.get(MODEL)
    if kind in KINDS:
        return gguf_tokenizer.files(source, metadata)
    if kind not in (None, "none", "no_vocab"):
        warnings.warn(f"{source}: the tokenizer is {kind!r}, which is not converted", stacklevel=2)
    return {}


def _ids(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids for config.json: what the source's says, else its generation_config.json, else Mistral's."""
    generation = object_in(files.get(GENERATION, b"{}"))
    return {name: config.get(name, generation.get(name, default)) for name, default in IDS.items()}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
