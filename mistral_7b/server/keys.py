"""API keys and the limits of each. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ConfigError

LIMITS = {"requests": "requests_per_minute", "tokens": "tokens_per_minute", "concurrent": "max_concurrent"}


@dataclass(frozen=True)
class ApiKey:
    """An API key. ConfigError for one that no header can carry.

    Attributes:
        key: printable ASCII, without spaces at either end
        name: its label in logs and metrics; "": the beginning of its hash
        priority: whether its requests may set `priority`
        requests_per_minute, tokens_per_minute, max_concurrent: None: the server's limits per key
    """

    key: str = field(repr=False)
    name: str = ""
    priority: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        key = self.key
        if not (isinstance(key, str) and key.isascii() and key.isprintable() and key.strip() == key and key):
            raise ConfigError(
                "a key consists of printable ASCII characters, without spaces at either end", field="api_keys"
            )

    @property
    def label(self) -> str:
        """Its name, or one from which the key cannot be found."""
        return self.name or f"key-{hashlib.sha256(self.key.encode()).hexdigest()[:8]}"

    @classmethod
    def parse(cls, line: str, place: str) -> ApiKey:
        """Read `KEY [name=TEXT] [priority] [requests=N] [tokens=N] [concurrent=N]`. ConfigError with the place."""
        key, *options = line.split()
        values: dict[str, str | int | bool] = {}
        for option in options:
            name, _, value = option.partition("=")
            if option == "priority":
                values["priority"] = True
            elif name == "name" and value:
                values["name"] = value
            elif name in LIMITS and value.isdigit() and int(value) > 0:
                values[LIMITS[name]] = int(value)
            else:
                raise ConfigError(
                    f"{option!r:.40} is not an option of a key",
                    place=place,
                    hint="write KEY [name=TEXT] [priority] [requests=N] [tokens=N] [concurrent=N], N a minute",
                )
        return cls(key, **values)  # type: ignore[arg-type]


def read_keys(given: Sequence[str | ApiKey], file: str, variable: str) -> tuple[ApiKey, ...]:
    """Collect keys from flags, a file (see ApiKey.parse, one per line) and an environment variable.

    In a file, # begins a comment at the start of a line or after a space. OSError for a file that cannot be read.
    ConfigError for a file without keys and for a blank variable: the server would be open to all.
    """
    keys = [key if isinstance(key, ApiKey) else ApiKey(key) for key in given]
    if file:
        keys += _keys_in(pathlib.Path(file))
    value = os.environ.get(variable)
    if value is not None and not value.strip():
        raise ConfigError(f"{variable} is set and blank", field=variable, hint="unset it, or set it to a key")
    if value:
        keys.append(ApiKey(value.strip()))
    return tuple({key.key: key for key in reversed(keys)}.values())[::-1]


def _keys_in(file: pathlib.Path) -> list[ApiKey]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError("is not UTF-8 text", place=file, hint="write one key per line") from e
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if line := f" {line}".replace("\t", " ").partition(" #")[0].strip():
            keys.append(ApiKey.parse(line, f"{file}, line {number}"))
    if not keys:
        raise ConfigError("contains no key", place=file, hint="write one key per line")
    if os.name == "posix" and file.stat().st_mode & stat.S_IROTH:
        logging.getLogger("mistral_7b.server").warning("%s is readable by every user: chmod 600", file)
    return keys
