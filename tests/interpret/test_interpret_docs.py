"""docs/interpret.md: its snippets run, and its table is that of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mistral_7b.activations.points import POINTS

PAGE = (Path(__file__).parents[2] / "docs" / "interpret.md").read_text(encoding="utf-8")


def test_the_snippets_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets, names = re.findall(r"```python\n(.*?)```", PAGE, re.S), {}
    assert len(snippets) == 6
    for snippet in snippets:
        exec(compile(snippet, "docs/interpret.md", "exec"), names)
    assert names["output"].recorded["residual", 1].shape[1] == names["vector"].shape[0]
    for changed in ("patched", "ablated", "halved", "steered"):
        assert not names[changed].equal(names["logits"]), changed
    assert (tmp_path / "states.safetensors").exists()


def test_the_table_has_every_point() -> None:
    rows = [f"| `{name}` | {p.shape} | `{p.full_hook}` | {p.meaning} |" for name, p in POINTS.items()]
    assert "\n".join(rows) in PAGE
