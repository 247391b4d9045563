"""Atomic file writes, and errors of the file system as WriteError."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator

from .errors import WriteError

ADVICE = {  # errno of a failed write -> hint
    errno.ENOSPC: "free some space there, or name another place",
    errno.EDQUOT: "free some of what you are allowed there, or name another place",
    errno.EFBIG: "raise the limit (ulimit -f), or name a place whose files may be larger",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "name a place that you may write to",
    errno.EPERM: "name a place that you may write to",
}

PARTIAL = re.compile(r"\.partial-(\d+)-[0-9a-f]{8}")  # after a dot and the name; with the process that writes it
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """Parse a size such as "5GB" (10^9) or "5GiB" (2^30); 0 if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    return int(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], folders: bool = False) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, else remove it.

    `folders` creates missing parent folders. Raises WriteError if the system refuses the write, even if a library
    wraps that error in its own.
    """
    target = pathlib.Path(path).expanduser()
    with _beside(target) as beside:
        if folders:
            beside.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(target)
        yield beside
        os.replace(beside, target)


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise WriteError unless a file can be written there; called before the work whose result it will hold."""
    target = pathlib.Path(path).expanduser()
    if target.is_dir():
        raise WriteError("cannot be written: it is a folder", place=path, hint="name a file")
    with _beside(target) as beside:
        beside.touch()


@contextlib.contextmanager
def _beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside `target`; remove what is left there. The system's errors become WriteError."""
    beside = partial_name(target)
    try:
        yield beside
    except Exception as error:
        raise_write_error(error, target, beside)
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def partial_name(target: pathlib.Path) -> pathlib.Path:
    """A new temporary name beside `target`, which `remove_left_over` recognizes."""
    return target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def abandoned_name(target: pathlib.Path) -> pathlib.Path:
    """A temporary name beside `target` that no process uses, for what the next one is to continue."""
    return target.with_name(f".{target.name}.partial-0-{secrets.token_hex(4)}")


def abandoned(target: pathlib.Path) -> list[pathlib.Path]:
    """The temporary files and folders of `target` whose processes have ended; errors are ignored."""
    out = []
    with contextlib.suppress(OSError):
        for path in target.absolute().parent.iterdir():
            found = PARTIAL.fullmatch(path.name.removeprefix(f".{target.name}"))
            if found and not _runs(int(found[1])):
                out.append(path)
    return out


def remove_left_over(target: pathlib.Path) -> None:
    """Remove the temporary files and folders of `target` that killed processes have left; errors are ignored."""
    for path in abandoned(target):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process with this number exists; assumed where it cannot be told. 0 is none's."""
    if pid == 0:
        return False
    if os.name != "posix":
        return True  # there os.kill ends the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def check_room(path: pathlib.Path, needed: int) -> None:
    """Raise WriteError unless `needed` bytes are free on the disk of `path`."""
    place = next(p for p in path.absolute().parents if p.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise WriteError(
            f"{megabytes(needed)} are needed and {megabytes(free)} are free",
            place=path,
            hint=ADVICE[errno.ENOSPC],
        )


def megabytes(n: int) -> str:
    """Format a number of bytes: 14,483.5 MB is 14.4835e9."""
    return f"{n / 1e6:,.1f} MB"


def raise_write_error(error: Exception, path: pathlib.Path, beside: pathlib.Path) -> None:
    """Raise WriteError if `error` is a failed write of `path` (or its temporary `beside`)."""
    refusal = write_error_in(error)
    if refusal is None:
        return
    if refusal.filename is not None:
        named = pathlib.Path(os.fsdecode(refusal.filename)).absolute()
        places = (path.absolute(), beside.absolute())
        if not any(place.is_relative_to(named) or named.is_relative_to(place) for place in places):
            return  # an error about another file, which it names
    raise WriteError(
        f"cannot be written ({refusal.strerror or refusal}); nothing half-written was left there",
        place=path,
        hint=ADVICE.get(refusal.errno or 0),
    ) from error


def write_error_in(error: BaseException) -> OSError | None:
    """Return the OSError that an error is or was caused by: torch wraps it in its own."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and (found is error or found.errno in ADVICE):
            return found
        found = found.__cause__ or found.__context__
    return None
