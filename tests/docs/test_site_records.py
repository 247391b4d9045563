"""Figures of the site come from records, with date, hardware, commit and command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import records

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
GIVEN = {name: records.options_of(options) for name, options in records.RECORD.findall(PAGE)}
INCOMPLETE = {  # older records, which cannot be measured again
    "2026-11-24-speculation-7b.json", "2026-11-24-speculation-trace.json", "2026-11-24-speculation.json",
    "2026-11-29-finetuning-rates.json", "2026-11-29-gguf-rmse.json", "2026-11-29-rounding-ways.json",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(p.name for p in records.RESULTS.glob("*.json")))
def test_a_record_says_what_when_where_and_how(name: str) -> None:
    about = records.provenance(name, GIVEN.get(name, {}))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert about["command"], f"{name} has no command"
    assert name in INCOMPLETE or (about["hardware"] and about["commit"]), about
    assert records.section(name, GIVEN.get(name, {})).count("|---") >= 1


def test_all_records_are_on_the_page() -> None:
    shown = records.with_records(PAGE)
    for path in records.RESULTS.glob("*.json"):
        assert f"[record](../experiments/results/{path.name})" in shown, path.name


def test_a_table_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {"ours": {"tokens_per_s": 12.3456, "peak_rss_bytes": 4_516_372_480}, "peer": {"tokens_per_s": 2000.4}}
    about = {"date": "2026-01-02", "commit": "abc", "cpu": "Z80", "cores": 2, "command": "x --y"}
    record = {**about, "speed": speed}
    (tmp_path / "2026-01-02-a.json").write_text(json.dumps(record))
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    page = "[a](../experiments/results/2026-01-02-a.json)\n"
    page += "<!-- of: speed\ncolumns: *, tokens_per_s, peak_rss_bytes -->"
    assert records.with_records(page) == (
        "|  | tokens per second | peak memory, GB |\n|---|---|---|\n| ours | 12.35 | 4.52 |\n"
        "| peer | 2,000 |  |\n\n"
        "*2026-01-02, 2 cores of Z80, commit abc*, [record](../experiments/results/2026-01-02-a.json): `x --y`\n"
    )
    with pytest.raises(LookupError, match="no row has nothing"):
        records.with_records(page.replace("tokens_per_s,", "nothing,"))
    with pytest.raises(LookupError, match="unknown options"):
        records.with_records(page.replace("of:", "off:"))


def test_readmes_table_has_the_figures_of_the_records() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- peers -->\n")[1].split("\n\n")[0]
    order = ("int4", "Q4_0", "Q4_K_M", "int8", "Q8_0")

    def figures(name: str, what: str, field: str = "tokens_per_s", unit: float = 1.0) -> list[str]:
        rows = {row["scheme"]: row for row in records.read(name) if row["what"] == what}
        return [f"{rows[scheme][field] / unit:.2f}" for scheme in order if scheme in rows]

    decode, both, avx2 = (
        f"2026-11-30-7b-{of}.json" for of in ("decode-avx512", "in-one-run-avx512", "8-layers-avx2")
    )
    wanted = [
        figures(decode, "decode"), figures(both, "prefill"), figures(both, "batch16"),
        *(figures(avx2, what) for what in ("decode", "prefill", "batch16")),
        figures(decode, "decode", "peak_rss_bytes", 1e9),
    ]  # fmt: skip
    shown = [[cell.strip() for cell in row.strip("|").split("|")][1:] for row in section.splitlines()[2:]]
    assert shown == wanted
    decoded, prefilled = ([float(cell) for cell in row] for row in wanted[:2])
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    long = [float(cell) for cell in figures("2026-11-30-7b-int4-context-512-avx512.json", "decode")]
    assert f"int4 decodes {long[0] / long[2]:.2f} to {decoded[0] / decoded[2]:.2f} times" in text
    assert f"int8 {decoded[3] / decoded[4]:.2f} times as fast as its Q8_0" in text
    assert f"prefill is {prefilled[0] / prefilled[2]:.1f} to {prefilled[3] / prefilled[4]:.1f} times" in text
