"""What every test shares: one thread (tiny models gain nothing by more), one seed, one look at the machine."""

from __future__ import annotations

import dataclasses
import gc
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mistral_7b.errors import Mistral7BError

if TYPE_CHECKING:
    from mistral_7b.bench.roofline import Ceilings

torch.set_num_threads(1)
gc.set_threshold(5_000, 10, 50)  # tests make few cycles, and each module ends with a full collection


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reworded", action="store_true", help="give every error another message; leave out tests of the wording"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--reworded"):
        for item in items:
            if item.get_closest_marker("wording"):
                item.add_marker(pytest.mark.skip(reason="it checks the wording"))


@pytest.fixture(scope="session", autouse=True)
def _reworded(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --reworded no message of ours says what it says: a test that fails now reads prose."""
    if not request.config.getoption("--reworded"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        make = Mistral7BError.__init__

        def init(self: Mistral7BError, message: str = "", **data: Any) -> None:
            make(self, "reworded", **{**data, "hint": data.get("hint") and "reworded"})

        patch.setattr(Mistral7BError, "__init__", init)
        yield


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """The collector leaves alone what was there before a module: imports, and what former modules left.

    A full collection over them takes a second, which would fall into any test, timed ones too.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def starter() -> pathlib.Path:
    """The folder of the starter model in the cache. Tests download it only with MISTRAL_7B_TEST_DOWNLOADS=1."""
    from mistral_7b.checkpoint import starter

    if os.environ.get("MISTRAL_7B_TEST_DOWNLOADS") == "1":
        return starter.pull()
    if (folder := starter.cached()) is None:
        pytest.skip("the starter model is not in the cache (`mistral-7b pull starter`)")
    return folder


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """This machine's, as `bench --quick` has them measured: by a process of its own, with one thread.

    Once, because it takes seconds, and gigabytes.
    """
    from mistral_7b.bench.run import measure_ceilings

    return measure_ceilings(1, quick=True)


@pytest.fixture
def ceilings_asked(ceilings: Ceilings, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, bool]]:
    """Commands get those ceilings, however they ask; how they did: threads, and quick or not."""
    asked: list[tuple[int | None, bool]] = []

    def find_ceilings(threads: int | None = None, quick: bool = False, **limits: object) -> dict[str, Any]:
        asked.append((threads, quick))
        return dataclasses.asdict(ceilings)

    monkeypatch.setattr("mistral_7b.bench.run.find_ceilings", find_ceilings)
    return asked
