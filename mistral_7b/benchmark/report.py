"""Records as tables for people: figures beside their ceilings, and ours over each peer's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .jobs import OURS
from .records import Record

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "decode": "decode, 1 row after {context} tokens",
    "prefill": "prefill of {context} tokens",
    "batch16": "{rows} rows decoding together after {context} tokens each",
    "load": "load, to the first token (pages of the file in memory)",
}

QUIET = 0.2  # spread of the seconds; on an idle machine it is below a tenth


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast as each peer one of our schemes is, and which peer is the fastest."""

    what: str
    scheme: str
    times: dict[str, float]  # "llama.cpp Q4_0" -> tokens a second of ours over theirs

    @property
    def best_peer(self) -> str:
        return min(self.times, key=lambda name: self.times[name])


def ratios(records: list[Record]) -> list[Ratio]:
    """Ours against every peer that did the same work in the same run, schemes of other sizes included."""
    out = []
    for ours in (r for r in records if r.engine == OURS):
        peers = [r for r in records if r.engine != OURS and r.what == ours.what]
        if peers:
            times = {f"{p.engine} {p.scheme}": ours.tokens_per_s / p.tokens_per_s for p in peers}
            out.append(Ratio(ours.what, ours.scheme, times))
    return out


def heading(records: list[Record]) -> str:
    """What was measured, on what, and the ceilings."""
    r = records[0]
    peaks = {r.matrix_peak: None for r in records}
    products = " and ".join(f"{p / 1e12:.2f}" for p in sorted(peaks, reverse=True))
    versions = {name: v for r in records for name, v in r.versions.items()}
    return (
        f"{r.model}, {r.threads} threads of {r.cpu}, {r.date}, commit {r.commit or 'unknown'}\n"
        f"ceilings: reading {r.read_bandwidth / 1e9:.1f} GB/s, matrix products {products} Top/s\n"
        f"{', '.join(f'{name} {v}' for name, v in versions.items())}"
    )


def tables(records: list[Record]) -> list[Table]:
    """One table for each kind of work, and one of ratios where there are peers; in Markdown's lines."""
    kinds = list(dict.fromkeys(r.what for r in records))
    out = [figures(what, [r for r in records if r.what == what]) for what in kinds]
    compared = ratios(records)
    return [*out, ratio_table(compared)] if compared else out


def figures(what: str, records: list[Record]) -> Table:
    """What was measured of one kind of work."""
    title = TITLES[what].format(context=records[0].context, rows=records[0].rows)
    rate = "seconds" if what == "load" else "tok/s"
    out = table(title, "engine", "scheme", rate, "spread", "GB/s", "Top/s", "of ceiling", "peak memory")
    for r in records:
        out.add_row(
            r.engine, r.scheme, _digits(r.seconds if what == "load" else r.tokens_per_s), f"{r.spread:.1%}",
            f"{r.bytes_per_s / 1e9:.1f}", f"{r.operations_per_s / 1e12:.3f}", f"{r.ceiling_fraction:.1%}",
            f"{r.peak_rss_bytes / 1e9:.2f} GB",
        )  # fmt: skip
    return out


def ratio_table(compared: list[Ratio]) -> Table:
    """A row for each of our figures, a column for each peer; the best peer's is marked."""
    peers = list(dict.fromkeys(name for r in compared for name in r.times))
    out = table("ours over each peer (* the fastest peer of that work)", "work", "scheme", *peers)
    for r in compared:
        cells = [f"{r.times[p]:.2f}{'*' if p == r.best_peer else ' '}" if p in r.times else "" for p in peers]
        out.add_row(r.what, r.scheme, *cells)
    return out


def doubt(records: list[Record]) -> str:
    """Why these figures should not be believed: times that scatter; empty if they do not."""
    wide = [f"{r.what} {r.engine} {r.scheme}" for r in records if r.spread > QUIET]
    if not wide:
        return ""
    return (
        f"spread above {QUIET:.0%}, so something else was running and they are not to be quoted: {', '.join(wide)}"
    )


def paths(records: list[Record]) -> dict[str, str]:
    """Which code ran, for each engine and scheme."""
    return {f"{r.engine} {r.scheme}": r.path for r in records}


def table(title: str, *columns: str) -> Table:
    """An empty table in Markdown's lines, the first two columns to the left."""
    from rich import box
    from rich.table import Table

    out = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for n, column in enumerate(columns):
        out.add_column(column, justify="left" if n < 2 else "right", no_wrap=True)
    return out


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
