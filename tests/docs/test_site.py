"""The site builds offline without a warning, shows the code that there is, and names tests that there are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs", reason="pip install '.[docs]'")

from docstrings import as_markdown  # noqa: E402
from source import definition, linked, with_code, with_links  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?(https?:[^"\s>]+)', text)
        assert not loaded, f"{page.name} loads {loaded}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text(encoding="utf-8")), style.name


def test_the_paper_shows_the_code_and_formulas_to_draw(site: Path) -> None:
    page = (site / "paper.html").read_text(encoding="utf-8")
    for name in ("RMSNorm", "rope_phases", "visible", "TransformerBlock"):
        assert re.search(rf'<span class="n[cf]">{name}</span>', page), name
    assert page.count('class="arithmatex"') > 20
    assert "window.temml=" in (site / "site" / "temml.js").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name(site: Path) -> None:
    import mistral_7b

    pages = "".join(p.read_text(encoding="utf-8") for p in (site / "reference").glob("*.html"))
    for name, home in mistral_7b._HOMES.items():
        assert f'id="mistral_7b.{home}.{name}"' in pages, name


def test_every_page_has_its_place_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\nplugins:")[0]
    named = re.findall(r": ([\w/]+\.md)$", navigation, re.M)
    assert {p.name for p in (ROOT / "docs").glob("*.md")} <= set(named)
    assert len(set(named)) == len(named)


def test_code_is_taken_by_name() -> None:
    source, line = definition("mistral_7b/model.py", "RMSNorm.forward")
    assert source.startswith("def forward(self, x: Tensor)")
    assert (ROOT / "mistral_7b/model.py").read_text().splitlines()[line - 1].strip() == source.splitlines()[0]
    assert definition("mistral_7b/cache/rolling.py", "EMPTY")[0].startswith("EMPTY = ")
    with pytest.raises(LookupError, match="has no NoSuchNorm"):
        with_code("[`NoSuchNorm`](../mistral_7b/model.py)")
    inline = "see [`RMSNorm`](../mistral_7b/model.py)"
    assert with_code(inline) == inline


def test_links_lead_to_pages_of_the_site() -> None:
    text = "[a](docs/cli.md#chat) [b](mistral_7b/model.py#L33) [c](https://x.org/y) "
    text += "[d](deploy/README.md)\n```\n[e](f.md)\n```\n"
    assert with_links(text, "README.md", "index.md") == (
        "[a](cli.md#chat) [b](source/mistral_7b/model.py.md#__codelineno-0-33) [c](https://x.org/y) "
        "[d](source/deploy/README.md)\n```\n[e](f.md)\n```\n"
    )
    assert with_links("[a](../README.md)", "docs/x.md", "x.md") == "[a](index.md)"
    with pytest.raises(LookupError, match="not there"):
        linked("[a](../nowhere.py)", "docs/x.md")


def test_columns_of_docstrings_become_lists() -> None:
    assert as_markdown("Do it.\n\nx     a number\n      of two lines\nwide  another\n\nEnd.") == (
        "Do it.\n\n- `x`: a number of two lines\n- `wide`: another\n\nEnd."
    )
    assert as_markdown("It.\n\nAttributes:\n    n: how many\n        there are\n    m: more") == (
        "It.\n\n- `n`: how many there are\n- `m`: more"
    )


CORRECTNESS = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
TRAPS = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\), `(test_\w+)` \|", CORRECTNESS)


@pytest.mark.parametrize(("path", "name"), TRAPS, ids=[f"{path}-{name}" for path, name in TRAPS])
def test_the_tests_of_traps_exist(path: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}(_|\b)", (ROOT / path).read_text(encoding="utf-8"), re.M)


def test_each_row_of_correctness_names_a_test_that_exists() -> None:
    rows = [row for row in CORRECTNESS.splitlines() if row.startswith("| ") and "| test" not in row[-8:]]
    assert len(rows) > 45
    for row in rows:
        names = re.findall(r"\[([\w.]+)\]\(\.\./(tests/[\w/]+\.py)\)", row)
        assert names, row
        for shown, path in names:
            assert path.endswith(f"/{shown}"), row
            assert "def test_" in (ROOT / path).read_text(encoding="utf-8"), path
