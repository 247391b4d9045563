"""What tests of files share."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from mistral_7b.kernels.cpu import compiler


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """An empty folder as the user's cache. It has the compiled kernels, which take long to compile again."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "mistral-7b").mkdir()
    kernels = compiler.cache_folder()
    kernels.mkdir(parents=True, exist_ok=True)
    (folder / "mistral-7b" / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
