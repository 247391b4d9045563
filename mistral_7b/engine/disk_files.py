"""Files of the prefix cache on disk: one full KV page a file.

    folder/SPACE/KEY.kv    magic (8 bytes) | key (32) | CRC-32 of key and contents (4) | contents (page_bytes)

SPACE names everything that changes the contents besides the tokens (fingerprint.py), KEY is a chain of SHA-256
hashes over the tokens. A file is immutable and appears by a rename, so that processes share the folder without
locks: a file of some name is right, or it is damaged, which its length, key and checksum show. A damaged file is
removed. Any file may vanish at any time.

A file of one page, 2 MiB for Mistral 7B in bfloat16, is read about as fast as one of 16 pages, and any two prompts
share all whole pages that they have in common. CRC-32 finds accidental damage at three times the speed of SHA-256.
Files are not synced: one that a power failure has emptied fails its checksum.

All files of a folder together are at most `most` bytes. The modification time is the time of the last use, and the
files used longest ago are removed first. A page's time is later than that of the pages after it in the prompt, so
that a prefix shrinks from its end. With several processes the sum may exceed `most` by 5% per process until one
recounts.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Sequence

from ..errors import ConfigError, WriteError
from ..files import ADVICE

MAGIC = b"M7B-KV01"
HEADER = len(MAGIC) + 32 + 4
SPACE, FILE = re.compile("[0-9a-f]{16}"), re.compile("[0-9a-f]{64}[.]kv")  # nothing else is ever removed
TEMPORARY = re.compile("[.](?P<host>.+)-(?P<pid>[0-9]+)-[0-9a-f]{8}[.]partial")
TRIM_TO = 0.9  # of the bound: the size to which files are removed
RECOUNT_AFTER = 0.05  # of the bound: bytes written before all processes' files are counted again
STALE = 3600  # seconds until a temporary file of another machine is taken for abandoned
TIME_STEP = 1_000_000  # nanoseconds between the times of two neighboring pages


def check_folder(folder: str | os.PathLike[str]) -> str:
    """Make a prefix cache's folder, and return its path. WriteError if it cannot be written to."""
    root = os.path.abspath(os.path.expanduser(os.fspath(folder)))
    attempt = os.path.join(root, _partial_name())
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        with open(attempt, "wb", opener=_private) as file:
            file.write(MAGIC)
    except OSError as error:
        raise WriteError(
            f"the prefix cache cannot be kept there ({error.strerror or error})",
            field="prefix_cache",
            place=root,
            hint=ADVICE.get(error.errno or 0, "name a folder that you may write to"),
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(attempt)
    return root


class PageFiles:
    """The files of one space, each with `page_bytes` of contents. WriteError if `folder` cannot be written to.

    `read` and `touch` may be called by any thread, the others by one.
    """

    def __init__(self, folder: str | os.PathLike[str], space: str, page_bytes: int, most: int) -> None:
        self.size, self.most = HEADER + page_bytes, most
        if most < self.size:
            raise ConfigError(
                f"{most} bytes hold no page of keys and values, of {self.size}", field="prefix_cache_bytes"
            )
        self.root = check_folder(folder)
        self.folder = os.path.join(self.root, space)
        self._partial = os.path.join(self.folder, _partial_name())
        self._total: int | None = None  # bytes of all files, as far as is known
        self._unseen = 0  # bytes written since they were counted

    def path(self, key: bytes) -> str:
        """The file of a page."""
        return os.path.join(self.folder, f"{key.hex()}.kv")

    def touch(self, keys: Sequence[bytes], now: int) -> list[bool]:
        """Mark the pages of a prompt as used at the time `now` (ns); whether there is a file of each."""
        return [_touched(self.path(key), now - i * TIME_STEP) for i, key in enumerate(keys)]

    def read(self, key: bytes, contents: memoryview) -> bool:
        """Fill `contents` from a page's file; False if there is none, or it is damaged, which removes it."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                whole = os.fstat(file.fileno()).st_size == self.size
                header = file.read(HEADER)
                whole = whole and file.readinto(contents) == len(contents)
            if whole and header == _header(key, contents):
                return True
            os.unlink(path)
        except OSError:
            pass
        return False

    def write(self, key: bytes, contents: memoryview, now: int) -> int:
        """Write a page's file, used at the time `now` (ns). Returns its bytes: 0 if there is no need or no room.

        Raises OSError if the system refuses.
        """
        path = self.path(key)
        if os.path.exists(path) or not self._make_room():
            return 0
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            with open(self._partial, "wb", opener=_private) as file:
                file.write(_header(key, contents))
                file.write(contents)
            os.utime(self._partial, ns=(now, now))
            os.replace(self._partial, path)
        except FileNotFoundError:  # the folder was removed meanwhile
            return 0
        finally:
            with contextlib.suppress(OSError):
                os.unlink(self._partial)
        self._total = (self._total or 0) + self.size
        self._unseen += self.size
        return self.size

    def _make_room(self) -> bool:
        """Keep the bound with one file more; False if it cannot be kept."""
        if self._total is None or self._unseen > RECOUNT_AFTER * self.most or self._total + self.size > self.most:
            self.trim(self.size)
        assert self._total is not None
        return self._total + self.size <= self.most

    def trim(self, more: int = 0) -> None:
        """Remove abandoned temporary files and, where all files and `more` exceed the bound, those used least."""
        files: list[tuple[int, int, str]] = []
        spaces: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            spaces = [os.path.join(self.root, name) for name in os.listdir(self.root) if SPACE.fullmatch(name)]
        for folder in (self.root, *spaces):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # another process has removed it
                        found = entry.stat(follow_symlinks=False)
                        if FILE.fullmatch(entry.name):
                            files.append((found.st_mtime_ns, found.st_size, entry.path))
                        elif (owner := TEMPORARY.fullmatch(entry.name)) and _abandoned(owner, found.st_mtime):
                            os.unlink(entry.path)
        total = sum(size for _, size, _ in files)
        if total + more > self.most:
            goal = min(int(self.most * TRIM_TO), self.most - more)
            for _, size, path in sorted(files):
                if total <= goal:
                    break
                with contextlib.suppress(OSError):
                    _remove(path)
                    total -= size
        self._total, self._unseen = total, 0


def _abandoned(owner: re.Match[str], modified: float) -> bool:
    """Whether the process that wrote a temporary file is dead; of another machine: probably."""
    if owner["host"] != socket.gethostname():
        return time.time() - modified > STALE
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def _partial_name() -> str:
    """A name for a temporary file that says which process it belongs to."""
    return f".{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.partial"


def _private(path: str, flags: int) -> int:
    """Open a file that only its owner can read: a prompt can be told from its keys and values."""
    return os.open(path, flags, 0o600)


def _header(key: bytes, contents: memoryview) -> bytes:
    return MAGIC + key + zlib.crc32(contents, zlib.crc32(key)).to_bytes(4, "little")


def _touched(path: str, now: int) -> bool:
    try:
        os.utime(path, ns=(now, now))
    except PermissionError:  # another user's
        return os.path.exists(path)
    except OSError:
        return False
    return True


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
