"""`mistral-7b plan`: its table, and what is no number of processes or bytes."""

from __future__ import annotations

import pytest


def test_the_table_has_every_way(run) -> None:
    code, out, _ = run("plan", "--shape", "tiny", "--gpus", "2")
    assert code == 0
    assert "FSDP over 2" in out
    assert " a update" not in out


@pytest.mark.parametrize(
    "flags",
    [
        ("--gpus", "0"),
        ("--gpus", "-1"),
        ("--memory", "inf"),
        ("--memory", "nan"),
        ("--shape", "70b"),
        ("--rank", "0"),
    ],
)
def test_what_cannot_be_planned_is_refused(run, flags: tuple[str, str]) -> None:
    code, _, err = run("plan", *flags)
    assert code == 2
    assert flags[0] in err
