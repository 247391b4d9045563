"""What every test shares: one thread (tiny models gain nothing by more), one seed, one look at the machine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from mistral_7b.benchmark.roofline import Ceilings

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """This machine's, as `bench --quick` has them measured: by a process of its own, with one thread.

    Once, because it takes seconds, and gigabytes.
    """
    from mistral_7b.benchmark.run import measure_ceilings

    return measure_ceilings(1, quick=True)


@pytest.fixture
def ceilings_asked(ceilings: Ceilings, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, bool]]:
    """Commands get those ceilings, however they ask; how they did: threads, and quick or not."""
    asked: list[tuple[int | None, bool]] = []

    def find_ceilings(threads: int | None = None, quick: bool = False, **limits: object) -> dict[str, Any]:
        asked.append((threads, quick))
        return dataclasses.asdict(ceilings)

    monkeypatch.setattr("mistral_7b.benchmark.run.find_ceilings", find_ceilings)
    return asked
