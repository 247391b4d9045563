"""What the JSON files of a folder say about its vocabulary: added tokens, named tokens, ends of generation.

tokenizer_config.json     added_tokens_decoder, bos_token ..., add_bos_token, legacy
special_tokens_map.json   named tokens, unless tokenizer_config.json has an added_tokens_decoder
added_tokens.json         {token: id}, where there is no added_tokens_decoder
config.json, generation_config.json   eos_token_id: a number or a list
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...checkpoint.gguf import file as gguf_file
from ...checkpoint.gguf.file import is_gguf
from ...checkpoint.gguf.vocabulary import ENDS
from ...checkpoint.json_files import read_object
from ...errors import CheckpointError, TokenizerError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_ID = (1 << 24) - 1  # of a token: far more than any model has, and few enough for a list of all
MORE = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of a text before the rest is encoded; the flags are those of `tokenizers`.

    special       a control token
    lstrip        it takes the whitespace before it; rstrip: after it
    normalized    it is searched in the normalized text
    single_word   it stands between non-word characters only
    """

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False

    @staticmethod
    def of(token: int, fields: Mapping[str, Any]) -> AddedToken:
        """Read an entry of added_tokens_decoder or of tokenizer.json's added_tokens."""
        special = bool(fields.get("special", False))
        return AddedToken(
            token, str(fields["content"]), special, bool(fields.get("lstrip", False)),
            bool(fields.get("rstrip", False)), bool(fields.get("normalized", not special)),
            bool(fields.get("single_word", False)),
        )  # fmt: skip

    @property
    def is_markup(self) -> bool:
        """Whether plain text must not become it: it is special, or spelled like <|im_start|>.

        Some fine-tunes add the marks of their turns without the special flag; a user who spells one would
        begin a turn of another role.
        """
        return self.special or (self.content.startswith("<|") and self.content.endswith("|>"))


class TokenizerSettings:
    """The JSON files of one folder, read on first use. TokenizerError names a damaged file."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_object(self.folder / "tokenizer_config.json")

    @cached_property
    def named(self) -> dict[str, str]:
        """The named tokens: {"eos_token": "</s>", ...}."""
        first = (
            {} if "added_tokens_decoder" in self.config else read_object(self.folder / "special_tokens_map.json")
        )
        both = self.config | first
        texts = {name: _content(both.get(name)) for name in NAMED}
        return {name: text for name, text in texts.items() if text}

    @cached_property
    def special(self) -> frozenset[str]:
        """The spellings of all tokens that these files call special by name."""
        names = set(self.named.values())
        for file in (self.config, read_object(self.folder / "special_tokens_map.json")):
            for key in MORE:
                tokens = file.get(key) or ()
                if not isinstance(tokens, (list, tuple, dict)):
                    raise TokenizerError(f"{key} must be a list of tokens", field=key, place=self.folder)
                names.update(map(_content, tokens.values() if isinstance(tokens, dict) else tokens))
        return frozenset(names - {""})

    @cached_property
    def added(self) -> list[AddedToken]:
        """The added tokens, by id."""
        place = self.folder / "tokenizer_config.json"
        try:
            if "added_tokens_decoder" in self.config:
                entries = self.config["added_tokens_decoder"].items()
                tokens = [AddedToken.of(int(i), fields) for i, fields in entries]
            else:
                place = self.folder / "added_tokens.json"
                tokens = [
                    AddedToken(int(i), text, text in self.special, normalized=text not in self.special)
                    for text, i in read_object(place).items()
                ]
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise TokenizerError(f"its added tokens cannot be read ({e!r})", place=place) from e
        if wrong := [t for t in tokens if not 0 <= t.id <= MAX_ID or not t.content]:
            raise TokenizerError(f"added token {wrong[0].content!r} has the id {wrong[0].id}", place=place)
        return sorted(tokens, key=lambda token: token.id)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end generation according to config.json and generation_config.json."""
        return frozenset().union(*(
            _ids(read_object(self.folder / name).get("eos_token_id"))
            for name in ("config.json", "generation_config.json")
        ))  # fmt: skip

    def config_id(self, name: str) -> int | None:
        """Return the first id that config.json gives for "bos_token_id" or "eos_token_id"."""
        ids = _ids(read_object(self.folder / "config.json").get(name))
        return min(ids, default=None)


def stop_ids_of(source: pathlib.Path) -> frozenset[int]:
    """Return the ids that end generation by a model's files: its folder, a file in it, or a GGUF file."""
    if not (source.is_file() and is_gguf(source)):
        return TokenizerSettings(source if source.is_dir() else source.parent).stop_ids
    try:
        metadata = gguf_file.read(source).metadata
    except CheckpointError as e:
        raise TokenizerError.of(e) from e
    return frozenset().union(*(_ids(metadata.get(f"tokenizer.ggml.{name}_token_id")) for name in ENDS))


def damaged(path: pathlib.Path, told: str) -> TokenizerError:
    """Return the error for a file that cannot be used."""
    return TokenizerError(told, place=path, hint="fetch it again from the model's repository")


def _content(token: Any) -> str:
    """Return the spelling of a named token: a text, or an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _ids(value: Any) -> frozenset[int]:
    """Return the ids of an eos_token_id: a number, a list or null. Anything else says nothing."""
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return frozenset(i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0)
