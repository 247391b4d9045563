"""What tests expect of an error: its class and its data. Its words may change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from mistral_7b.errors import Mistral7BError


@contextlib.contextmanager
def refused(
    *kinds: type[Mistral7BError], field: str | None = None, place: str | os.PathLike[str] | None = None
) -> Iterator[pytest.ExceptionInfo[Mistral7BError]]:
    """pytest.raises for an error of one of these classes, about this field and this place where they are given."""
    with pytest.raises(kinds) as caught:
        yield caught
    error = caught.value
    assert field is None or error.field == field, f"of {error.field!r}: {error}"
    assert place is None or error.place == os.fspath(place), f"at {error.place!r}: {error}"
